"""How logits are got: plain, guided, shifted, or from a cache. Knows the mask predictor's call, and not what is done
with the logits.

Shapes: B rows, L canvas positions, W positions fed, V vocabulary.
"""

from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from llada_core.modeling.predictor import KVCache, MaskPredictor
from llada_core.sampling.canvas import Blocks, Canvas
from llada_core.sampling.params import SamplingParams


@dataclass(frozen=True)
class Query:
    """What one step asks. A active rows, T columns, P asked-for positions.

    `tokens` (A, T); `visible` (A, T) bool or None; `known` (A, T) bool, hidden from an unguided forward; `wanted` (P,)
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
        seen = canvas.tokens, canvas.visible, canvas.known
        return cls(*seen, wanted, canvas.mask_id, blocks.first, blocks.firsts, blocks.entered)

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
class PlainDenoiser:
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
class GuidedDenoiser(Wrapper):
    """Classifier-free guidance (LLaDA, appendix A): blind + (scale + 1) * (seeing - blind), in float32."""

    scale: float
    count: int = field(default=0, init=False)

    def logits(self, query: Query) -> Tensor:
        """(P, V)."""
        self.count = len(query.tokens)
        blind = query.tokens.masked_fill(query.known, query.mask_id)
        # Seeing and blind rows share one forward: half the calls, and a cache within keeps the two apart by row.
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
        # At scale 0 this is the seeing row, and not the blind one: LLaDA's scale is one less than the usual weight.
        return unseeing + (self.scale + 1) * (seeing - unseeing)

    def keep(self, rows: list[int], width: int) -> None:
        """Both halves of the kept rows go on."""
        self.inner.keep(rows + [row + self.count for row in rows], width)


@dataclass
class ShiftedDenoiser(Wrapper):
    """For models whose logits at a position predict the next token: position i is read from i - 1."""

    def logits(self, query: Query) -> Tensor:
        """(P, V)."""
        # The first position has nothing to its left and is read from itself, as the training loss does.
        has_left = query.wanted % query.tokens.shape[1] > 0
        return self.inner.logits(replace(query, wanted=query.wanted - has_left.long()))


@dataclass(frozen=True)
class CacheWindow:
    """Which positions a step feeds: the block and all that follows ("prefix", Fast-dLLM's prefix cache), or the block
    with `margin` positions each side ("dual", its dual cache; dInfer's vicinity refresh). A refresh feeds all, on
    entering a block and after `every` steps.
    """

    kind: Literal["prefix", "dual"]
    block_length: int
    margin: int = 0
    every: int | None = None

    def slots(self, query: Query) -> tuple[Tensor, Tensor]:
        """(A, W) canvas positions and (A,) the first of them; a window past the canvas repeats the canvas's edge."""
        canvas_width = query.tokens.shape[1]
        if self.kind == "prefix":  # rows are at blocks of their own: one width for all, as the earliest one needs it
            start, width = query.first, canvas_width - min(query.firsts)
        else:
            start, width = query.first - self.margin, min(self.block_length, canvas_width) + 2 * self.margin
        slots = start[:, None] + torch.arange(width, device=start.device)
        return slots.clamp(0, canvas_width - 1), start


@dataclass
class CachedDenoiser:
    """Feeds a window and attends to cached keys and values elsewhere: approximate, as every position of LLaDA sees every
    other, while what is cached was computed on an older canvas.

    A row's keys and values are made anew when it enters a block, whatever the other rows of its batch are doing: where
    rows are at different points, one forward feeds the windows and a second one refreshes the rows that need it.
    """

    model: MaskPredictor
    window: CacheWindow
    forwards: int = field(default=0, init=False)
    fed: int = field(default=0, init=False)
    cache: KVCache | None = field(default=None, init=False)
    age: list[int] = field(default_factory=list, init=False)

    def logits(self, query: Query) -> Tensor:
        """(P, V)."""
        every = self.window.every
        if self.cache is None:
            self.cache = self.model.new_cache(*query.tokens.shape)
            self.age = [0] * len(query.tokens)
        # Which rows are stale is kept on the host, so that choosing the kind of forward waits for no device.
        stale = [new or age == every for new, age in zip(query.fresh, self.age, strict=True)]
        self.age = [1 if old else age + 1 for old, age in zip(stale, self.age, strict=True)]
        if all(stale):
            return self.forward_full(query, self.cache)
        if not any(stale):
            return self.forward_window(query, query.wanted, self.cache)
        return self.forward_mixed(query, torch.tensor(stale, device=query.tokens.device), self.cache)

    def forward_full(self, query: Query, cache: KVCache) -> Tensor:
        """(P, V) from one forward over whole canvases, which fills `cache`: exact."""
        self.forwards += 1
        self.fed += query.tokens.numel()
        return self.model(query.tokens, query.visible, positions=query.wanted, cache=cache).logits

    def forward_window(self, query: Query, wanted: Tensor, cache: KVCache) -> Tensor:
        """(len(wanted), V) from one forward over the windows of all rows, which attends to `cache` everywhere else."""
        slots, start = self.window.slots(query)
        self.forwards += 1
        self.fed += slots.numel()
        # From positions on the flattened canvas (A, T) to positions in the flattened windows (A, W).
        row, column = wanted // query.tokens.shape[1], wanted % query.tokens.shape[1]
        positions = row * slots.shape[1] + column - start[row]
        tokens = query.tokens.gather(1, slots)
        return self.model(tokens, query.visible, positions=positions, cache=cache, slots=slots).logits

    def forward_mixed(self, query: Query, stale: Tensor, cache: KVCache) -> Tensor:
        """(P, V) where some rows are `stale` (A,) bool: two forwards, each row read from the one that it would have had
        alone, so that an answer does not depend on its neighbours.

        The first feeds the windows of all rows (those of the stale ones for nothing, as to leave them out would copy the
        cache); the second feeds the stale rows whole and into a cache of their own, which then takes their place.
        """
        width = query.tokens.shape[1]
        row = query.wanted // width
        of_stale = stale[row]
        from_windows = self.forward_window(query, query.wanted[~of_stale], cache)

        rows = stale.nonzero()[:, 0]
        # The number of each stale row among the stale ones, where its positions are asked for in the smaller batch.
        rank = torch.zeros_like(stale, dtype=torch.long)
        rank = rank.index_copy(0, rows, torch.arange(len(rows), device=rows.device))
        wanted = rank[row[of_stale]] * width + query.wanted[of_stale] % width
        anew = self.model.new_cache(len(rows), width)
        from_canvases = self.forward_full(query.subset(rows, wanted), anew)
        cache.replace(rows, anew)

        result = from_canvases.new_empty(len(row), from_canvases.shape[-1])
        result[of_stale], result[~of_stale] = from_canvases, from_windows
        return result

    def keep(self, rows: list[int], width: int) -> None:
        """The cached rows that go on, without the columns that no row has any more."""
        if self.cache is not None:
            self.cache = self.cache.rows(torch.tensor(rows, device=self.cache.keys[0].device), width)
        self.age = [self.age[row] for row in rows]


def denoiser_of(model: MaskPredictor, params: SamplingParams) -> Denoiser:
    """The denoiser that `params` name."""
    denoiser: Denoiser
    if params.cache == "none":
        denoiser = PlainDenoiser(model)
    elif model.supports_cache:
        window = CacheWindow(params.cache, params.block_length, params.cache_window, params.cache_refresh)
        denoiser = CachedDenoiser(model, window)
    else:
        raise ValueError(
            f"{type(model).__name__} keeps no keys and values for cache {params.cache!r}; set cache 'none'"
        )
    if params.cfg_scale:
        denoiser = GuidedDenoiser(denoiser, params.cfg_scale)
    return ShiftedDenoiser(denoiser) if params.right_shift_logits else denoiser
