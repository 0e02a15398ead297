"""A dense network prepared for inference on a CPU: fewer and larger products, weights kept in oneDNN's own order.

Knows how a block's weights are put together and whether they have changed since; does not know embeddings or files.
Numbers are the modules' own up to rounding. Hooks on the modules inside a block are not called.
"""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llada_core.modeling.block import LLaDABlock, Surroundings
from llada_core.modeling.linear import Linear, plain, prefers_onednn
from llada_core.modeling.rope import rotate


class Product:
    """x (..., I) -> x W^T + b (..., O) with the stacked weights of some linear layers of `owner`, while `current`."""

    def __init__(self, owner: nn.Module, *names: str) -> None:
        self.owner, self.names = owner, names
        layers: list[Any] = [owner.get_submodule(name) for name in names]
        weights, biases = [layer.weight.detach() for layer in layers], [layer.bias for layer in layers]
        self.ordered = torch.ops.mkldnn._reorder_linear_weight(torch.cat(weights), None)
        self.bias = None if biases[0] is None else torch.cat([bias.detach() for bias in biases])
        self.made_from = self._parameters()

    def _parameters(self) -> list[int]:
        layers = (self.owner._modules[name] for name in self.names)
        found = [p for layer in layers if layer is not None for p in layer._parameters.values() if p is not None]
        return [number for p in found for number in (id(p), p._version, p.data_ptr())]

    @property
    def current(self) -> bool:
        """Whether the layers still have the weights that this was made from."""
        return self._parameters() == self.made_from

    def __call__(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        if added is None:
            return torch.ops.mkldnn._linear_pointwise(x, self.ordered, self.bias, "none", [], "")
        return torch.ops.mkldnn._linear_pointwise.binary(x, added, self.ordered, self.bias, "add")


class PackedBlock:
    """What `LLaDABlock.forward` computes for a dense block without norms of queries and keys, in four products."""

    def __init__(self, block: LLaDABlock) -> None:
        self.block, self.head_width, self.grouped = block, block.head_width, block.grouped
        self.attn_norm, self.ff_norm = block.attn_norm, block.ff_norm
        self.queries = block.q_proj.out_features // block.head_width
        self.turned = self.queries + block.k_proj.out_features // block.head_width
        self.qkv = Product(block, "q_proj", "k_proj", "v_proj")
        self.attn_out = Product(block, "attn_out")
        self.gate_up = Product(block, "ff_proj", "up_proj")
        self.ff_out = Product(block, "ff_out")

    @property
    def products(self) -> list[Product]:
        return [self.qkv, self.attn_out, self.gate_up, self.ff_out]

    def __call__(self, x_BWD: Tensor, around: Surroundings, keep: Tensor | None = None) -> tuple[Tensor, None]:
        """(B, W, D), or (P, D) of the `keep` (P,) flattened positions; and no routing."""
        heads = self.qkv(self.attn_norm(x_BWD)).unflatten(-1, (-1, self.head_width))
        turned, v = rotate(heads[:, :, : self.turned], around.cos, around.sin), heads[:, :, self.turned :]
        q, k = turned[:, :, : self.queries], turned[:, :, self.queries :]
        if around.cache is not None:
            k, v = around.cache.write(self.block.layer, around.flat_slots, k, v)
        y_BNWH = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=around.bias, enable_gqa=self.grouped
        )
        x, y = x_BWD, y_BNWH.transpose(1, 2).flatten(-2)
        if keep is not None:
            x, y = x.flatten(0, 1)[keep], y.flatten(0, 1)[keep]
        x = self.attn_out(y, x)
        gate, up = self.gate_up(self.ff_norm(x)).chunk(2, dim=-1)
        return self.ff_out(F.silu(gate).mul_(up), x), None


class PackedBody:
    """All blocks of a network, and its head where it has one of its own."""

    def __init__(self, blocks: Sequence[LLaDABlock], body: nn.Module) -> None:
        self.blocks = [PackedBlock(block) for block in blocks]
        self.head = Product(body, "ff_out") if isinstance(getattr(body, "ff_out", None), nn.Linear) else None
        self.products = [p for block in self.blocks for p in block.products] + ([self.head] if self.head else [])

    @classmethod
    def of(cls, body: nn.Module, blocks: Sequence[LLaDABlock]) -> Self | None:
        """None where a layer is not an ordinary one on a CPU whose products oneDNN does fastest."""
        dense = all(block.qk_norm == "none" and block.mlp is None and block.shared_expert is None for block in blocks)
        layers = [module for module in body.modules() if isinstance(module, nn.Linear)]
        return cls(blocks, body) if dense and all(map(_packable, layers)) else None

    def usable(self, x: Tensor) -> bool:
        """Whether these numbers are the modules' for the embedded tokens `x`."""
        weight = self.blocks[0].block.q_proj.weight
        return x.numel() > 0 and plain(x, weight) and all(product.current for product in self.products)


def _packable(layer: nn.Linear) -> bool:
    weight = layer.weight
    if type(layer) is not Linear or type(weight) is not nn.Parameter or not weight.is_cpu or weight.is_inference():
        return False
    low = weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return low or (weight.dtype == torch.float32 and prefers_onednn())
