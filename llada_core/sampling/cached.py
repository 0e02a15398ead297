"""Denoisers that keep keys and values: approximate for a model whose positions see each other, exact for one that attends
by blocks.

Shapes: A active rows, T columns, W positions fed of each row, P asked-for positions, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from llada_core.modeling.attention import BlockCausal
from llada_core.modeling.predictor import KVCache, MaskPredictor
from llada_core.sampling.query import Look, Query, columns, on_device, seats


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

    def width(self, columns: int, firsts: list[int]) -> int:
        """How many of `columns` positions a step feeds of each row; rows are at blocks of their own, at `firsts`."""
        # A dual window is as wide as a block wherever its row is, so that rows at any blocks share a forward.
        if self.kind == "prefix":  # one width for all, as the earliest one needs it
            return columns - min(firsts)
        return min(self.block_length, columns) + 2 * self.margin

    def slots(self, query: Query, width: int) -> tuple[Tensor, Tensor]:
        """(A, W) canvas positions and (A,) the first of them; a window past the canvas repeats the canvas's edge."""
        start = query.first - (self.margin if self.kind == "dual" else 0)
        slots = start[:, None] + torch.arange(width, device=start.device)
        return slots.clamp(0, query.tokens.shape[1] - 1), start


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

    @property
    def written(self) -> list[Tensor]:
        """The cache."""
        return [] if self.cache is None else self.cache.keys + self.cache.values

    def logits(self, query: Query) -> Tensor:
        """(P, V)."""
        stale = self._grown_older(query.fresh, query.tokens.shape)
        if any(stale) and not all(stale):
            return self.forward_mixed(query, stale)
        if stale[0]:
            self._count(*query.tokens.shape)
            return self.ask_all(query)
        width = self.window.width(query.tokens.shape[1], query.firsts)
        self._count(len(stale), width)
        return self.ask_windows(query, width)

    def plan(self, fresh: Sequence[bool | None], firsts: list[int], shape: torch.Size) -> Look:
        """Whole canvases, windows, or windows and the canvases of the rows that are stale."""
        stale, (rows, length) = self._grown_older(fresh, shape), shape
        apart = [row for row, old in enumerate(stale) if old]
        width = None
        if len(apart) < rows:
            # Of rows that write something; and of a prefix cache, whose windows have many widths, one of a few.
            width = self.window.width(length, [n for n, new in zip(firsts, fresh, strict=True) if new is not None])
            width = min(columns(width), length) if self.window.kind == "prefix" else width
        self._count(rows, width or length)
        if width is None or not apart:
            return Look(width)
        named = _few(apart)
        self._count(len(named), length)
        return Look(width, apart=on_device(named, self.model.device))

    def ask(self, query: Query, look: Look) -> Tensor:
        """(P, V), uncounted."""
        if look.width is None:
            return self.ask_all(query)
        near = self.ask_windows(query, look.width)
        if look.apart is None:
            return near
        assert self.cache is not None
        anew = self.model.new_cache(len(look.apart), query.tokens.shape[1])
        far = self.ask_all(_apart(query, look.apart), anew)
        self.cache.replace(look.apart, anew)
        return _put_in(near, far, look.apart, len(query.tokens))

    def _stale(self, fresh: Sequence[bool | None]) -> list[bool]:
        """Which rows are fed whole: known to the host, so that choosing the kind of forward waits for no device.

        Rows that write nothing are fed as most suits the others.
        """
        ages = self.age or [0] * len(fresh)
        found = [None if new is None else new or age == self.window.every for new, age in zip(fresh, ages, strict=True)]
        idle = False not in found
        return [idle if stale is None else stale for stale in found]

    def _grown_older(self, fresh: Sequence[bool | None], shape: torch.Size) -> list[bool]:
        """Which rows are stale in the step that is taken now."""
        if self.cache is None:
            self.cache = self.model.new_cache(*shape)
        stale = self._stale(fresh)
        # A refresh is itself the first step on what it filled.
        self.age = [1 if old else age + 1 for old, age in zip(stale, self.age or [0] * len(fresh), strict=True)]
        return stale

    def _count(self, rows: int, width: int) -> None:
        """A forward over so many positions of so many rows."""
        self.forwards += 1
        self.fed += rows * width

    def ask_all(self, query: Query, cache: KVCache | None = None) -> Tensor:
        """(P, V) from one forward over whole canvases, which fills `cache`: exact. Uncounted."""
        kept = self.cache if cache is None else cache
        return self.model(query.tokens, query.visible, positions=query.wanted, cache=kept).logits

    def ask_windows(self, query: Query, fed: int) -> Tensor:
        """(P, V) from one forward over windows of `fed` positions of all rows, which attends to the cache everywhere else. Uncounted."""
        # Equal entries at the canvas's edge write equal keys, so that it does not matter which of them comes last.
        slots, start = self.window.slots(query, fed)
        # From positions on the flattened canvas (A, T) to positions in the flattened windows (A, W).
        row, column = query.wanted // query.tokens.shape[1], query.wanted % query.tokens.shape[1]
        positions = row * slots.shape[1] + column - start[row]
        tokens = query.tokens.gather(1, slots)
        return self.model(tokens, query.visible, positions=positions, cache=self.cache, slots=slots).logits

    def forward_mixed(self, query: Query, stale: list[bool]) -> Tensor:
        """(P, V) where some rows are `stale` (A,): two forwards.

        The first feeds the windows of all rows (those of the stale ones for nothing, as to leave them out would copy the
        cache); the second feeds the stale rows whole and into a cache of their own, which then takes their place.
        """
        width, count = query.tokens.shape[1], sum(stale)
        # Stale rows are fed whole into a cache of their own: the network writes and reads caches of the rows it is fed.
        anew = self.model.new_cache(count, width)
        fed = self.window.width(width, query.firsts)
        self._count(len(stale), fed)
        self._count(count, width)
        windows = partial(self.ask_windows, fed=fed)
        result, rows = _in_two(query, stale, windows, lambda some: self.ask_all(some, anew))
        assert self.cache is not None
        self.cache.replace(rows, anew)
        return result

    def arrange(self, order: list[int], width: int) -> None:
        """Rows that keep their place stay where they are, the others move, and new ones are stale: until such a row is
        first fed, which is whole, any other's keys may stand in its place.
        """
        self.age = [0 if row < 0 else self.age[row] for row in order]
        self.cache = _arranged(self.model, self.cache, order, width)  # a new row is first fed whole


@dataclass
class BlockDenoiser:
    """For a model that attends by blocks: what follows the block is not fed, and the blocks before it stay as they are.

    `cached`: each of these is fed once more, together with the block after it, and from then on only its keys and values
    are looked at. Exact either way.
    """

    model: MaskPredictor
    length: int
    cached: bool
    forwards: int = field(default=0, init=False)
    fed: int = field(default=0, init=False)
    cache: KVCache | None = field(default=None, init=False)
    kept: list[int] = field(default_factory=list, init=False)  # of each row, positions whose keys are final

    @property
    def written(self) -> list[Tensor]:
        """The cache."""
        return [] if self.cache is None else self.cache.keys + self.cache.values

    def logits(self, query: Query) -> Tensor:
        """(P, V)."""
        rows, columns = query.tokens.shape
        ends = [min(first + self.length, columns) for first in query.firsts]
        if not self.cached:
            # Behind the furthest block nobody looks, so nothing there is fed.
            self._count(rows, max(ends))
            return self._uncached(query, max(ends))
        self.kept = self.kept or [0] * rows
        if self.cache is None:
            self.cache = self.model.new_cache(rows, columns)
        # A block that is done is fed once more with the one after it, since what was written last is not in its keys yet.
        widths = [end - kept for end, kept in zip(ends, self.kept, strict=True)]
        # Two blocks are the most that a row in the midst of its answer is fed.
        far = [width > 2 * self.length for width in widths]  # new rows with a long prompt
        if any(far) and not all(far):
            near = max(width for width, apart in zip(widths, far, strict=True) if not apart)
            result = self._with_far(query, far, near, max(widths))
        else:
            self._count(rows, max(widths))
            result = self._window(query, on_device(self.kept, query.tokens.device), max(widths), self.cache)
        # What stands before a row's block was fed now with its last tokens: from here on its keys are final.
        self.kept = list(query.firsts)
        return result

    def plan(self, fresh: Sequence[bool | None], firsts: list[int], shape: torch.Size) -> Look:
        """As many positions as the furthest row needs, rounded up to one of a few widths."""
        rows, length = shape
        writing = [row for row, new in enumerate(fresh) if new is not None]
        ends = [min(first + self.length, length) for first in firsts]
        if not self.cached:
            width = min(columns(max(ends[row] for row in writing)), length)
            self._count(rows, width)
            return Look(width)
        kept, self.kept = self.kept or [0] * rows, list(firsts)
        if self.cache is None:
            self.cache = self.model.new_cache(rows, length)
        widths = {row: ends[row] - kept[row] for row in writing}
        apart = [row for row, width in widths.items() if width > 2 * self.length]
        far = min(columns(max(widths[row] for row in apart)), length) if apart else None
        if len(apart) < len(writing):
            # What they are fed with the others is for nothing: it lies where their positions can be asked for.
            kept = [firsts[row] if row in apart else old for row, old in enumerate(kept)]
        start = on_device(kept, self.model.device)
        if len(apart) == len(writing):
            self._count(rows, far or length)
            return Look(far, start)
        blocks = -(-max(width for row, width in widths.items() if row not in apart) // self.length)
        self._count(rows, blocks * self.length)
        if not apart:
            return Look(blocks * self.length, start)
        named = _few(apart)
        self._count(len(named), far or length)
        return Look(blocks * self.length, start, on_device(named, self.model.device), far)

    def ask(self, query: Query, look: Look) -> Tensor:
        """(P, V), uncounted."""
        rows, length = query.tokens.shape
        width = look.width or length
        if not self.cached:
            return self._uncached(query, width)
        assert self.cache is not None
        assert look.start is not None
        near = self._window(query, look.start, width, self.cache)
        if look.apart is None:
            return near
        anew = self.model.new_cache(len(look.apart), length)
        nothing = torch.zeros_like(look.apart)
        far = self._window(_apart(query, look.apart), nothing, look.far or length, anew)
        self.cache.replace(look.apart, anew)
        return _put_in(near, far, look.apart, rows)

    def _count(self, rows: int, width: int) -> None:
        """A forward over so many positions of so many rows."""
        self.forwards += 1
        self.fed += rows * width

    def _uncached(self, query: Query, width: int) -> Tensor:
        """(P, V) from one forward over the first `width` positions."""
        row, column = query.wanted // query.tokens.shape[1], query.wanted % query.tokens.shape[1]
        visible = None if query.visible is None else query.visible[:, :width]
        how = BlockCausal(self.length)
        return self.model(query.tokens[:, :width], visible, positions=row * width + column, block_causal=how).logits

    def _window(self, query: Query, start: Tensor, width: int, cache: KVCache) -> Tensor:
        """(P, V) from one forward over `width` positions of each row from `start` (A,) on, which attends to `cache` before
        them.
        """
        columns = query.tokens.shape[1]
        # Past the canvas a window repeats its edge; past its block it feeds what nobody sees before it is fed again.
        slots = (start[:, None] + torch.arange(width, device=start.device)).clamp(max=columns - 1)
        # From positions on the flattened canvas (A, T) to positions in the flattened windows (A, W).
        row, column = query.wanted // columns, query.wanted % columns
        return self.model(
            query.tokens.gather(1, slots),
            query.visible,
            positions=row * width + column - start[row],
            cache=cache,
            slots=slots,
            block_causal=BlockCausal(self.length),
        ).logits

    def _with_far(self, query: Query, far: list[bool], near: int, width: int) -> Tensor:
        """(P, V) where some rows, `far` (A,), have just come with a long prompt: the others are not fed windows as long."""
        assert self.cache is not None
        count, device = sum(far), query.tokens.device
        kept, cache, anew = on_device(self.kept, device), self.cache, self.model.new_cache(count, query.tokens.shape[1])
        nothing = on_device([0] * count, device)
        self._count(len(far), near)
        self._count(count, width)
        result, rows = _in_two(
            query,
            far,
            lambda every: self._window(every, kept, near, cache),
            lambda some: self._window(some, nothing, width, anew),
        )
        cache.replace(rows, anew)
        return result

    def arrange(self, order: list[int], width: int) -> None:
        """The cached rows that go on; of new ones nothing is kept."""
        self.kept = [0 if row < 0 or not self.kept else self.kept[row] for row in order]
        self.cache = _arranged(self.model, self.cache, order, width)


def _few(rows: list[int]) -> list[int]:
    """These rows, the first one as often as makes their number one of few."""
    return rows + rows[:1] * (seats(len(rows)) - len(rows))


def _apart(query: Query, rows: Tensor) -> Query:
    """The query of `rows` (R,), where every position of every window is asked for."""
    columns = query.tokens.shape[1]
    there = columns * torch.arange(len(rows), device=rows.device)[:, None]
    return query.subset(rows, (query.wanted.view(len(query.tokens), -1)[rows] % columns + there).flatten())


def _put_in(near: Tensor, far: Tensor, rows: Tensor, count: int) -> Tensor:
    """(A*W, V) of all `count` rows, those of `rows` (R,) as they are in `far` (R*W, V). A row named twice is twice the same."""
    width = len(near) // count
    anew = near.unflatten(0, (count, width)).index_copy(0, rows, far.unflatten(0, (len(rows), width)))
    return anew.flatten(0, 1)


def _in_two(
    query: Query, apart: list[bool], first: Callable[[Query], Tensor], second: Callable[[Query], Tensor]
) -> tuple[Tensor, Tensor]:
    """(P, V) from two forwards, and the numbers of the rows that are `apart` (A,), which are read from the `second`.

    Each row is read from the forward that it would have had alone, so that an answer does not depend on its neighbours.
    """
    columns, device = query.tokens.shape[1], query.tokens.device
    # From counts that the host has: a selection by a mask of the device would have to be waited for.
    row_of = [row for row, count in enumerate(query.counts) for _ in range(count)]
    mine, others = (on_device([i for i, r in enumerate(row_of) if apart[r] is kind], device) for kind in (True, False))
    # Of all rows, but read at those alone that are not apart.
    result = first(replace(query, wanted=query.wanted[others]))

    numbers = [row for row, each in enumerate(apart) if each]
    rows, rank = on_device(numbers, device), {row: i for i, row in enumerate(numbers)}
    # The number of each such row among them, where its positions are asked for in the smaller batch.
    ranks = on_device([rank[row] for row in row_of if apart[row]], device)
    from_second = second(query.subset(rows, ranks * columns + query.wanted[mine] % columns))
    whole = from_second.new_empty(len(row_of), from_second.shape[-1])
    return whole.index_copy_(0, mine, from_second).index_copy_(0, others, result), rows


def _arranged(model: MaskPredictor, old: KVCache | None, order: list[int], width: int) -> KVCache | None:
    """The rows of a cache in this order over `width` columns: those that keep their place stay where they are, the others
    move, and any row's keys stand in the place of a new one's (-1).
    """
    if old is None:
        return None
    stays = old.fits(len(order), width)
    moved = [(new, row) for new, row in enumerate(order) if row >= 0 and not (stays and new == row)]
    index = on_device([row for _, row in moved], old.keys[0].device)
    # Taken before anything is written: a row may move to a place that another one leaves in the same step.
    taken = old.rows(index, min(width, old.length)) if moved else None
    cache = old.part(len(order), width) if stays else model.new_cache(len(order), width)
    if taken is not None:
        cache.replace(on_device([new for new, _ in moved], index.device), taken)
    return cache
