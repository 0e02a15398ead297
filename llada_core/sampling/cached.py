"""A denoiser that keeps keys and values between steps: approximate, as every position of LLaDA sees every other.

Knows the mask predictor's cache and which positions a step feeds; does not know what is done with the logits. A row's
keys and values are made anew when it enters a block, whatever the other rows of its batch are doing.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from llada_core.modeling.cache import KVCache
from llada_core.modeling.predictor import MaskPredictor
from llada_core.sampling.denoiser import Denoiser, Guided, Plain, Query, Shifted
from llada_core.sampling.params import SamplingParams


@dataclass(frozen=True)
class Window:
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
        if self.kind == "prefix":
            start, width = query.first, canvas_width - min(query.firsts)
        else:
            start, width = query.first - self.margin, min(self.block_length, canvas_width) + 2 * self.margin
        slots = start[:, None] + torch.arange(width, device=start.device)
        return slots.clamp(0, canvas_width - 1), start


@dataclass
class Cached:
    """Feeds a window and attends to cached keys and values elsewhere.

    Where rows are at different points, one forward feeds all windows and a second one refreshes the rows that need it.
    """

    model: MaskPredictor
    window: Window
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
        stale = [new or age == every for new, age in zip(query.fresh, self.age, strict=True)]
        self.age = [1 if old else age + 1 for old, age in zip(stale, self.age, strict=True)]
        if all(stale):
            return self._look(query, self.cache)
        if not any(stale):
            return self._glance(query, query.wanted, self.cache)
        return self._mixed(query, torch.tensor(stale, device=query.tokens.device), self.cache)

    def _look(self, query: Query, cache: KVCache) -> Tensor:
        self.forwards += 1
        self.fed += query.tokens.numel()
        return self.model(query.tokens, query.visible, positions=query.wanted, cache=cache).logits

    def _glance(self, query: Query, wanted: Tensor, cache: KVCache) -> Tensor:
        slots, start = self.window.slots(query)
        self.forwards += 1
        self.fed += slots.numel()
        row, column = wanted // query.tokens.shape[1], wanted % query.tokens.shape[1]
        positions = row * slots.shape[1] + column - start[row]
        tokens = query.tokens.gather(1, slots)
        return self.model(tokens, query.visible, positions=positions, cache=cache, slots=slots).logits

    def _mixed(self, query: Query, stale: Tensor, cache: KVCache) -> Tensor:
        width = query.tokens.shape[1]
        row = query.wanted // width
        of_stale = stale[row]
        seen = self._glance(query, query.wanted[~of_stale], cache)
        rows = stale.nonzero()[:, 0]
        rank = torch.zeros_like(stale, dtype=torch.long).index_copy(
            0, rows, torch.arange(len(rows), device=rows.device)
        )
        wanted = rank[row[of_stale]] * width + query.wanted[of_stale] % width
        anew = self.model.new_cache(len(rows), width)
        looked = self._look(query.subset(rows, wanted), anew)
        cache.replace(rows, anew)
        result = looked.new_empty(len(row), looked.shape[-1])
        result[of_stale], result[~of_stale] = looked, seen
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
        denoiser = Plain(model)
    elif model.supports_cache:
        window = Window(params.cache, params.block_length, params.cache_window, params.cache_refresh)
        denoiser = Cached(model, window)
    else:
        raise ValueError(
            f"{type(model).__name__} keeps no keys and values for cache {params.cache!r}; set cache 'none'"
        )
    if params.cfg_scale:
        denoiser = Guided(denoiser, params.cfg_scale)
    return Shifted(denoiser) if params.right_shift_logits else denoiser
