"""A dense network prepared for inference on a CPU: fewer and larger products, weights kept in oneDNN's own order.

Knows how a block's weights are put together and whether they have changed since; does not know embeddings or files.
Numbers are the modules' own up to rounding. Costs one more copy of the linear layers' weights; other devices are left
alone. Hooks on the modules inside a block are not called.
"""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llada_core.modeling.block import LLaDABlock, RMSNorm, Surroundings
from llada_core.modeling.linear import Linear, prefers_onednn


class Product:
    """x (..., I) -> x W^T + b (..., O) with the stacked weights of some linear layers; `order` (O,) of their rows."""

    def __init__(self, *layers: Any, order: Tensor | None = None, norm: RMSNorm | None = None) -> None:
        weight = torch.cat([layer.weight.detach() for layer in layers])
        bias = None if layers[0].bias is None else torch.cat([layer.bias.detach() for layer in layers])
        if order is not None:
            weight, bias = weight[order], None if bias is None else bias[order]
        self.eps = None
        if norm is not None and weight.dtype == torch.float32:  # in bf16 the folded weights would be rounded anew
            self.eps, weight = torch.tensor(norm.eps), weight * norm.weight.detach()
        self.norm, self.bias = norm, bias
        self.ordered = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)

    def __call__(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        """Of the normed `x` if there is a norm; `added` (..., O) is added within the product."""
        if self.eps is not None:  # its weight is folded in, so that one pass over x is left
            length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
            x = x * torch.addcmul(self.eps, length, length, value=1 / x.shape[-1]).rsqrt_()
        elif self.norm is not None:
            x = self.norm(x)
        if added is None:
            return torch.ops.mkldnn._linear_pointwise(x, self.ordered, self.bias, "none", [], "")
        return torch.ops.mkldnn._linear_pointwise.binary(x, added, self.ordered, self.bias, "add")


class PackedBlock:
    """What `LLaDABlock.forward` computes for a dense block without norms of queries and keys, in four products.

    In each head of queries and keys the two numbers that rotary embedding turns together are neighbours, a complex one.
    """

    def __init__(self, block: LLaDABlock) -> None:
        self.layer, self.head_width, self.grouped = block.layer, block.head_width, block.grouped
        self.queries = block.q_proj.out_features // block.head_width
        self.turned = self.queries + block.k_proj.out_features // block.head_width
        rows = torch.arange(block.q_proj.out_features + 2 * block.k_proj.out_features)
        turned = rows[: self.turned * self.head_width].view(self.turned, 2, -1).transpose(1, 2).flatten()
        order = torch.cat([turned, rows[len(turned) :]])
        self.qkv = Product(block.q_proj, block.k_proj, block.v_proj, order=order, norm=block.attn_norm)
        self.attn_out = Product(block.attn_out)
        self.gate_up = Product(block.ff_proj, block.up_proj, norm=block.ff_norm)
        self.ff_out = Product(block.ff_out)

    def __call__(
        self, x: Tensor, around: Surroundings, turn: Tensor, keep: Tensor | None = None, *, even: bool = False
    ) -> Tensor:
        """(B, W, D), or (P, D) of the `keep` (P,) flattened positions, `even`ly many of each row."""
        heads = self.qkv(x).unflatten(-1, (-1, self.head_width))
        pairs = torch.view_as_complex(heads[:, :, : self.turned].float().unflatten(-1, (-1, 2)))
        turned = torch.view_as_real(pairs * turn)
        if around.cache is not None:
            turned = turned.transpose(-1, -2)  # a cache holds keys in the modules' order
        turned, v = turned.flatten(-2).type_as(x), heads[:, :, self.turned :]
        q, k = turned[:, :, : self.queries], turned[:, :, self.queries :]
        if around.cache is not None:
            k, v = around.cache.write(self.layer, around.flat_slots, k, v)
        if keep is not None:
            x = x.flatten(0, 1)[keep]
            q = q.flatten(0, 1)[keep].view(len(q), -1, *q.shape[2:]) if even else q
        y_BNWH = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=around.bias, enable_gqa=self.grouped
        )
        y = y_BNWH.transpose(1, 2).flatten(-2)
        if keep is not None:
            y = y.flatten(0, 1) if even else y.flatten(0, 1)[keep]
        x = self.attn_out(y, x)
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.ff_out(F.silu(gate).mul_(up), x)


class PackedBody:
    """All blocks of a network, and its head where it has one of its own."""

    def __init__(self, blocks: Sequence[LLaDABlock], body: nn.Module) -> None:
        self.blocks = [PackedBlock(block) for block in blocks]
        head = body._modules.get("ff_out")
        self.head = None if head is None else Product(head)
        parts = list(body.modules())
        self.children = [(part._modules, name) for part in parts for name in part._modules]
        self.slots = [(part._parameters, name) for part in parts for name in part._parameters]
        # what is still held can be nobody else's: neither an address nor an id comes back
        self.held = parts, [None if p is None else p.detach() for p in self._values()], self._values()
        self.made_from = self._state()

    def _values(self) -> list[Tensor | None]:
        return [values.get(name) for values, name in self.slots]

    def _state(self) -> tuple[list[int], ...]:
        values, parts = self._values(), [parts.get(name) for parts, name in self.children]
        found = [p for p in values if p is not None]
        numbers = [p._version for p in found], [p.data_ptr() for p in found]
        return [id(part) for part in parts], [id(p) for p in values], *numbers

    @property
    def current(self) -> bool:
        """Whether the network still has the layers and the weights that this was made from."""
        return self._state() == self.made_from

    @classmethod
    def of(cls, body: nn.Module, blocks: Sequence[LLaDABlock]) -> Self | None:
        """None where a layer is not an ordinary one on a CPU whose products oneDNN does fastest."""
        dense = all(block.qk_norm == "none" and block.mlp is None and block.shared_expert is None for block in blocks)
        layers = [module for module in body.modules() if isinstance(module, nn.Linear)]
        return cls(blocks, body) if dense and all(map(_packable, layers)) else None

    def __call__(self, x: Tensor, around: Surroundings, keep: Tensor | None) -> Tensor:
        """What the blocks make of the embedded tokens (B, W, D): (B, W, D), or (P, D) of the `keep` positions."""
        half = around.cos.shape[-1] // 2
        turn = torch.complex(around.cos[..., :half], around.sin[..., half:])
        for block in self.blocks[:-1]:
            x = block(x, around, turn)
        return self.blocks[-1](x, around, turn, keep, even=keep is not None and _even(keep, x, around.bias))


def _even(keep: Tensor, x: Tensor, bias: Tensor | None) -> bool:
    """Whether `keep` (P,) names equally many positions of each row of `x` (B, W, D), row after row."""
    rows, width = x.shape[:2]
    if len(keep) % rows or not len(keep) or (bias is not None and bias.shape[2] > 1):
        return False
    return rows == 1 or bool((keep.view(rows, -1) // width == torch.arange(rows)[:, None]).all())


def _packable(layer: nn.Linear) -> bool:
    weight = layer.weight
    if type(layer) is not Linear or type(weight) is not nn.Parameter or not weight.is_cpu or weight.is_inference():
        return False
    low = weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return low or (weight.dtype == torch.float32 and prefers_onednn())
