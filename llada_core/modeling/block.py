"""One pre-norm Transformer block, dense or sparse, under the published names of the dense family.

Knows attention, feed-forward and fused projections; does not know embeddings, heads or files.
Shapes: B batch, W tokens fed, T attended positions, N heads, H head width, D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from llada_core.modeling.architecture import Architecture
from llada_core.modeling.experts import GatedMLP, MoE, Routing
from llada_core.modeling.linear import Linear, autocast_dtype
from llada_core.modeling.predictor import KVCache
from llada_core.modeling.rope import rotate


@dataclass(frozen=True)
class Surroundings:
    """What every block of one forward pass shares: angles (..., W, 1, H), additive key bias, cache and its slots."""

    cos: Tensor
    sin: Tensor
    bias: Tensor | None
    cache: KVCache | None = None
    flat_slots: Tensor | None = None

    def on(self, device: torch.device) -> "Surroundings":
        """These, moved: blocks of one model may lie on several devices."""
        bias = None if self.bias is None else self.bias.to(device)
        slots = None if self.flat_slots is None else self.flat_slots.to(device)
        return Surroundings(self.cos.to(device), self.sin.to(device), bias, self.cache, slots)


def key_bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The additive bias for a 1/0 mask (B, T) or (B, W, T); None where nothing is hidden.

    On CPU a mask of ones is found out; on a GPU that would stall the stream, so pass None there.
    The dtype's minimum, not -inf, keeps a row that sees nothing finite, as the published code does.
    """
    if mask is None or (mask.device.type == "cpu" and bool(mask.all())):
        return None
    shaped = mask[:, None, None, :] if mask.dim() == 2 else mask[:, None]
    bias = torch.zeros(shaped.shape, dtype=dtype, device=mask.device)
    return bias.masked_fill_(shaped == 0, torch.finfo(dtype).min)


class RMSNorm(nn.Module):
    """Root-mean-square norm as LLaDA computes it: in fp32, cast back, then multiplied by the weight.

    Under autocast the weight counts as autocast rounds a product's: sharded ranks are sent all weights that way, so one
    GPU and many compute the same.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        low = autocast_dtype(x)
        weight = self.weight if low is None else self.weight.to(low)
        if x.dtype == torch.float32 and (low is not None or weight.dtype == torch.float32):
            return F.rms_norm(x, weight.shape, weight.float(), self.eps)
        return F.rms_norm(x.float(), weight.shape, eps=self.eps).type_as(x) * weight


class LLaDABlock(GradientCheckpointingLayer):
    """x + attention(norm(x)), then + feed-forward(norm(x)); every position sees every other that the bias allows."""

    def __init__(self, shape: Architecture, layer: int) -> None:
        super().__init__()
        self.layer, self.head_width, self.qk_norm = layer, shape.head_width, shape.qk_norm
        self.grouped = shape.n_heads != shape.n_kv_heads
        kv_width = shape.n_kv_heads * shape.head_width
        self.attn_norm = RMSNorm(shape.width, shape.norm_eps)
        self.q_proj = Linear(shape.width, shape.width, bias=shape.qkv_bias)
        self.k_proj = Linear(shape.width, kv_width, bias=shape.qkv_bias)
        self.v_proj = Linear(shape.width, kv_width, bias=shape.qkv_bias)
        if shape.qk_norm != "none":
            whole = shape.qk_norm == "projection"
            self.q_norm = RMSNorm(shape.width if whole else shape.head_width, shape.norm_eps)
            self.k_norm = RMSNorm(kv_width if whole else shape.head_width, shape.norm_eps)
        self.attn_out = Linear(shape.width, shape.width, bias=False)
        self.ff_norm = RMSNorm(shape.width, shape.norm_eps)
        self.mlp: GatedMLP | MoE | None = None
        self.shared_expert: GatedMLP | None = None
        if shape.moe is None:
            self.ff_proj = Linear(shape.width, shape.mlp_width, bias=False)
            self.up_proj = Linear(shape.width, shape.mlp_width, bias=False)
            self.ff_out = Linear(shape.mlp_width, shape.width, bias=False)
        elif not shape.moe.sparse[layer]:
            self.mlp = GatedMLP(shape.width, shape.mlp_width)
        else:
            self.mlp = MoE(shape.width, shape.moe)
            if shape.moe.shared_width:
                self.shared_expert = GatedMLP(shape.width, shape.moe.shared_width)

    def forward(self, x_BWD: Tensor, around: Surroundings, keep: Tensor | None = None) -> tuple[Tensor, Routing | None]:
        """The block's output and, for a sparse block, its routing.

        With `keep` (P,) only those of the B*W flattened positions are finished: the output is (P, D).
        """
        if around.cos.device != x_BWD.device:
            around = around.on(x_BWD.device)
        y_BWD = self._attend(self.attn_norm(x_BWD), around)
        if keep is not None:
            x_BWD, y_BWD = x_BWD.flatten(0, 1)[keep], y_BWD.flatten(0, 1)[keep]
        x_BWD = x_BWD + self.attn_out(y_BWD)
        y, routing = self._feed_forward(self.ff_norm(x_BWD))
        return x_BWD + y, routing

    def _attend(self, x_BWD: Tensor, around: Surroundings) -> Tensor:
        q, k, v = self.q_proj(x_BWD), self.k_proj(x_BWD), self.v_proj(x_BWD)
        if self.qk_norm == "projection":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (p.unflatten(-1, (-1, self.head_width)) for p in (q, k, v))
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, around.cos, around.sin), rotate(k, around.cos, around.sin)
        if around.cache is not None:
            # A cache may have another dtype than the queries (fp32 for a model that computes in bf16).
            k, v = (kept.to(q.dtype) for kept in around.cache.write(self.layer, around.flat_slots, k, v))
        y_BNWH = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=around.bias, enable_gqa=self.grouped
        )
        return y_BNWH.transpose(1, 2).flatten(-2)

    def _feed_forward(self, x: Tensor) -> tuple[Tensor, Routing | None]:
        if self.mlp is None:
            return self.ff_out(F.silu(self.ff_proj(x)) * self.up_proj(x)), None
        if isinstance(self.mlp, GatedMLP):
            return self.mlp(x), None
        y, routing = self.mlp(x)
        return (y if self.shared_expert is None else y + self.shared_expert(x)), routing
