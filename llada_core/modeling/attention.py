"""Attention by blocks (LLaDA2): a query sees the keys of its own block and of the blocks before it.

On a CPU one call a block of queries, on a GPU FlexAttention where much is fed: no tensor here grows with the square of the
length. Shape letters: the legend in `predictor`; Q tiles of queries, S tiles of keys.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

TILE = 128  # of FlexAttention: positions that are computed, or left out, together


@dataclass(frozen=True)
class BlockCausal:
    """Blocks of `length` positions, counted from position 0 of a row: 1 is the causal model, a whole row the bidirectional.

    copies: a row is fed twice, a noisy copy and behind it the clean one. A noisy token sees its own block of the noisy
    copy and earlier blocks of the clean one; a clean token sees the clean copy, block-causally (BD3-LM, arXiv:2503.09573).
    documents: the mask (B, W) numbers documents, and a token sees only those of its own number.
    """

    length: int
    copies: bool = False
    documents: bool = False

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"block length {self.length} is not 1 or more")


@dataclass(frozen=True)
class Spans:
    """Which keys each query of one forward sees. R is B, or 1 where all rows are alike.

    `query` (R, W) and `key` (R, T): their blocks; `visible` (B, T) bool or None where nothing is hidden; `ordered`:
    whether queries and keys are the positions from 0 on, so that the host knows what every block sees; `documents` (B, W)
    int64 or None: the number of each position's document.
    """

    pattern: BlockCausal
    query: Tensor
    key: Tensor
    visible: Tensor | None
    ordered: bool
    documents: Tensor | None = None

    @classmethod
    def of(
        cls,
        pattern: BlockCausal,
        width: int,
        device: torch.device,
        mask: Tensor | None,
        at: Tensor | None,
        keys: int | None,
    ) -> "Spans":
        """Of `width` tokens at positions `at` (B, W), or from 0 on; `keys`: of a cache, if there is one.

        `mask` (B, T) is 1 at keys that may be seen, or the number of each one's document.
        """
        if mask is not None and mask.dim() != 2:
            raise ValueError(f"attention by blocks takes a mask (B, T), not one of {mask.dim()} dimensions")
        if pattern.copies and (width % 2 or at is not None or keys is not None):
            raise ValueError("a noisy and a clean copy are of one length, from position 0 on and without a cache")
        if pattern.documents and (mask is None or at is not None or keys is not None):
            raise ValueError(
                "documents are told apart by a mask of their numbers, from position 0 on and without a cache"
            )
        # Both copies are at the positions of one row: a block's number is the same in the noisy and in the clean one.
        half = torch.arange(width // 2 if pattern.copies else width, device=device)
        fed = half.repeat(2)[None] if pattern.copies else half[None] if at is None else at
        held = fed if keys is None else torch.arange(keys, device=device)[None]
        if pattern.documents:
            return cls(pattern, fed // pattern.length, held // pattern.length, None, True, mask)
        # On a CPU a mask of ones is found out, for kernels without one are faster; on a GPU asking would stall the stream.
        hidden = mask is not None and not (_free_to_ask(mask) and bool(mask.all()))
        visible = mask.bool() if mask is not None and hidden else None
        return cls(pattern, fed // pattern.length, held // pattern.length, visible, ordered=at is None)

    def on(self, device: torch.device) -> "Spans":
        """These, moved."""
        visible = None if self.visible is None else self.visible.to(device)
        documents = None if self.documents is None else self.documents.to(device)
        return Spans(self.pattern, self.query.to(device), self.key.to(device), visible, self.ordered, documents)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, N, W, H) of queries (B, N, W, H) over keys and values (B, N_kv, T, H)."""
        # FlexAttention knows no float64, and for a window of a block or two one call of a plain kernel is cheaper than its tiles.
        tiled = q.device.type == "cuda" and q.dtype != torch.float64 and q.shape[2] > 2 * self.pattern.length
        return self.by_tiles(q, k, v) if tiled else self.by_blocks(q, k, v)

    def by_blocks(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As `attend`, one call of torch's attention a block of queries."""
        parts = []
        # Each piece is a call of its own: keys that a block cannot see are left out, not masked, and no table of W by T is made.
        for queries, keys in self._pieces():
            near_k, near_v = (
                x[:, :, keys[0]] if len(keys) == 1 else torch.cat([x[:, :, s] for s in keys], 2) for x in (k, v)
            )
            bias = self._bias(queries, keys, q.dtype)
            grouped = q.shape[1] != k.shape[1]
            y_BNQH = F.scaled_dot_product_attention(
                q[:, :, queries], near_k, near_v, attn_mask=bias, enable_gqa=grouped
            )
            parts.append(y_BNQH.transpose(1, 2))
        # Joined as (B, W, N, H): what comes next wants a token's heads beside each other, and would copy once more.
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).transpose(1, 2)

    def _pieces(self) -> Iterator[tuple[slice, list[slice]]]:
        """A block of queries and the stretches of keys that hold all it sees, in turn."""
        step, width, held = self.pattern.length, self.query.shape[1], self.key.shape[1]
        half = width // 2 if self.pattern.copies else width
        # Noisy queries first, in the order in which they are fed; their own block lies in one copy, what is before in the other.
        if self.pattern.copies:
            for first in range(0, half, step):
                own, before = slice(first, min(first + step, half)), slice(half, half + first)
                yield own, [own, before] if first else [own]
        for first in range(0, half, step):
            last = min(first + step, half)
            if self.pattern.copies:
                yield slice(half + first, half + last), [slice(half, half + last)]
            elif self.ordered:
                yield slice(first, last), [slice(0, last)]
            else:  # where the host may ask, what comes after the last block is left out
                seen = self._reach(slice(first, last)) if _free_to_ask(self.key) else held
                yield slice(first, last), [slice(0, seen)]

    def _reach(self, queries: slice) -> int:
        return int((self.key <= self.query[:, queries].amax()).sum(1).amax()) if self._in_order else self.key.shape[1]

    @cached_property
    def _in_order(self) -> bool:
        """Whether keys lie in the order of their blocks, as those of a cache do."""
        return bool((self.key.diff(dim=1) >= 0).all())

    def _bias(self, queries: slice, keys: list[slice], dtype: torch.dtype) -> Tensor | None:
        """What hides keys of a piece, (B or 1, 1, queries or 1, keys); None where nothing is hidden. At most a block high.

        The dtype's minimum, not -inf: a query that sees nothing, which is padding, stays finite.
        """
        seen = None if self.visible is None else torch.cat([self.visible[:, s] for s in keys], 1)[:, None, None]
        # In order, a piece ends where its block does, so that nothing in it is too late; elsewhere a comparison says what is.
        if not self.ordered:
            blocks = self.key[:, None, None, keys[0]] <= self.query[:, None, queries, None]
            seen = blocks if seen is None else seen & blocks
        # A number stands for each document, so that one comparison hides all the others.
        if self.documents is not None:
            of_keys = torch.cat([self.documents[:, s] for s in keys], 1)
            seen = self.documents[:, None, queries, None] == of_keys[:, None, None]
        if seen is None or (_free_to_ask(seen) and bool(seen.all())):
            return None
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)

    def by_tiles(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As `attend`, by FlexAttention, which leaves out the tiles in which nothing is seen."""
        attend: Any = _compiled() if q.device.type == "cuda" else flex_attention
        found: Tensor = attend(q, k, v, block_mask=self.tiles, enable_gqa=q.shape[1] != k.shape[1])
        return found

    @cached_property
    def tiles(self) -> BlockMask:
        """What FlexAttention is told; from the blocks at the edges of each tile, never from a table of W by T."""
        # A tile is left out only where no pair in it is seen, and computed without asking only where all are: both follow from
        # the least and greatest block of its queries and keys, in time and memory that grow with the number of tiles.
        clean_q, clean_k = self._clean(self.query), self._clean(self.key)
        # A clean key is seen where its block is below a query's limit, a noisy one where it is the query's own.
        limit = self.query + clean_q
        low_limit, high_limit = _edges(limit, torch.ones_like(clean_q))
        low_own, high_own = _edges(self.query, ~clean_q)
        low_clean, high_clean = _edges(self.key, clean_k)
        low_noisy, high_noisy = _edges(self.key, ~clean_k)
        some = low_clean[:, None] < high_limit[..., None]
        some |= (low_noisy[:, None] <= high_own[..., None]) & (high_noisy[:, None] >= low_own[..., None])
        whole = (high_clean[:, None] < low_limit[..., None]) & _complete(clean_k)[:, None]
        if self.visible is not None:
            whole = whole & _complete(self.visible)[:, None]
            some = some.expand(whole.shape)
        if self.documents is not None:  # tiles of a number in common; whole where there is no other
            low, high = _edges(self.documents, torch.ones_like(clean_q))
            some = some & (low[:, None] <= high[..., None]) & (high[:, None] >= low[..., None])
            whole = whole & some & (low[:, None] == high[..., None]) & (high[:, None] == low[..., None])
        # Told twice, a tile would be counted twice in the softmax.
        partial = some & ~whole
        return BlockMask.from_kv_blocks(
            *_listed(partial[:, None]),
            *_listed(whole[:, None]),
            BLOCK_SIZE=TILE,
            mask_mod=self._seen(limit, clean_q, clean_k),
            seq_lengths=(self.query.shape[1], self.key.shape[1]),
        )

    def _clean(self, blocks: Tensor) -> Tensor:
        """(1, W) bool: not of a noisy copy."""
        clean = torch.ones_like(blocks[:1], dtype=torch.bool)
        if self.pattern.copies:
            clean[:, : clean.shape[1] // 2] = False
        return clean

    def _seen(self, limit: Tensor, clean_q: Tensor, clean_k: Tensor) -> Callable[..., Tensor]:
        # Local names and no branch on tensors: FlexAttention traces this function into its kernel.
        query, key, visible, documents = self.query, self.key, self.visible, self.documents
        query_rows, key_rows = len(query) > 1, len(key) > 1

        def seen(b: Tensor, _: Tensor, i: Tensor, j: Tensor) -> Tensor:
            of_q, of_k = (b if query_rows else 0), (b if key_rows else 0)
            below = clean_k[0, j] & (key[of_k, j] < limit[of_q, i])
            own = ~clean_k[0, j] & ~clean_q[0, i] & (key[of_k, j] == query[of_q, i])
            near = below | own
            if documents is not None:
                return near & (documents[b, i] == documents[b, j])
            return near if visible is None else near & visible[b, j]

        return seen


def _free_to_ask(x: Tensor) -> bool:
    """Whether the host may read a tensor: a GPU would have to be waited for, and a compiled call has no values yet."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


@functools.cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=True)


def _edges(values: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the greatest of each tile of `values` (R, W), of those that count (1, W): two of (R, Q)."""
    far, short = torch.iinfo(values.dtype).max, -values.shape[1] % TILE
    low = F.pad(values.masked_fill(~counts, far), (0, short), value=far).unflatten(1, (-1, TILE)).amin(2)
    high = F.pad(values.masked_fill(~counts, -1), (0, short), value=-1).unflatten(1, (-1, TILE)).amax(2)
    return low, high


def _complete(flags: Tensor) -> Tensor:
    """(R, S) bool: tiles of `flags` (R, T) in which every position is there and set."""
    return F.pad(flags, (0, -flags.shape[1] % TILE), value=False).unflatten(1, (-1, TILE)).all(2)


def _listed(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Of (R, 1, Q, S) bool: how many key tiles each query tile has, (R, 1, Q), and which, (R, 1, Q, S), those first."""
    # Stable, so that tiles stay in the order of their positions and sums of equal calls are equal. Booleans cannot be sorted.
    order = tiles.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return tiles.sum(-1, dtype=torch.int32), order.to(torch.int32)
