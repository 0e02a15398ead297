"""Keys and values of every layer at every canvas position, kept between forward passes.

Knows where rows lie in memory; does not know blocks, prompts, or when a value is too old.
"""

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor


class KVCache:
    """Post-RoPE keys and values, per layer `(B, T, N_kv, H)`, preallocated with zeros and overwritten in place.

    A slot that was never written holds zeros: hide it with the attention mask.
    """

    def __init__(self, keys: list[Tensor], values: list[Tensor]) -> None:
        self.keys, self.values = keys, values

    @classmethod
    def empty(cls, shape: tuple[int, int, int, int], like: Sequence[Tensor]) -> Self:
        """A cache for `shape` = (B, T, N_kv, H), each layer with the dtype and device of its one of `like`."""
        keys, values = ([torch.zeros(shape, dtype=x.dtype, device=x.device) for x in like] for _ in range(2))
        return cls(keys, values)

    @property
    def batch(self) -> int:
        return self.keys[0].shape[0]

    @property
    def length(self) -> int:
        return self.keys[0].shape[1]

    def rows(self, index: Tensor, length: int | None = None) -> "KVCache":
        """A new cache with the batch rows `index` (R,) int64 and the first `length` slots; the old one stays as it is."""
        both = (self.keys, self.values)
        return KVCache(*([x[:, :length].index_select(0, index.to(x.device)) for x in kept] for kept in both))

    def replace(self, index: Tensor, anew: "KVCache") -> None:
        """Puts all rows of `anew` in the place of the batch rows `index` (R,) int64."""
        for old, new in zip(self.keys + self.values, anew.keys + anew.values, strict=True):
            old.index_copy_(0, index.to(old.device), new)

    def write(self, layer: int, flat_slots: Tensor | None, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Stores (B, W, N_kv, H) at `flat_slots` (B*W,) = row * T + slot, or everywhere if None; all T of the layer."""
        keys, values = self.keys[layer], self.values[layer]
        if flat_slots is None:
            keys.copy_(key)
            values.copy_(value)
        else:
            keys.flatten(0, 1).index_copy_(0, flat_slots, key.flatten(0, 1).to(keys.dtype))
            values.flatten(0, 1).index_copy_(0, flat_slots, value.flatten(0, 1).to(values.dtype))
        return keys, values
