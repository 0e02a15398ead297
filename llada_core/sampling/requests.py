"""What is asked of the sampler: one answer or one template with settings of its own, checked before anything is computed.

A request lies on the host and holds all that determines its answer: its tokens, its settings, and the key of its random
numbers. Nothing in it depends on what it will share a batch with.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from llada_core.modeling.predictor import (
    MaskPredictor,
    require_in_vocabulary,
    require_length,
    require_no_mask,
)
from llada_core.sampling.denoiser import denoiser_of
from llada_core.sampling.params import EDITING, SamplingParams
from llada_core.sampling.proposals import noise_key
from llada_core.sampling.unmask import rule_of

MOST_STEPS = 4096
Prompts = Tensor | Sequence[Sequence[int]] | Sequence[Tensor]


@dataclass(frozen=True, eq=False)
class Request:
    """One sequence to write, L tokens long.

    `tokens` (L,) int64 on the CPU, `mask_id` where it is open; `visible` (n,) bool says which of the first n are seen, if
    not all; what is written lies from `start` to `end`, excluded, its last `tail` positions for nobody; blocks are counted
    from `origin`. `key` is that of its random numbers. `ahead`: propose beyond the block too (a cached forward leaves that
    out). `by_blocks`: its model attends by blocks.
    """

    tokens: Tensor
    start: int
    end: int
    params: SamplingParams
    key: int
    mask_id: int
    visible: Tensor | None = None
    ahead: bool = False
    origin: int = 0
    tail: int = 0
    by_blocks: bool = False

    @property
    def told(self) -> int:
        """How many of its tokens are shown to whoever asked."""
        return len(self.tokens) - self.tail

    @property
    def edits(self) -> bool:
        """Whether written tokens may give way to others."""
        return self.params.sampler == "llada2.1"

    @property
    def block(self) -> int:
        """Columns of a block."""
        return min(self.params.block_length, self.end - self.origin)

    @property
    def steps(self) -> int:
        """The budget of one block: the answer's is shared by the row's own blocks, rounded up.

        Where blocks are counted from the row's beginning, its first and last are asked for in part: a whole one has its
        share by length.
        """
        if self.by_blocks:
            return -(-self.params.steps * self.block // (self.end - self.tail - self.start))
        return -(-self.params.steps // -(-(self.end - self.start) // self.params.block_length))

    @cached_property
    def forward_key(self) -> tuple[Any, ...]:
        """What requests have in common that can share a forward."""
        p = self.params
        window = (p.block_length if p.cache == "dual" else 0, p.cache_window, p.cache_refresh)
        # Only a dual cache's windows are as wide as a block; other rows with blocks of any lengths share forwards, if what
        # stands behind their blocks is there.
        seen = p.block_length if self.by_blocks or p.variable_length else 0
        return p.cache, window, p.cfg_scale, p.right_shift_logits, seen

    @cached_property
    def rule_key(self) -> tuple[Any, ...]:
        """What requests have in common whose tokens are chosen by the same operations; the numbers in it are each row's own."""
        p = self.params
        own: tuple[Any, ...] | None = None
        rule = [value is not None for value in (p.threshold, p.factor, p.entropy_bound)]
        schedule = None if p.parallel else (p.schedule, p.stochastic_transfer)
        if p.rule is not None:
            # A function of one's own may count positions: it sees blocks of one length.
            own = p.rule, p.block_length
        elif p.sampler is not None:
            # These rules take their numbers as numbers, not as tensors of the rows.
            own = p.sampler, p.threshold, p.steps, p.block_length, *(getattr(p, name) for name in EDITING)
        drawn = (p.top_k, p.top_p) if p.temperature > 0 else None
        return p.remasking, p.forbid_tokens, p.defer_tokens, drawn, *rule, own, schedule

    @cached_property
    def opening(self) -> tuple[int, int, int]:
        """Of its first block: how many positions are open, and its first column; and how many are open in all."""
        places = (self.tokens == self.mask_id).nonzero()[:, 0]
        if not len(places):
            return 0, self.start, 0
        # The host counts what `Blocks` counts on the device, so that the first step need not wait for it.
        first = self.origin + (int(places[0]) - self.origin) // self.block * self.block
        return int((places < min(first + self.block, self.end)).sum()), first, len(places)


# Tokens, columns between which is written, what is visible, how many of the last are for nobody.
Row = tuple[Tensor, int, int, Tensor | None, int]


def to_answer(  # noqa: PLR0913 - as `generate`; everything after the settings is keyword-only
    model: MaskPredictor,
    prompt_ids: Prompts,
    params: SamplingParams,
    *,
    attention_mask: Tensor | None = None,
    pinned: Mapping[int, int] | None = None,
    ahead: bool = False,
    copy: int = 0,
) -> tuple[list[Request], int]:
    """A request for each prompt, and the width of the caller's layout: the longest prompt, padding included.

    Equal prompts are copies with random numbers of their own, counted from `copy`. Other arguments and errors are those
    of `generate`.
    """
    prompts, width = _prompts(model, prompt_ids, attention_mask)
    special, new = model.special_tokens, params.max_new_tokens
    # By its length, before there is anything of that size.
    require_length(model, max(len(ids) for ids, _ in prompts) + new, "shorten the prompt or max_new_tokens")
    if model.block_length is None:
        _answer_settings(params)
    # Words that are pinned stand there from the start, so that nothing later has to tell them from what was written.
    blank = torch.full((new,), special.mask_id)
    for position, token in _pinned(model, pinned or {}, new).items():
        blank[position] = token
    opening = torch.tensor([i for i in (special.bos_id,) if i is not None], dtype=torch.long)
    closing = torch.tensor([special.eos_id] * model.ends_with_eos, dtype=torch.long)
    rows: list[Row] = []
    for prompt, visible in prompts:
        # A text without a prompt begins as training rows do; the network cannot be fed nothing.
        ids = prompt if len(prompt) else opening
        behind = _behind(model, len(ids) + new, params)
        end = len(ids) + new + len(behind)
        rows.append((torch.cat([ids, blank, closing, behind]), len(ids), end, visible, len(behind)))
    return _requests(model, rows, [ids for ids, _ in prompts], params, ahead=ahead, copy=copy), width


def to_fill(
    model: MaskPredictor, template_ids: Prompts, params: SamplingParams, *, ahead: bool = False, copy: int = 0
) -> list[Request]:
    """A request for each template; copies as in `to_answer`, other arguments and errors are those of `infill`."""
    if params.stop_at_eos:
        raise ValueError("stop_at_eos is for answers; a template is filled to its end")
    if params.variable_length:
        raise ValueError("variable_length is for answers; what stands behind a template's gap is there from the start")
    templates = _templates(model, template_ids)
    rows: list[Row] = []
    for template in templates:
        behind = _behind(model, len(template), params)
        rows.append((torch.cat([template, behind]), 0, len(template) + len(behind), None, len(behind)))
    return _requests(model, rows, templates, params, ahead=ahead, copy=copy)


def _behind(model: MaskPredictor, asked: int, params: SamplingParams) -> Tensor:
    """Masks behind a row of `asked` tokens: a model that attends by blocks is shown whole ones, counted from its beginning."""
    # Its published samplers write whole blocks too: what is behind the answer is written with it and shown to nobody.
    room = 0 if model.block_length is None else max(0, model.max_length - asked)
    return torch.full((min(-asked % params.block_length, room),), model.special_tokens.mask_id)


def _requests(
    model: MaskPredictor, rows: list[Row], prompts: list[Tensor], params: SamplingParams, *, ahead: bool, copy: int
) -> list[Request]:
    require_length(model, max(len(tokens) for tokens, *_ in rows), "shorten the prompt or max_new_tokens")
    # A schedule is a table with a number for each step: a billion of them would be eight gigabytes a row. The reverse
    # process may well be cut finer than there are tokens, of a small model's too.
    if params.steps > (most := max(model.max_length, MOST_STEPS)):
        raise ValueError(f"steps {params.steps}: of this model an answer takes at most {most}")
    _token_settings(model, params)
    by_blocks = model.block_length is not None
    denoiser_of(model, params), rule_of(params)  # what they name is there
    # Without a seed one is drawn, from torch's global generator.
    seed = int(torch.randint(2**62, ()).item()) if params.seed is None else params.seed
    seen: dict[bytes, int] = {}
    found = []
    for (tokens, start, end, visible, tail), prompt in zip(rows, prompts, strict=True):
        # Told apart by their number among equal prompts, not by their row: an answer is the same in any order of a call.
        text = prompt.numpy().tobytes()
        number = seen[text] = seen.get(text, copy - 1) + 1
        key = noise_key(prompt, seed, number)
        mask_id = model.special_tokens.mask_id
        ahead = ahead and params.cache == "none" and not by_blocks and not params.variable_length
        # A model that attends by blocks was trained with blocks that begin at the text's first token.
        origin = 0 if by_blocks else start
        found.append(Request(tokens, start, end, params, key, mask_id, visible, ahead, origin, tail, by_blocks))
    return found


def _prompts(
    model: MaskPredictor, prompt_ids: Prompts, attention_mask: Tensor | None
) -> tuple[list[tuple[Tensor, Tensor | None]], int]:
    """The prompts of a batch, checked, with what is visible of those that have holes; and the longest, padding included."""
    rows: list[tuple[Tensor, Tensor | None]]
    if isinstance(prompt_ids, Tensor):
        rows, width = _rows_of_tensor(model, prompt_ids, attention_mask), prompt_ids.shape[1]
    elif attention_mask is not None:
        raise ValueError(
            "attention_mask belongs to a prompt tensor; a list of prompts needs none, its prompts are not padded"
        )
    else:
        rows = [(ids, None) for ids in _rows_of_list(prompt_ids)]
        width = max(len(ids) for ids, _ in rows)
    for i, (ids, visible) in enumerate(rows):
        seen = ids if visible is None else ids[visible]
        require_in_vocabulary(model, seen, f"prompt {i}")
        require_no_mask(
            model, seen, f"prompt {i}", "to have masks filled, give the whole text as a template to infill()"
        )
    return rows, width


def _templates(model: MaskPredictor, template_ids: Prompts) -> list[Tensor]:
    """The templates of a batch; each has something to fill."""
    rows = (
        [ids for ids, _ in _rows_of_tensor(model, template_ids, None)]
        if isinstance(template_ids, Tensor)
        else _rows_of_list(template_ids)
    )
    for i, ids in enumerate(rows):
        require_in_vocabulary(model, ids, f"template {i}")
        if not bool((ids == model.special_tokens.mask_id).any()):
            raise ValueError(f"template {i} has no mask id {model.special_tokens.mask_id}; there is nothing to fill")
    return rows


def _rows_of_tensor(
    model: MaskPredictor, ids: Tensor, attention_mask: Tensor | None
) -> list[tuple[Tensor, Tensor | None]]:
    if ids.dim() != 2 or ids.dtype != torch.long or not len(ids):
        raise ValueError(f"prompts must be (B, P) int64 with B of 1 or more, got {tuple(ids.shape)} {ids.dtype}")
    # Requests lie on the host: which row shares a forward with which is decided there, from their lengths.
    ids = ids.cpu()
    if attention_mask is None:
        return [(row, None) for row in ids]
    if attention_mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask {tuple(attention_mask.shape)} must have the prompts' shape {tuple(ids.shape)}"
        )
    found: list[tuple[Tensor, Tensor | None]] = []
    for row, seen in zip(ids, attention_mask.cpu().bool(), strict=True):
        left = int((seen.cumsum(0) == 0).sum())
        # Padding on the left goes, so that a prompt has the positions that it has alone; a hole further on stays a hole.
        row, seen = row[left:], seen[left:]
        hidden = torch.where(seen, row, model.special_tokens.pad_id)
        found.append((hidden, None if bool(seen.all()) else seen))
    return found


def _rows_of_list(rows: Sequence[Sequence[int]] | Sequence[Tensor]) -> list[Tensor]:
    if not len(rows):
        raise ValueError("no prompt given; an unconditional text has one empty prompt, [[]]")
    tensors = [torch.as_tensor(row).cpu().reshape(-1) for row in rows]
    for i, ids in enumerate(tensors):
        if ids.is_floating_point() and len(ids):
            raise ValueError(f"prompt {i} holds {float(ids[0])}, a fraction; a prompt is token ids, whole numbers")
    return [ids.long() for ids in tensors]


def _pinned(model: MaskPredictor, words: Mapping[int, int], new_tokens: int) -> Mapping[int, int]:
    """Answer position -> token id, all inside the answer and the vocabulary, and not everything."""
    for position, token in words.items():
        if not 0 <= position < new_tokens:
            raise ValueError(f"pinned position {position} is outside the answer 0..{new_tokens - 1}")
        # The same checks, and so the same sentences, as for prompts.
        word, what = torch.tensor([token]), f"the word pinned at {position}"
        require_in_vocabulary(model, word, what)
        require_no_mask(model, word, what, "leave it out to have it written")
    if len(words) == new_tokens:
        raise ValueError(f"all {new_tokens} positions of the answer are pinned; there is nothing to write")
    return words


def _answer_settings(params: SamplingParams) -> None:
    """Do length, blocks and steps fit? The even schedule shares them out without remainder, as LLaDA does."""
    new, block, steps = params.max_new_tokens, params.block_length, params.steps
    if params.parallel or params.schedule != "even":
        return
    if new % block:
        # Offered are the divisors just below and above, so that the block stays about what was meant.
        near = [b for b in range(1, new + 1) if new % b == 0]
        near = [max(b for b in near if b < block), *[b for b in near if b > block][:1]]
        raise ValueError(
            f"block_length {block} does not divide max_new_tokens {new}; use {' or '.join(map(str, near))},"
            " or schedule 'linear', which takes any length"
        )
    if steps % params.blocks:
        low = max(1, steps // params.blocks) * params.blocks
        raise ValueError(
            f"steps {steps} cannot be shared by {params.blocks} blocks; use {low} or {low + params.blocks},"
            " or schedule 'linear', which takes any number"
        )


def _token_settings(model: MaskPredictor, params: SamplingParams) -> None:
    """Are the tokens that `params` name in the vocabulary, and is anything left to say?"""
    for name in ("forbid_tokens", "defer_tokens", "cfg_keep_tokens"):
        require_in_vocabulary(model, torch.tensor(getattr(params, name), dtype=torch.long), name)
    # MASK is never proposed, whether it is forbidden or not.
    if len({*params.forbid_tokens, model.special_tokens.mask_id}) >= model.vocab_rows:
        raise ValueError("forbid_tokens leaves no token that could be produced")
