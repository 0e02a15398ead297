"""The rows being written, their blocks, what one step did; and whether an input can be sampled at all.

Every row starts at column 0, so that a sequence has the same positions (and rounding) alone and in any batch; what is
shorter is padded on the right and invisible.

Shapes: B rows of the caller's batch, A of them active, T columns, W positions of a block's window.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from llada_core.modeling.predictor import MaskPredictor, require_in_vocabulary, require_no_mask
from llada_core.sampling.params import SamplingParams
from llada_core.tokenizer import SpecialTokens


@dataclass(frozen=True)
class PromptRow:
    """One prompt without its padding: `ids` (P,) int64; `visible` (P,) bool if it has holes."""

    ids: Tensor
    visible: Tensor | None = None


def prompts(
    model: MaskPredictor, prompt_ids: Tensor | Sequence[Sequence[int]] | Sequence[Tensor], attention_mask: Tensor | None
) -> tuple[list[PromptRow], int]:
    """The prompts of a batch, checked, and the width of the caller's layout: the longest, padding included."""
    if isinstance(prompt_ids, Tensor):
        rows, width = _rows_of_tensor(model, prompt_ids, attention_mask), prompt_ids.shape[1]
    elif attention_mask is not None:
        raise ValueError(
            "attention_mask belongs to a prompt tensor; a list of prompts needs none, its prompts are not padded"
        )
    else:
        rows = [PromptRow(ids) for ids in _rows_of_list(model, prompt_ids)]
        width = max(len(row.ids) for row in rows)
    for i, row in enumerate(rows):
        ids = row.ids if row.visible is None else row.ids[row.visible]
        require_in_vocabulary(model, ids, f"prompt {i}")
        require_no_mask(
            model, ids, f"prompt {i}", "to have masks filled, give the whole text as a template to infill()"
        )
    return rows, width


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


def _rows_of_tensor(model: MaskPredictor, ids: Tensor, attention_mask: Tensor | None) -> list[PromptRow]:
    if ids.dim() != 2 or ids.dtype != torch.long or not len(ids):
        raise ValueError(f"prompts must be (B, P) int64 with B of 1 or more, got {tuple(ids.shape)} {ids.dtype}")
    ids = ids.to(model.device)
    if attention_mask is None:
        return [PromptRow(row) for row in ids]
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
        result.append(PromptRow(hidden, None if bool(seen.all()) else seen))
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


@dataclass(frozen=True)
class Step:
    """One step. B rows, T columns, A rows that took part, Q positions that the model was asked about.

    `tokens` (B, T) int64 after the step, `before` it; `rows` (A,) the rows that took part; `bounds` (A, 2) their
    blocks; `asked` (Q,) indices into the B*T flattened positions, `proposals` (Q,) and `confidences` (Q,) what came back;
    `forwards` of the model so far.
    """

    tokens: Tensor
    before: Tensor = field(repr=False)
    mask_id: int
    forwards: int
    rows: Tensor
    bounds: Tensor = field(repr=False)
    asked: Tensor = field(repr=False)
    proposals: Tensor = field(repr=False)
    confidences: Tensor = field(repr=False)

    @property
    def open(self) -> Tensor:
        """(B, T) bool: still masked after the step."""
        return self.tokens == self.mask_id

    @property
    def committed(self) -> Tensor:
        """(B, T) bool: written by this step, over a token too where a stop fills the rest of the answer."""
        return (self.tokens != self.before) & ~self.open

    @property
    def taken_back(self) -> Tensor:
        """(B, T) bool: a token before this step, masked after it."""
        return (self.before != self.mask_id) & self.open

    @property
    def proposal(self) -> Tensor:
        """(B, T) int64: what the model would have written at each position that it was asked about, -1 elsewhere."""
        return torch.full_like(self.tokens, -1).view(-1).index_copy(0, self.asked, self.proposals).view_as(self.tokens)

    @property
    def confidence(self) -> Tensor:
        """(B, T) in [0, 1], of the proposals; nan elsewhere."""
        unknown = self.confidences.new_full((self.tokens.numel(),), torch.nan)
        return unknown.index_copy(0, self.asked, self.confidences).view_as(self.tokens)

    @property
    def block(self) -> Tensor:
        """(B, 2) int64: first and one past the last column of each row's block; 0, 0 for rows that have finished."""
        return self.tokens.new_zeros(len(self.tokens), 2).index_copy(0, self.rows, self.bounds)


@dataclass(frozen=True)
class CanvasRow:
    """One sequence to write: `tokens` (L,); blocks are counted from `start` to `end`, excluded; `visible` (n,) bool
    says which of the first n tokens are seen, if not all.
    """

    tokens: Tensor
    start: int
    end: int
    visible: Tensor | None = None


@dataclass(frozen=True)
class Canvas:
    """A batch of rows. A rows, T columns.

    `tokens` (A, T) int64, `mask_id` where open; `visible` (A, T) bool, or None when all is; `known` (A, T) bool: what
    an unguided forward must not see; `start`, `end` (A,) int64: the columns between which blocks are counted, `end`
    excluded; `size` (A,): the columns of the row; `number` (A,): each row's number in the caller's batch, whose layout
    is `width` columns wide and padded on the left.
    """

    tokens: Tensor
    visible: Tensor | None
    known: Tensor
    start: Tensor
    end: Tensor
    size: Tensor
    number: Tensor
    width: int
    special: SpecialTokens

    @classmethod
    def from_rows(
        cls, rows: Sequence[CanvasRow], special: SpecialTokens, *, width: int = 0, blind_keeps: Sequence[int] = ()
    ) -> "Canvas":
        """Rows of any lengths. `width` of the caller's layout, if wider than the longest row; `blind_keeps`: token ids
        that an unguided forward may see.
        """
        device = rows[0].tokens.device

        def numbers(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.long, device=device)

        size = numbers([len(row.tokens) for row in rows])
        longest = max(len(row.tokens) for row in rows)
        visible = torch.arange(longest, device=device) < size[:, None]
        tokens = torch.full(visible.shape, special.pad_id, dtype=torch.long, device=device)
        tokens[visible] = torch.cat([row.tokens for row in rows])
        for i, row in enumerate(rows):
            if row.visible is not None:
                visible[i, : len(row.visible)] = row.visible
        known = tokens != special.mask_id
        if blind_keeps:
            known &= ~torch.isin(tokens, numbers(blind_keeps))
        return cls(
            tokens=tokens,
            visible=None if bool(visible.all()) else visible,
            known=known,
            start=numbers([row.start for row in rows]),
            end=numbers([row.end for row in rows]),
            size=size,
            number=torch.arange(len(rows), device=device),
            width=max(width, longest),
            special=special,
        )

    @property
    def mask_id(self) -> int:
        """The token of an open position."""
        return self.special.mask_id

    @property
    def open(self) -> Tensor:
        """(A, T) bool: still to be written."""
        return self.tokens == self.mask_id

    @property
    def columns(self) -> Tensor:
        """(T,) int64."""
        return torch.arange(self.tokens.shape[1], device=self.tokens.device)

    @property
    def shift(self) -> Tensor:
        """(A,): by how many columns the caller's layout has each row further to the right."""
        return self.width - self.size

    def rows(self, kept: list[int]) -> "Canvas":
        """The canvas of some rows only, without the columns that none of them has."""
        index = torch.tensor(kept, device=self.tokens.device)
        size = self.size[index]
        columns = int(size.max())
        visible = None if self.visible is None else self.visible[index, :columns]
        return replace(
            self,
            tokens=self.tokens[index, :columns],
            visible=None if visible is None or bool(visible.all()) else visible,
            known=self.known[index, :columns],
            start=self.start[index],
            end=self.end[index],
            size=size,
            number=self.number[index],
        )

    def written(self, tokens: Tensor) -> "Canvas":
        """The same rows with other tokens."""
        canvas = replace(self, tokens=tokens)
        canvas.__dict__.update(places=self.places, answer=self.answer)  # computed once for all steps of these rows
        return canvas

    @cached_property
    def answer(self) -> Tensor:
        """(A, T) bool: the columns in which blocks are counted."""
        return (self.columns >= self.start[:, None]) & (self.columns < self.end[:, None])

    @cached_property
    def places(self) -> Tensor:
        """(A*T,): where each position of this canvas lies in the caller's batch, flat in B*`width`."""
        column = (self.columns + self.shift[:, None]) % self.width
        return (self.number[:, None] * self.width + column).flatten()

    def shown(self, board: Tensor | None = None) -> Tensor:
        """(B, `width`): a copy of `board`, or of an empty one, with the rows of this canvas in the caller's layout."""
        if board is None:
            board = self.tokens.new_full((len(self.tokens), self.width), self.special.pad_id)
        else:
            board = board.clone()
        board.view(-1)[self.places] = self.tokens.view(-1)
        return board


@dataclass(frozen=True)
class Blocks:
    """The block of each row's first open position, on the device and, in one transfer, on the host. A rows.

    `number` (A,) counts from the row's start; `first`, `last` (A,) are its columns, `last` excluded. W positions from
    `first` on are the window that a rule judges: `places` (A, W) indices into the A*T flattened positions, `inside` (A, W)
    bool where they belong to the block, `open` (A, W) bool where they are still masked. `fresh` (A,) bool: the row was in another block before. On the
    host: `counts` of open positions, `entered` (as `fresh`), `firsts`.
    """

    number: Tensor
    first: Tensor
    last: Tensor
    places: Tensor
    inside: Tensor
    open: Tensor
    fresh: Tensor
    counts: list[int]
    entered: list[bool]
    firsts: list[int]

    @classmethod
    def of(cls, canvas: Canvas, length: int, width: int, before: Tensor) -> "Blocks":
        """Blocks of `length` columns in windows of `width`; `before` (A,): the last ones' numbers. A finished row counts 0."""
        number = (canvas.open.to(torch.uint8).argmax(1) - canvas.start).div(length, rounding_mode="floor")
        first = canvas.start + number * length
        last = torch.minimum(first + length, canvas.end)
        columns = first[:, None] + torch.arange(width, device=first.device)
        inside = columns < last[:, None]
        # A window past the canvas repeats the canvas's edge, which `inside` leaves out.
        rows, canvas_width = canvas.tokens.shape
        places = columns.clamp(0, canvas_width - 1) + canvas_width * torch.arange(rows, device=first.device)[:, None]
        is_open, fresh = inside & canvas.open.flatten()[places], number != before
        counts, entered, firsts = torch.stack([is_open.sum(1), fresh.long(), first]).tolist()
        entered = [bool(new) for new in entered]
        return cls(number, first, last, places, inside, is_open, fresh, counts, entered, firsts)

    def after(self, canvas: Canvas) -> "Blocks | None":
        """The same blocks with what is open in them now; None once one is done, so that a row has moved on."""
        still = self.inside & canvas.open.flatten()[self.places]
        counts = still.sum(1).tolist()
        if 0 in counts:
            return None
        # `fresh` stays as it was: it is read only where some row has entered a block.
        return replace(self, open=still, counts=counts, entered=[False] * len(counts))

    def on_canvas(self, chosen: Tensor, canvas: Canvas) -> Tensor:
        """(A, T) bool: the positions of the windows that are `chosen` (A, W) bool."""
        count = torch.zeros(canvas.tokens.numel(), dtype=torch.int32, device=chosen.device)
        count = count.index_add(0, self.places.flatten(), (chosen & self.inside).flatten().int())
        return count.view_as(canvas.tokens) > 0
