"""How logits are got: a plain look at the canvas, or one guided away from the answer to no prompt.

Knows the mask predictor's call; does not know confidences, quotas or what is done with the logits. What keeps keys and
values between steps is in `cached.py`.
"""

from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from llada_core.modeling.predictor import MaskPredictor
from llada_core.sampling.canvas import Blocks, Canvas


@dataclass(frozen=True)
class Query:
    """What one step asks. A active rows, T columns, P asked-for positions.

    `tokens` (A, T); `visible` (A, T) bool or None; `known` (A, T) bool, hidden from an unguided look; `wanted` (P,)
    indices into the A*T flattened positions; `first` (A,) column of each row's block, also on the host; `fresh`: has
    the row just entered it?
    """

    tokens: Tensor
    visible: Tensor | None
    known: Tensor
    wanted: Tensor
    mask_id: int
    first: Tensor
    firsts: list[int]
    fresh: list[bool]

    @classmethod
    def of(cls, canvas: Canvas, blocks: Blocks, wanted: Tensor) -> "Query":
        """Asks about `wanted` positions of a canvas."""
        return cls(
            tokens=canvas.tokens,
            visible=canvas.visible,
            known=canvas.known,
            wanted=wanted,
            mask_id=canvas.mask_id,
            first=blocks.first,
            firsts=blocks.firsts,
            fresh=blocks.entered,
        )

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

    def logits(self, query: Query) -> Tensor:
        """(P, V) logits of `query.wanted`."""

    def keep(self, rows: list[int], width: int) -> None:
        """Only these of the active rows and the first `width` columns go on."""


@dataclass
class Plain:
    """One forward over the whole canvas, the vocabulary projection only at the asked-for positions: exact."""

    model: MaskPredictor
    forwards: int = field(default=0, init=False)
    fed: int = field(default=0, init=False)

    def logits(self, query: Query) -> Tensor:
        """(P, V)."""
        self.forwards += 1
        self.fed += query.tokens.numel()
        return self.model(query.tokens, query.visible, positions=query.wanted).logits

    def keep(self, rows: list[int], width: int) -> None:
        """Nothing is remembered from step to step."""


@dataclass
class Wrapper:
    """A denoiser around another, which counts the forwards and keeps the rows."""

    inner: Denoiser

    @property
    def forwards(self) -> int:
        """Those of the denoiser within; what is doubled rides in one."""
        return self.inner.forwards

    @property
    def fed(self) -> int:
        """Positions fed to the denoiser within."""
        return self.inner.fed

    def keep(self, rows: list[int], width: int) -> None:
        """Passed on."""
        self.inner.keep(rows, width)


@dataclass
class Guided(Wrapper):
    """Classifier-free guidance (LLaDA, appendix A): blind + (scale + 1) * (seeing - blind), in float32."""

    scale: float
    count: int = field(default=0, init=False)

    def logits(self, query: Query) -> Tensor:
        """(P, V)."""
        self.count = len(query.tokens)
        blind = query.tokens.masked_fill(query.known, query.mask_id)
        doubled = replace(
            query,
            tokens=torch.cat([query.tokens, blind]),
            visible=None if query.visible is None else query.visible.repeat(2, 1),
            known=query.known.repeat(2, 1),
            wanted=torch.cat([query.wanted, query.wanted + query.tokens.numel()]),
            first=query.first.repeat(2),
            firsts=query.firsts * 2,
            fresh=query.fresh * 2,
        )
        seeing, unseeing = self.inner.logits(doubled).float().chunk(2)
        return unseeing + (self.scale + 1) * (seeing - unseeing)

    def keep(self, rows: list[int], width: int) -> None:
        """Both halves of the kept rows go on."""
        self.inner.keep(rows + [row + self.count for row in rows], width)


@dataclass
class Shifted(Wrapper):
    """For models whose logits at a position predict the next token: position i is read from i - 1."""

    def logits(self, query: Query) -> Tensor:
        """(P, V)."""
        has_left = query.wanted % query.tokens.shape[1] > 0
        return self.inner.logits(replace(query, wanted=query.wanted - has_left.long()))
