"""The rows being written, their blocks, and what one step did.

Every row starts at column 0, so that a sequence has the same positions (and rounding) alone and in any batch; what is
shorter is padded on the right and invisible.

Shapes: B rows of the caller's batch, A of them active, T columns, W positions of a block's window.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from llada_core.sampling.query import on_device
from llada_core.sampling.requests import Request
from llada_core.tokenizer import SpecialTokens


@dataclass(frozen=True)
class Step:
    """One step. B rows, T columns, A rows that took part, Q positions that the model was asked about.

    `tokens` (B, T) int64 after the step, `before` it; `rows` (A,) the rows that took part; `bounds` (A, 2) their
    blocks; `asked` (Q,) indices into the B*T flattened positions (B*T: one that is not shown), `proposals` (Q,) and
    `confidences` (Q,) what came back; `forwards` of the model so far.
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
        """(B, T) bool: written by this step, over a token too where it is edited or a stop fills the rest of the answer."""
        return (self.tokens != self.before) & ~self.open

    @property
    def replaced(self) -> Tensor:
        """(B, T) bool: a token before this step, and after it another one that the model proposed (LLaDA2.1 edits)."""
        return self.committed & (self.before != self.mask_id) & (self.tokens == self.proposal)

    @property
    def taken_back(self) -> Tensor:
        """(B, T) bool: a token before this step, masked after it."""
        return (self.before != self.mask_id) & self.open

    @property
    def proposal(self) -> Tensor:
        """(B, T) int64: what the model would have written at each position that it was asked about, -1 elsewhere."""
        return self._spread(self.proposals, -1)

    @property
    def confidence(self) -> Tensor:
        """(B, T) in [0, 1], of the proposals; nan elsewhere."""
        return self._spread(self.confidences, torch.nan)

    def _spread(self, values: Tensor, otherwise: float) -> Tensor:
        """`values` (Q,) where they were asked for, (B, T)."""
        # One place more than the canvas has, cut off again: what is not shown goes there, and nobody has to count it first.
        places = values.new_full((self.tokens.numel() + 1,), otherwise)
        return places.index_copy(0, self.asked, values)[:-1].view_as(self.tokens)

    @property
    def block(self) -> Tensor:
        """(B, 2) int64: first and one past the last column of each row's block; 0, 0 for rows that have finished."""
        return self.tokens.new_zeros(len(self.tokens), 2).index_copy(0, self.rows, self.bounds)


@dataclass(frozen=True)
class Canvas:
    """Rows of any lengths, A of them over T columns.

    `tokens` (A, T) int64, `mask_id` where open; `seen` (A, T) bool: neither padding nor a hole; `known` (A, T) bool: what
    an unguided forward must not see; `given` (A, T) bool: what stood there from the start; `answer` (A, T) bool: the columns
    in which is written; `end` (A,) int64: the one past the last of them; `origin`, `block` (A,): where blocks are counted
    from, and their length. On the host: the `sizes` of the rows, which have `holes`, and whether anything is hidden, so that the canvas
    is `ragged`.
    """

    tokens: Tensor
    seen: Tensor
    known: Tensor
    given: Tensor
    answer: Tensor
    end: Tensor
    origin: Tensor
    block: Tensor
    sizes: list[int]
    holes: list[bool]
    ragged: bool
    special: SpecialTokens

    @classmethod
    def of(cls, requests: Sequence[Request], special: SpecialTokens, device: torch.device) -> "Canvas":
        """The canvas of some requests, in one copy to the device."""
        sizes = [len(request.tokens) for request in requests]
        # All is laid out on the host, where requests lie: a copy for each table, however many rows come.
        numbers = torch.tensor([(len(r.tokens), r.start, r.end, r.origin, r.block) for r in requests]).T
        column, (size, start, end, *_) = torch.arange(max(sizes)), numbers[:, :, None]
        seen, answer = column < size, (column >= start) & (column < end)
        tokens = torch.full(seen.shape, special.pad_id, dtype=torch.long)
        known = torch.ones_like(seen)
        for i, request in enumerate(requests):
            tokens[i, : sizes[i]] = request.tokens
            if request.visible is not None:
                seen[i, : len(request.visible)] = request.visible
            # What guidance hides is a matter of the prompt alone; what is written is never hidden, as LLaDA's code has it.
            if request.params.cfg_keep_tokens:
                known[i] = ~torch.isin(tokens[i], torch.tensor(request.params.cfg_keep_tokens))
        given = tokens != special.mask_id
        tokens, seen, known, given, answer, (ends, origins, blocks) = (
            x.to(device, non_blocking=True) for x in (tokens, seen, known & given, given, answer, numbers[2:])
        )
        holes = [request.visible is not None for request in requests]
        # Known here, because a device could say whether all is seen only by being waited for; and without a mask attention
        # has its fastest kernels.
        ragged = any(holes) or min(sizes) < seen.shape[1]
        return cls(tokens, seen, known, given, answer, ends, origins, blocks, sizes, holes, ragged, special)

    @property
    def mask_id(self) -> int:
        """The token of an open position."""
        return self.special.mask_id

    @property
    def open(self) -> Tensor:
        """(A, T) bool: still to be written."""
        return self.tokens == self.mask_id

    @property
    def visible(self) -> Tensor | None:
        """(A, T) bool: what may be attended to; None when that is all."""
        return self.seen if self.ragged else None

    @property
    def _fills(self) -> tuple[tuple[str, int | bool], ...]:
        """The tables (A, T) by name, and what stands in them past a row's last column."""
        pad = self.special.pad_id
        return ("tokens", pad), ("seen", False), ("known", True), ("given", True), ("answer", False)

    def rows(self, order: list[int], width: int) -> "Canvas":
        """Some of the rows, in this order, over `width` columns, which hold them."""
        index, sizes = on_device(order, self.tokens.device), [self.sizes[i] for i in order]
        more = max(0, width - self.tokens.shape[1])
        # Narrow first: what falls away is not gathered.
        wide = {name: getattr(self, name)[:, :width] for name, _ in self._fills}
        if more:
            wide = {name: F.pad(wide[name], (0, more), value=fill) for name, fill in self._fills}
        every = wide | {name: getattr(self, name) for name in ("end", "origin", "block")}
        chosen = {name: value.index_select(0, index) for name, value in every.items()}
        holes = [self.holes[i] for i in order]
        return replace(self, **chosen, sizes=sizes, holes=holes, ragged=any(holes) or min(sizes) < width)

    def joined(self, other: "Canvas") -> "Canvas":
        """These rows, then those of `other`."""
        # Padded on the right: columns, and with them positions and rounding, of who is there already stay as they are.
        width = max(self.tokens.shape[1], other.tokens.shape[1])
        both: dict[str, Any] = {}
        for name, fill in self._fills:
            parts = (getattr(canvas, name) for canvas in (self, other))
            both[name] = torch.cat([F.pad(x, (0, width - x.shape[1]), value=fill) for x in parts])
        for name in ("end", "origin", "block"):
            both[name] = torch.cat([getattr(self, name), getattr(other, name)])
        sizes, holes = self.sizes + other.sizes, self.holes + other.holes
        return replace(self, **both, sizes=sizes, holes=holes, ragged=any(holes) or min(sizes) < width)


def padded(value: Tensor, more: int, fill: int = 0) -> Tensor:
    """`value` (R, ...) followed by `more` rows of `fill`."""
    return torch.cat([value, value.new_full((more, *value.shape[1:]), fill)]) if more else value


def zero_where(rows: Tensor, value: Tensor) -> Tensor:
    """`value` (R, ...), zero in those `rows` (R,) bool."""
    return value.masked_fill(rows.view(-1, *[1] * (value.dim() - 1)), 0)


@dataclass(frozen=True)
class Blocks:
    """The block of each row's first open position, or the one that a rule holds the row in. A rows.

    `number` (A,) counts from the row's origin; `first`, `last` (A,) are its columns, `last` excluded. W positions from
    `first` on are the window that a rule judges: `places` (A, W) indices into the A*T flattened positions, `inside` (A, W)
    bool where they belong to the block, `open` (A, W) bool where they are still masked, `asked` (A, W) bool where something
    may be written: these, and of a row that edits all that was not given; `count` (A,) of them. `left` (A,): open positions
    of the whole row, one more where it is held. `fresh` (A,) bool: the row was in another block before. As long as rows and
    window stay: `reach` (W,), the columns from a block's first one on, and `start` (A, 1), where each row's positions begin.
    """

    number: Tensor
    first: Tensor
    last: Tensor
    places: Tensor
    inside: Tensor
    open: Tensor
    asked: Tensor
    count: Tensor
    left: Tensor
    fresh: Tensor
    reach: Tensor
    start: Tensor

    @classmethod
    def of(
        cls,
        canvas: Canvas,
        width: int,
        before: Tensor,
        held: Tensor | None = None,
        edits: Tensor | None = None,
    ) -> "Blocks":
        """Blocks in windows of `width`; `before` (A,): the numbers of the step before, -1 for a row's first.

        `held` (A,) bool stay in theirs, `edits` (A,) bool may write over what was written; None where no row does.
        """
        (rows, columns), device = canvas.tokens.shape, canvas.tokens.device
        start = columns * torch.arange(rows, device=device)[:, None]
        return cls._at(canvas, torch.arange(width, device=device), start, before, held, edits)

    def following(self, canvas: Canvas, held: Tensor | None = None, edits: Tensor | None = None) -> "Blocks":
        """Where the same rows are on their `canvas` after a step."""
        return self._at(canvas, self.reach, self.start, self.number, held, edits)

    @classmethod
    def _at(
        cls,
        canvas: Canvas,
        reach: Tensor,
        start: Tensor,
        before: Tensor,
        held: Tensor | None,
        edits: Tensor | None,
    ) -> "Blocks":
        is_open = canvas.open
        # Asked of the whole canvas once; all that follows is of rows and windows.
        left = is_open.sum(1)
        # argmax of equal values is the first of them: the first open position. Of a row without any it is 0; that row is done.
        number = (is_open.view(torch.uint8).argmax(1) - canvas.origin).div(canvas.block, rounding_mode="floor")
        if held is not None:
            number, left = torch.where(held, before, number), left + held
        # From the number and not from the open position itself, so that a block stays where it began.
        first = canvas.origin + number * canvas.block
        last = torch.minimum(first + canvas.block, canvas.end)
        columns = first[:, None] + reach
        inside = columns < last[:, None]
        # A window past the canvas repeats the canvas's edge, which `inside` leaves out.
        places = columns.clamp(0, canvas.tokens.shape[1] - 1) + start
        # `take` over flat places: one operator where an index of rows and columns would be several.
        here = asked = inside & is_open.take(places)
        if edits is not None:
            asked = here | (inside & ~canvas.given.take(places) & (edits & (left > 0))[:, None])
        return cls(number, first, last, places, inside, here, asked, asked.sum(1), left, number != before, reach, start)

    @property
    def tally(self) -> Tensor:
        """(4, A) int64, what the host has to know: positions of the block that are asked about, whether it is fresh, its
        first column, and what is left of the row.
        """
        # One tensor, because each copy to the host is one more wait for the device.
        return torch.stack([self.count, self.fresh.long(), self.first, self.left])

    def part(self, rows: slice) -> "Blocks":
        """Those of some rows."""
        own = {name: value[rows] for name, value in vars(self).items() if name != "reach"}
        return Blocks(**own, reach=self.reach)

    def on_canvas(self, chosen: Tensor, canvas: Canvas) -> Tensor:
        """(A, T) bool: the positions of the windows that are `chosen` (A, W) bool."""
        # Added up, not assigned: the repeated edge of a window would write over a choice with what is no choice.
        count = torch.zeros(canvas.tokens.numel(), dtype=torch.int32, device=chosen.device)
        count = count.index_add(0, self.places.flatten(), (chosen & self.inside).flatten().int())
        return count.view_as(canvas.tokens) > 0
