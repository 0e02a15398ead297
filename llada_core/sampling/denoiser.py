"""How logits are got: plainly, guided, shifted, or from a cache.

Shapes: A active rows, T columns, P asked-for positions, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from llada_core.modeling.predictor import MaskPredictor
from llada_core.sampling.cached import BlockDenoiser, CachedDenoiser, CacheWindow
from llada_core.sampling.params import SamplingParams
from llada_core.sampling.query import Denoiser, Look, Query, columns


@dataclass
class PlainDenoiser:
    """One forward over the whole canvas, the vocabulary projection only at the asked-for positions: exact.

    `block`: columns of a block, behind which a row's canvas is not there yet (`variable_length`); None: all of it is.
    """

    model: MaskPredictor
    block: int | None = None
    forwards: int = field(default=0, init=False)
    fed: int = field(default=0, init=False)

    @property
    def written(self) -> list[Tensor]:
        """Nothing."""
        return []

    def logits(self, query: Query) -> Tensor:
        """(P, V)."""
        rows, length = query.tokens.shape
        ends = self._ends(query.firsts, length)
        self._count(rows, max(ends))
        # Rows that end together need no mask, without which the fastest kernels of attention can be had.
        return self._fed(query, max(ends), masked=min(ends) < max(ends))

    def ask(self, query: Query, look: Look) -> Tensor:
        """(P, V), uncounted."""
        return self._fed(query, look.width or query.tokens.shape[1], masked=self.block is not None)

    def plan(self, fresh: Sequence[bool | None], firsts: list[int], shape: torch.Size) -> Look:
        """The whole canvas, or as far as the furthest block of a row that writes, rounded up to one of a few widths."""
        rows, length = shape
        if self.block is None:
            self._count(rows, length)
            return Look()
        writing = [first for first, new in zip(firsts, fresh, strict=True) if new is not None]
        width = min(columns(max(self._ends(writing, length))), length)
        self._count(rows, width)
        return Look(width)

    def _ends(self, firsts: list[int], length: int) -> list[int]:
        """Where each row's canvas ends."""
        return [length if self.block is None else min(first + self.block, length) for first in firsts]

    def _count(self, rows: int, width: int) -> None:
        """A forward over so many positions of so many rows."""
        self.forwards += 1
        self.fed += rows * width

    def _fed(self, query: Query, width: int, *, masked: bool) -> Tensor:
        """(P, V) from the first `width` columns, `masked` behind each row's block."""
        visible, wanted, length = query.visible, query.wanted, query.tokens.shape[1]
        if masked and self.block is not None:
            visible = query.seen(self.block)
        if width == length:
            return self.model(query.tokens, visible, positions=wanted).logits
        seen = None if visible is None else visible[:, :width]
        # From positions on the flattened canvas (A, T) to positions in its first columns (A, W).
        positions = wanted // length * width + wanted % length
        return self.model(query.tokens[:, :width], seen, positions=positions).logits

    def arrange(self, order: list[int], width: int) -> None:
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

    @property
    def written(self) -> list[Tensor]:
        """That of the denoiser within."""
        return self.inner.written

    def plan(self, fresh: Sequence[bool | None], firsts: list[int], shape: torch.Size) -> Look:
        """That of the denoiser within."""
        return self.inner.plan(fresh, firsts, shape)

    def arrange(self, order: list[int], width: int) -> None:
        """Passed on."""
        self.inner.arrange(order, width)


@dataclass
class GrowingDenoiser(Wrapper):
    """Hides from a denoiser with a cache what stands behind each row's block of `block` columns: see `variable_length`."""

    block: int

    def logits(self, query: Query) -> Tensor:
        """(P, V)."""
        return self.inner.logits(replace(query, visible=query.seen(self.block)))

    def ask(self, query: Query, look: Look) -> Tensor:
        """(P, V), uncounted."""
        return self.inner.ask(replace(query, visible=query.seen(self.block)), look)


@dataclass
class GuidedDenoiser(Wrapper):
    """Classifier-free guidance (LLaDA, appendix A): blind + (scale + 1) * (seeing - blind), in float32."""

    scale: float
    count: int = field(default=0, init=False)

    def logits(self, query: Query) -> Tensor:
        """(P, V)."""
        self.count = len(query.tokens)
        return self._guided(self.inner.logits(self._doubled(query)))

    def plan(self, fresh: Sequence[bool | None], firsts: list[int], shape: torch.Size) -> Look:
        """Of both halves."""
        return self.inner.plan([*fresh, *fresh], firsts * 2, torch.Size((2 * shape[0], shape[1])))

    def ask(self, query: Query, look: Look) -> Tensor:
        """(P, V), uncounted."""
        return self._guided(self.inner.ask(self._doubled(query), look))

    @staticmethod
    def _doubled(query: Query) -> Query:
        """Seeing rows, and behind them the same ones blind."""
        # Only what was known from the start is hidden: the blind half too goes on from what has been written.
        blind = query.tokens.masked_fill(query.known, query.mask_id)
        # Seeing and blind rows share one forward: half the calls, and a cache within keeps the two apart by row.
        return replace(
            query,
            tokens=torch.cat([query.tokens, blind]),
            visible=None if query.visible is None else query.visible.repeat(2, 1),
            known=query.known.repeat(2, 1),
            # Positions count through the flattened canvas, where the blind rows come behind all seeing ones.
            wanted=torch.cat([query.wanted, query.wanted + query.tokens.numel()]),
            first=query.first.repeat(2),
            firsts=query.firsts * 2,
            fresh=[*query.fresh, *query.fresh],
            counts=query.counts * 2,
        )

    def _guided(self, logits: Tensor) -> Tensor:
        """(P, V) of the (2P, V) of both halves."""
        # In fp32 first: the difference of two almost equal bf16 numbers is rounding, and is multiplied here.
        seeing, unseeing = logits.float().chunk(2)
        # At scale 0 this is the seeing row, and not the blind one: LLaDA's scale is one less than the usual weight.
        return unseeing + (self.scale + 1) * (seeing - unseeing)

    def arrange(self, order: list[int], width: int) -> None:
        """Both halves alike."""
        # The blind half lies behind the seeing one, and a row's two halves move together.
        self.inner.arrange(order + [row if row < 0 else row + self.count for row in order], width)
        self.count = len(order)


@dataclass
class ShiftedDenoiser(Wrapper):
    """For models whose logits at a position predict the next token: position i is read from i - 1."""

    def logits(self, query: Query) -> Tensor:
        """(P, V)."""
        return self.inner.logits(self._shifted(query))

    def ask(self, query: Query, look: Look) -> Tensor:
        """(P, V), uncounted."""
        return self.inner.ask(self._shifted(query), look)

    @staticmethod
    def _shifted(query: Query) -> Query:
        """What is read one position to the left."""
        # The first position has nothing to its left and is read from itself, as the training loss does.
        has_left = query.wanted % query.tokens.shape[1] > 0
        return replace(query, wanted=query.wanted - has_left.long())


def denoiser_of(model: MaskPredictor, params: SamplingParams) -> Denoiser:
    """The denoiser that `params` name."""
    denoiser: Denoiser
    if params.right_shift_logits and model.shifted:
        raise ValueError(
            "right_shift_logits: this model moves its predictions to their own places itself; leave it out"
        )
    # Asked first: its cache is exact, and of another kind than one for a model that sees everything.
    if model.block_length is not None:
        _require_block_settings(params)
        denoiser = BlockDenoiser(model, params.block_length, cached=params.cache == "prefix")
    elif params.cache == "none":
        denoiser = PlainDenoiser(model, params.block_length if params.variable_length else None)
    elif model.supports_cache:
        # Where nothing stands behind the block, a prefix cache's windows are the blocks alone, as a dual one's.
        kind = "dual" if params.variable_length else params.cache
        window = CacheWindow(kind, params.block_length, params.cache_window, params.cache_refresh)
        denoiser = CachedDenoiser(model, window)
        if params.variable_length:
            denoiser = GrowingDenoiser(denoiser, params.block_length)
    else:
        raise ValueError(
            f"{type(model).__name__} keeps no keys and values for cache {params.cache!r}; set cache 'none'"
        )
    if params.cfg_scale:
        # Guidance inside of the shift: both halves are read from the same neighbour.
        denoiser = GuidedDenoiser(denoiser, params.cfg_scale)
    return ShiftedDenoiser(denoiser) if params.right_shift_logits else denoiser


def _require_block_settings(params: SamplingParams) -> None:
    """A model that attends by blocks sees nothing after its block, and its cache never ages."""
    if params.cache == "dual":
        raise ValueError("cache 'dual' keeps what follows the block, which this model never sees; set cache 'prefix'")
    if params.cache_refresh is not None:
        raise ValueError(f"cache_refresh {params.cache_refresh}: this model's cache is exact; leave cache_refresh out")
    if params.right_shift_logits:
        raise ValueError("right_shift_logits reads the position before a block, which is not fed again; leave it out")
