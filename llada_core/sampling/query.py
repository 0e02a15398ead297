"""What a step asks a model for, and who answers: the call that all denoisers share.

Shapes: A active rows, T columns, P asked-for positions, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor


def on_device(numbers: Sequence[int], device: torch.device, dtype: torch.dtype = torch.long) -> Tensor:
    """(n,) of numbers that the host knows; the host waits for no device."""
    return torch.tensor(numbers, dtype=dtype).to(device, non_blocking=True)


def seats(rows: int) -> int:
    """How many rows a compiled step has for so many answers: 1, 2, 4, 8, 16, 32, 64, then multiples of 64."""
    # Doubling wastes less than half of the rows, and seven functions serve all batches up to 64.
    return 1 << (rows - 1).bit_length() if rows <= 64 else -(-rows // 64) * 64


def columns(width: int) -> int:
    """How wide the canvas of a compiled step is: multiples of 64 up to 512, then four widths to each doubling."""
    # An eighth of the next power of two: at most a quarter of the columns is for nothing, at 20 widths up to 4,096.
    step = max(64, 1 << max(0, (width - 1).bit_length() - 3))
    return -(-width // step) * step


@dataclass(frozen=True)
class Query:
    """What one step asks. A active rows, T columns, P asked-for positions.

    `tokens` (A, T); `visible` (A, T) bool or None; `known` (A, T) bool, hidden from an unguided forward; `wanted` (P,)
    indices into the A*T flattened positions; `first` (A,) column of each row's block, also on the host; `fresh`: has
    the row just entered it (None: it writes nothing)? A cache asks how many of `wanted` each row has, row after row:
    `counts`.
    """

    tokens: Tensor
    visible: Tensor | None
    known: Tensor
    wanted: Tensor
    mask_id: int
    first: Tensor
    firsts: list[int]
    fresh: Sequence[bool | None]
    counts: list[int] = field(default_factory=list)

    def seen(self, block: int) -> Tensor:
        """(A, T) bool: what is visible of each row's canvas as far as its block of so many columns."""
        places = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        there = places < self.first[:, None] + block
        return there if self.visible is None else there & self.visible

    def subset(self, rows: Tensor, wanted: Tensor) -> "Query":
        """The query of some rows (R,), with `wanted` counted in them."""
        return replace(
            self,
            tokens=self.tokens[rows],
            visible=None if self.visible is None else self.visible[rows],
            known=self.known[rows],
            wanted=wanted,
        )


@dataclass(frozen=True)
class Look:
    """What a step of fixed shapes feeds: equal numbers and shapes are one function. A active rows, R of them apart.

    `width` positions of each row, None for whole canvases, from its column `start` (A,) on, None for its block's own. The
    rows `apart` (R,), if there are any, are fed in a second forward: `far` positions from their beginning, None for all. A
    row may be named there more than once, so that R is one of few numbers.
    """

    width: int | None = None
    start: Tensor | None = None
    apart: Tensor | None = None
    far: int | None = None


class Denoiser(Protocol):
    """Canvas -> logits where asked."""

    @property
    def forwards(self) -> int:
        """Calls of the model so far."""

    @property
    def fed(self) -> int:
        """Tokens that went through the model so far."""

    @property
    def written(self) -> list[Tensor]:
        """What a look writes into."""

    def logits(self, query: Query) -> Tensor:
        """(P, V) logits of `query.wanted`."""

    def plan(self, fresh: Sequence[bool | None], firsts: list[int], shape: torch.Size) -> Look:
        """What the step feeds that is taken now, counted; of (A, T) tokens. See `Query` for `fresh` and `firsts`."""

    def ask(self, query: Query, look: Look) -> Tensor:
        """(P, V), as a function of tensors alone: every position of every window is `wanted`. Uncounted."""

    def arrange(self, order: list[int], width: int) -> None:
        """The active rows are now these of the ones before, in this order (-1: a new one), over `width` columns."""
