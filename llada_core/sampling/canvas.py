"""The sequences being written: which positions are given, which are open, and where the blocks of each row lie.

Every row starts at column 0, so that a sequence has the same positions (and rounding) alone and in any batch; what is
shorter is padded on the right and invisible. Does not know models, confidences or how many positions to commit.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from llada_core.families import SpecialTokens


@dataclass(frozen=True)
class Canvas:
    """A batch of rows. A rows, T columns.

    `tokens` (A, T) int64, `mask_id` where open; `visible` (A, T) bool, or None when all is; `known` (A, T) bool: what an
    unguided look must not see; `start`, `end` (A,) int64: the columns between which blocks are counted, `end` excluded;
    `number` (A,): each row's number in the caller's batch; `shift` (A,): by how many columns the caller's layout has the
    row further to the right (it pads on the left), `width` how many columns that layout has.
    """

    tokens: Tensor
    visible: Tensor | None
    known: Tensor
    start: Tensor
    end: Tensor
    number: Tensor
    shift: Tensor
    width: int
    mask_id: int
    pad_id: int

    @property
    def open(self) -> Tensor:
        """(A, T) bool: still to be written."""
        return self.tokens == self.mask_id

    @property
    def columns(self) -> Tensor:
        """(T,) int64."""
        return torch.arange(self.tokens.shape[1], device=self.tokens.device)

    def rows(self, index: Tensor) -> "Canvas":
        """The canvas of some rows only."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Canvas(**{name: v[index] if isinstance(v, Tensor) else v for name, v in values.items()})

    def written(self, tokens: Tensor) -> "Canvas":
        """The same rows with other tokens."""
        return replace(self, tokens=tokens)

    def place(self, flat: Tensor) -> Tensor:
        """Where positions of this canvas, flat in A*T, lie in the caller's batch, flat in B*`width`."""
        row, column = flat // self.tokens.shape[1], flat % self.tokens.shape[1]
        return self.number[row] * self.width + (column + self.shift[row]) % self.width

    def shown(self, board: Tensor | None = None) -> Tensor:
        """(B, `width`): a copy of `board`, or of an empty one, with the rows of this canvas in the caller's layout."""
        board = self.tokens.new_full((len(self.tokens), self.width), self.pad_id) if board is None else board.clone()
        everything = torch.arange(self.tokens.numel(), device=board.device)
        board.view(-1)[self.place(everything)] = self.tokens.view(-1)
        return board

    @classmethod
    def from_rows(
        cls,
        rows: Sequence[Tensor],
        starts: Sequence[int],
        visible: Sequence[Tensor | None],
        special: SpecialTokens,
        width: int = 0,
    ) -> "Canvas":
        """Rows of different lengths; the blocks of a row begin at its start and fill the rest of it.

        `visible`: for a row whose beginning has holes, which of its first columns are seen. `width` of the caller's layout,
        if wider than the longest row.
        """
        device, mask_id, pad_id = rows[0].device, special.mask_id, special.pad_id
        longest = max(len(row) for row in rows)
        start, end = (torch.tensor(list(n), device=device) for n in (starts, map(len, rows)))
        inside = torch.arange(longest, device=device) < end[:, None]
        tokens = torch.full(inside.shape, pad_id, dtype=torch.long, device=device)
        tokens[inside] = torch.cat(list(rows))
        seen = inside.clone()
        for i, row in enumerate(visible):
            if row is not None:
                seen[i, : len(row)] = row
        known = seen & (tokens != mask_id)
        number = torch.arange(len(rows), device=device)
        width = max(width, longest)
        visible_to_model = None if bool(seen.all()) else seen
        return cls(tokens, visible_to_model, known, start, end, number, width - end, width, mask_id, pad_id)


@dataclass(frozen=True)
class Blocks:
    """The block of each row's first open position. A rows.

    `number` (A,) counts from the row's start; `first`, `last` (A,) are its columns, `last` excluded; `open` (A, T) bool.
    """

    number: Tensor
    first: Tensor
    last: Tensor
    open: Tensor

    @classmethod
    def of(cls, canvas: Canvas, length: int) -> "Blocks":
        """Blocks of `length` columns; a row without open positions has an empty one."""
        is_open = canvas.open
        number = (is_open.to(torch.uint8).argmax(1) - canvas.start).div(length, rounding_mode="floor")
        first = canvas.start + number * length
        last = torch.minimum(first + length, canvas.end)
        inside = (canvas.columns >= first[:, None]) & (canvas.columns < last[:, None])
        return cls(number, first, last, is_open & inside)
