"""How logits are got: a plain look at the canvas or one guided away from the prompt-less answer.

Knows the mask predictor's call; does not know confidences, quotas or what is done with the logits.
"""

from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from llada_core.config.sampling import SamplingParams
from llada_core.modeling.predictor import MaskPredictor
from llada_core.sampling.canvas import Blocks, Canvas


@dataclass(frozen=True)
class Query:
    """What one step asks. A active rows, T columns, P asked-for positions.

    `tokens` (A, T); `visible` (A, T) bool or None; `known` (A, T) bool; `wanted` (P,) indices into the A*T flattened
    positions; `first`, `last` (A,) bounds of each row's block, `last` excluded;
    `fresh`, one bool per row: it has just entered its block.
    """

    tokens: Tensor
    visible: Tensor | None
    known: Tensor
    wanted: Tensor
    mask_id: int
    first: Tensor
    last: Tensor
    fresh: list[bool]

    @classmethod
    def of(cls, canvas: Canvas, blocks: Blocks, wanted: Tensor, fresh: list[bool]) -> "Query":
        """Asks about `wanted` positions of a canvas."""
        return cls(
            canvas.tokens, canvas.visible, canvas.known, wanted, canvas.mask_id, blocks.first, blocks.last, fresh
        )


class Denoiser(Protocol):
    """Canvas -> logits where asked."""

    forwards: int

    def logits(self, query: Query) -> Tensor:
        """(P, V) logits of `query.wanted`."""

    def keep(self, rows: Tensor) -> None:
        """Only these of the active rows go on; (A',) int64."""


@dataclass
class Plain:
    """One forward over the whole canvas, the vocabulary projection only at the asked-for positions: exact."""

    model: MaskPredictor
    forwards: int = field(default=0, init=False)

    def logits(self, query: Query) -> Tensor:
        """(P, V)."""
        self.forwards += 1
        return self.model(query.tokens, query.visible, positions=query.wanted).logits

    def keep(self, rows: Tensor) -> None:
        """Nothing is remembered from step to step."""


@dataclass
class Guided:
    """Classifier-free guidance (LLaDA, appendix A.1): blind + (scale + 1) * (seeing - blind), in float32."""

    inner: Denoiser
    scale: float

    @property
    def forwards(self) -> int:
        """Both halves ride in one forward."""
        return self.inner.forwards

    def logits(self, query: Query) -> Tensor:
        """(P, V)."""
        blind = query.tokens.masked_fill(query.known, query.mask_id)

        def twice(x: Tensor) -> Tensor:
            return torch.cat([x, x])

        doubled = replace(
            query,
            tokens=torch.cat([query.tokens, blind]),
            visible=None if query.visible is None else twice(query.visible),
            known=twice(query.known),
            wanted=torch.cat([query.wanted, query.wanted + query.tokens.numel()]),
            first=twice(query.first),
            last=twice(query.last),
            fresh=query.fresh * 2,
        )
        self.count = query.tokens.shape[0]
        seeing, unseeing = self.inner.logits(doubled).float().chunk(2)
        return unseeing + (self.scale + 1) * (seeing - unseeing)

    def keep(self, rows: Tensor) -> None:
        """Both halves of the kept rows go on."""
        self.inner.keep(torch.cat([rows, rows + self.count]))


@dataclass
class Shifted:
    """For models whose logits at a position predict the next token: position i is read from i - 1."""

    inner: Denoiser

    @property
    def forwards(self) -> int:
        """Those of the denoiser that is read."""
        return self.inner.forwards

    def logits(self, query: Query) -> Tensor:
        """(P, V)."""
        has_left = query.wanted % query.tokens.shape[1] > 0
        return self.inner.logits(replace(query, wanted=query.wanted - has_left.long()))

    def keep(self, rows: Tensor) -> None:
        """Passed on."""
        self.inner.keep(rows)


def denoiser_of(model: MaskPredictor, params: SamplingParams, canvas: Canvas) -> Denoiser:
    """The denoiser that `params` name for the rows of `canvas`."""
    denoiser: Denoiser = Plain(model)
    if params.cfg_scale:
        denoiser = Guided(denoiser, params.cfg_scale)
    return Shifted(denoiser) if params.right_shift_logits else denoiser
