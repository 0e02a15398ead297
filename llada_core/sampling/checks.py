"""Is what the caller of the sampler gave something that can be sampled? One line of `ValueError` if not.

Knows limits of prompts, templates and settings against a model; builds nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llada_core.modeling.predictor import MaskPredictor, require_in_vocabulary, require_no_mask
from llada_core.sampling.params import SamplingParams


@dataclass(frozen=True)
class Prompt:
    """One prompt without its padding: `ids` (P,) int64; `visible` (P,) bool if it has holes."""

    ids: Tensor
    visible: Tensor | None = None


@dataclass(frozen=True)
class PromptBatch:
    """The prompts of a batch, and the width of the caller's layout (the longest, padding included)."""

    rows: list[Prompt]
    width: int


def prompts(
    model: MaskPredictor, prompt_ids: Tensor | Sequence[Sequence[int]] | Sequence[Tensor], attention_mask: Tensor | None
) -> PromptBatch:
    """The prompts of a batch, checked."""
    if isinstance(prompt_ids, Tensor):
        rows, width = _rows_of_tensor(model, prompt_ids, attention_mask), prompt_ids.shape[1]
    elif attention_mask is not None:
        raise ValueError(
            "attention_mask belongs to a prompt tensor; a list of prompts needs none, its prompts are not padded"
        )
    else:
        rows = [Prompt(ids) for ids in _rows_of_list(model, prompt_ids)]
        width = max(len(row.ids) for row in rows)
    for i, row in enumerate(rows):
        ids = row.ids if row.visible is None else row.ids[row.visible]
        require_in_vocabulary(model, ids, f"prompt {i}")
        require_no_mask(
            model, ids, f"prompt {i}", "to have masks filled, give the whole text as a template to infill()"
        )
    return PromptBatch(rows, width)


def templates(model: MaskPredictor, template_ids: Tensor | Sequence[Sequence[int]] | Sequence[Tensor]) -> list[Tensor]:
    """The templates of a batch; each has something to fill."""
    rows = (
        [row.ids for row in _rows_of_tensor(model, template_ids, None)]
        if isinstance(template_ids, Tensor)
        else _rows_of_list(model, template_ids)
    )
    for i, ids in enumerate(rows):
        require_in_vocabulary(model, ids, f"template {i}")
        if not bool((ids == model.special_tokens.mask_id).any()):
            raise ValueError(f"template {i} has no mask id {model.special_tokens.mask_id}; there is nothing to fill")
    return rows


def _rows_of_tensor(model: MaskPredictor, ids: Tensor, attention_mask: Tensor | None) -> list[Prompt]:
    if ids.dim() != 2 or ids.dtype != torch.long or not len(ids):
        raise ValueError(f"prompts must be (B, P) int64 with B of 1 or more, got {tuple(ids.shape)} {ids.dtype}")
    ids = ids.to(model.device)
    if attention_mask is None:
        return [Prompt(row) for row in ids]
    if attention_mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask {tuple(attention_mask.shape)} must have the prompts' shape {tuple(ids.shape)}"
        )
    visible = attention_mask.to(model.device).bool()
    result = []
    for row, seen in zip(ids, visible, strict=True):
        left = int((seen.cumsum(0) == 0).sum())
        row, seen = row[left:], seen[left:]
        hidden = torch.where(seen, row, model.special_tokens.pad_id)
        result.append(Prompt(hidden, None if bool(seen.all()) else seen))
    return result


def _rows_of_list(model: MaskPredictor, rows: Sequence[Sequence[int]] | Sequence[Tensor]) -> list[Tensor]:
    if not len(rows):
        raise ValueError("no prompt given; an unconditional text has one empty prompt, [[]]")
    tensors = [torch.as_tensor(row, device=model.device).reshape(-1) for row in rows]
    for i, ids in enumerate(tensors):
        if ids.is_floating_point() and len(ids):
            raise ValueError(f"prompt {i} holds {float(ids[0])}, a fraction; a prompt is token ids, whole numbers")
    return [ids.long() for ids in tensors]


def pinned(model: MaskPredictor, words: Mapping[int, int], new_tokens: int) -> Mapping[int, int]:
    """Answer position -> token id, all inside the answer and the vocabulary, and not everything."""
    for position, token in words.items():
        if not 0 <= position < new_tokens:
            raise ValueError(f"pinned position {position} is outside the answer 0..{new_tokens - 1}")
        word, what = torch.tensor([token]), f"the word pinned at {position}"
        require_in_vocabulary(model, word, what)
        require_no_mask(model, word, what, "leave it out to have it written")
    if len(words) == new_tokens:
        raise ValueError(f"all {new_tokens} positions of the answer are pinned; there is nothing to write")
    return words


def answer_settings(params: SamplingParams) -> None:
    """Do length, blocks and steps fit? The even schedule shares them out without remainder, as LLaDA does."""
    new, block, steps = params.max_new_tokens, params.block_length, params.steps
    if params.parallel or params.schedule != "even":
        return
    if new % block:
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


def template_settings(params: SamplingParams) -> None:
    """A template is filled to its end."""
    if params.stop_at_eos:
        raise ValueError("stop_at_eos is for answers; a template is filled to its end")


def token_settings(model: MaskPredictor, params: SamplingParams) -> None:
    """Are the tokens that `params` name in the vocabulary, and is anything left to say?"""
    for name in ("forbid_tokens", "defer_tokens", "cfg_keep_tokens"):
        require_in_vocabulary(model, torch.tensor(getattr(params, name), dtype=torch.long), name)
    if len({*params.forbid_tokens, model.special_tokens.mask_id}) >= model.vocab_rows:
        raise ValueError("forbid_tokens leaves no token that could be produced")
