"""The sequences being written: which positions are given, which are open, and where the blocks of each row lie.

Every row starts at column 0, so that a sequence has the same positions (and rounding) alone and in any batch; what is
shorter is padded on the right and invisible. Does not know models, confidences or how many positions to commit.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from llada_core.families import SpecialTokens


@dataclass(frozen=True)
class Row:
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
    an unguided look must not see; `start`, `end` (A,) int64: the columns between which blocks are counted, `end`
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
        cls, rows: Sequence[Row], special: SpecialTokens, *, width: int = 0, blind_keeps: Sequence[int] = ()
    ) -> "Canvas":
        """Rows of any lengths. `width` of the caller's layout, if wider than the longest row; `blind_keeps`: token ids
        that an unguided look may see.
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

    `number` (A,) counts from the row's start; `first`, `last` (A,) are its columns, `last` excluded; `open` (A, T)
    bool. `counts` of open positions, `entered` (was the row in another block before?), `firsts`.
    """

    number: Tensor
    first: Tensor
    last: Tensor
    open: Tensor
    counts: list[int]
    entered: list[bool]
    firsts: list[int]

    @classmethod
    def of(cls, canvas: Canvas, length: int, before: Tensor) -> "Blocks":
        """Blocks of `length` columns, `before` (A,) being the last ones' numbers; a finished row counts 0."""
        is_open = canvas.open
        number = (is_open.to(torch.uint8).argmax(1) - canvas.start).div(length, rounding_mode="floor")
        first = canvas.start + number * length
        last = torch.minimum(first + length, canvas.end)
        inside = is_open & (canvas.columns >= first[:, None]) & (canvas.columns < last[:, None])
        counts, entered, firsts = torch.stack([inside.sum(1), (number != before).long(), first]).tolist()
        return cls(number, first, last, inside, counts, [bool(new) for new in entered], firsts)

    def after(self, canvas: Canvas) -> "Blocks | None":
        """The same blocks with what is still open in them; None once one is done, so that a row has moved on."""
        still = self.open & canvas.open
        counts = still.sum(1).tolist()
        return None if 0 in counts else replace(self, open=still, counts=counts, entered=[False] * len(counts))
