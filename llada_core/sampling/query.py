"""What a step asks a model for, and who answers: the call that all denoisers share.

Shapes: A active rows, T columns, P asked-for positions, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor


def on_device(numbers: Sequence[int], device: torch.device, dtype: torch.dtype = torch.long) -> Tensor:
    """(n,) of numbers that the host knows; the host waits for no device."""
    return torch.tensor(numbers, dtype=dtype).to(device, non_blocking=True)


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

    def subset(self, rows: Tensor, wanted: Tensor) -> "Query":
        """The query of some rows (R,), with `wanted` counted in them."""
        return replace(
            self,
            tokens=self.tokens[rows],
            visible=None if self.visible is None else self.visible[rows],
            known=self.known[rows],
            wanted=wanted,
        )


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

    def fixed(self, fresh: Sequence[bool | None], shape: torch.Size) -> Callable[[Query], Tensor] | None:
        """The next look, counted, as a function of tensors alone, over (A, T) tokens; None where it is more than one."""

    def arrange(self, order: list[int], width: int) -> None:
        """The active rows are now these of the ones before, in this order (-1: a new one), over `width` columns."""
