"""One pre-norm Transformer block, dense or sparse, under the published names of the dense family: attention, rotary
tables, feed-forward, experts. Shape letters: the legend in `predictor`.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from llada_core.modeling.architecture import Architecture, ExpertGroups, ExpertShape
from llada_core.modeling.attention import Spans
from llada_core.modeling.fused import FusableModule
from llada_core.modeling.predictor import KVCache, RouterLosses


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast turns the operands of products on `x`'s device into; None where it is off."""
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind):  # shapes alone, and other devices that torch has no autocast for
        return None
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def wide(x: Tensor) -> Tensor:
    """`x` in fp32 at least: what is sensitive to rounding is computed so."""
    return x if x.dtype == torch.float64 else x.float()


class RotaryTables:
    """cos and sin of every position, fp32, grown to the longest length asked for and kept per device.

    No buffer: nothing to save, and nothing that loading on the meta device could leave unfilled.
    """

    def __init__(self, theta: float, head_width: int) -> None:
        self.theta, self.head_width = theta, head_width
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def upto(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and signed sin, each (length, H) fp32, for positions 0..length-1; sin is negated in its first half."""
        if device not in self._tables or self._tables[device][0].shape[0] < length:
            # a table made under inference_mode could not be used by a later training step
            with torch.inference_mode(False), torch.no_grad():
                self._tables[device] = self._compute(length, device)
        cos, sin = self._tables[device]
        return cos[:length], sin[:length]

    def _compute(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        # In fp32 whatever the model computes in: in bf16 the angles of neighbours far behind would be one and the same.
        exponent = torch.arange(0, self.head_width, 2, device=device, dtype=torch.float32) / self.head_width
        angle = torch.outer(torch.arange(length, device=device, dtype=torch.float32), 1.0 / self.theta**exponent)
        return torch.cat([angle.cos()] * 2, dim=-1), torch.cat([-angle.sin(), angle.sin()], dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x` (B, L, N, H) rotated half-split in fp32 and cast back; cos and signed sin broadcast as (..., L, 1, R).

    Only the first R of the H features are rotated.
    """
    if cos.shape[-1] < x.shape[-1]:
        turned, passed = x.tensor_split([cos.shape[-1]], dim=-1)
        return torch.cat([rotate(turned, cos, sin), passed], dim=-1)
    # With h half of H: out[i] = x[i] cos - x[i + h] sin, out[i + h] = x[i + h] cos + x[i] sin. Rolling by h brings each
    # number beside its partner, and the sign lies in the table, so nothing is cut, negated or joined.
    return torch.addcmul(wide(x) * cos, wide(x).roll(x.shape[-1] // 2, dims=-1), sin).type_as(x)


class Routing(NamedTuple):
    """What the router decided: its logits (P, E), and for each token the chosen experts and their weights (P, K)."""

    logits: Tensor
    experts: Tensor
    weights: Tensor


class GatedMLP(FusableModule):
    """SwiGLU feed-forward with the published names of LLaDA-MoE's dense layers and shared experts."""

    fusable = (("gate_proj", "up_proj"),)

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.projected(x, "gate_proj", "up_proj")
        return self.down_proj(F.silu(gate) * up)


class LowRank(NamedTuple):
    """What an adapter adds to each matrix (O, I) of a stack: scale * up @ down."""

    down: Tensor  # (E, R, I)
    up: Tensor  # (E, O, R)
    scale: float

    def aligned(self, dtype: torch.dtype) -> "LowRank":
        """In `dtype`, rows side by side; R filled with zeros to a multiple of 8, as bf16's grouped_mm takes 16 bytes."""
        missing = -self.down.shape[1] % 8
        down, up = F.pad(self.down, (0, 0, 0, missing)), F.pad(self.up, (0, missing))
        return LowRank(down.to(dtype).contiguous(), up.to(dtype).contiguous(), self.scale)


def stack_product(rows: Tensor, table: Tensor, ends: Tensor, change: LowRank | None) -> Tensor:
    """Runs of rows (P, I), each times its matrix of `table` (E, O, I) and what an adapter adds to it: (P, O).

    The adapter is applied to the rows. Added into the table, what it changes would be rounded away in bf16, and the table
    would be copied, and its gradient taken, for two factors that are a hundredth of it.
    """
    y = F.grouped_mm(rows, table.transpose(1, 2), offs=ends)
    if change is None:
        return y
    down, up, scale = change.aligned(rows.dtype)
    low = F.grouped_mm(rows, down.transpose(1, 2), offs=ends)
    return y + F.grouped_mm(low, up.transpose(1, 2), offs=ends) * scale


class Experts(nn.Module):
    """All experts of a layer as two stacked parameters: `gate_up` (E, 2F, D), gate rows first, and `down` (E, D, F)."""

    def __init__(self, width: int, shape: ExpertShape) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(shape.n_experts, 2 * shape.width, width))
        self.down = nn.Parameter(torch.empty(shape.n_experts, width, shape.width))
        nn.init.trunc_normal_(self.gate_up, std=0.02)
        nn.init.trunc_normal_(self.down, std=0.02)

    def forward(
        self, x_PD: Tensor, expert_PK: Tensor, weight_PK: Tensor, changes: Mapping[str, LowRank] | None = None
    ) -> Tensor:
        """Sum over each token's experts of weight times expert output, (P, D), by two grouped products.

        changes: what an adapter adds to a parameter, by its name.
        """
        changes = {} if changes is None else changes
        gate_up: Tensor = self.gate_up
        down: Tensor = self.down
        low = autocast_dtype(x_PD)
        if x_PD.dtype == torch.float64:  # which grouped_mm does not know
            return self.loop(x_PD, expert_PK, weight_PK, changes)
        if low is not None:  # grouped_mm is not on autocast's list
            x_PD, gate_up, down = x_PD.to(low), gate_up.to(low), down.to(low)
        n_tokens, chosen = expert_PK.shape
        # Rows are put in the order of their experts, so that each expert multiplies one run of rows; within a run they
        # stay in the order of their tokens (stable), so that gradients are summed in the same order every time.
        sorted_PK, order = expert_PK.flatten().sort(stable=True)
        # Where each expert's rows end. Not by bincount: it reads its largest value back from a GPU, which has to be
        # waited for in every sparse layer, and once more where activations are computed again.
        experts = torch.arange(gate_up.shape[0], device=sorted_PK.device)
        ends = torch.searchsorted(sorted_PK, experts, right=True, out_int32=True)
        gate, up = stack_product(x_PD[order // chosen], gate_up, ends, changes.get("gate_up")).chunk(2, dim=-1)
        y = stack_product(F.silu(gate) * up, down, ends, changes.get("down"))
        # Back to the tokens' order: each row is written once and the K of a token are summed side by side. `index_add_`
        # over tokens would sum them on a GPU in whatever order its threads come by.
        y_PKD = torch.empty_like(y).index_copy(0, order, y).view(n_tokens, chosen, down.shape[1])
        return (y_PKD * weight_PK[..., None].type_as(y_PKD)).sum(1)

    def loop(
        self, x_PD: Tensor, expert_PK: Tensor, weight_PK: Tensor, changes: Mapping[str, LowRank] | None = None
    ) -> Tensor:
        """The same sum, one expert after another: the oracle of `forward`, in any dtype."""

        def product(rows: Tensor, name: str, index: int) -> Tensor:
            y = F.linear(rows, getattr(self, name)[index])
            if changes is None or name not in changes:
                return y
            down, up, scale = changes[name]
            return y + F.linear(F.linear(rows, down[index].type_as(rows)), up[index].type_as(rows)) * scale

        y_PD = torch.zeros_like(x_PD)
        for index in range(self.gate_up.shape[0]):
            token, slot = torch.where(expert_PK == index)
            gate, up = product(x_PD[token], "gate_up", index).chunk(2, dim=-1)
            y = product(F.silu(gate) * up, "down", index)
            y_PD = y_PD.index_add(0, token, y * weight_PK[token, slot, None].type_as(y))
        return y_PD


class MoE(nn.Module):
    """A softmax router over all experts, the best K kept with their probabilities as weights, not renormalised."""

    expert_bias: Tensor | None
    load: Tensor | None = None  # (E,) int64, tokens that chose each expert since it was zeroed; None: nobody counts

    def __init__(self, width: int, shape: ExpertShape) -> None:
        super().__init__()
        self.per_token = shape.per_token
        self.gate = nn.Linear(width, shape.n_experts, bias=False)
        self.experts = Experts(width, shape)
        self.register_buffer("expert_bias", torch.zeros(shape.n_experts) if shape.router_bias else None)

    def route(self, x_PD: Tensor) -> Routing:
        logits_PE = self.gate(x_PD)
        score_PE = logits_PE.float().softmax(-1)
        if self.expert_bias is not None:  # as published: the bias takes part in choosing and in weighting
            score_PE = score_PE + self.expert_bias
        weight_PK, expert_PK = score_PE.topk(self.per_token, dim=-1)
        return Routing(logits_PE, expert_PK, weight_PK)

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """`x` (..., D) through its experts, and what the router decided for the flattened tokens."""
        x_PD = x.flatten(0, -2)
        routing = self.route(x_PD)
        return self.experts(x_PD, routing.experts, routing.weights).type_as(x).view_as(x), routing


class GroupedMoE(MoE):
    """A sigmoid router, all in fp32, that takes a token's experts from its best groups (LLaDA2, after DeepSeek-V3)."""

    def __init__(self, width: int, shape: ExpertShape, groups: ExpertGroups) -> None:
        super().__init__(width, shape)
        self.groups = groups

    def route(self, x_PD: Tensor) -> Routing:
        low = autocast_dtype(x_PD)
        with nullcontext() if low is None else torch.autocast(x_PD.device.type, enabled=False):
            logits_PE = F.linear(wide(x_PD), wide(self.gate.weight))
        score_PE = logits_PE.sigmoid()
        # The bias balances the experts: it takes part in choosing, and not in weighting.
        choice_PE = score_PE if self.expert_bias is None else score_PE + self.expert_bias
        choice_PGE = choice_PE.unflatten(-1, (self.groups.n_groups, -1))
        # A group is as good as its two best experts together, as published; by its best alone other groups are chosen.
        best_PG = choice_PGE.topk(2, dim=-1).values.sum(-1)
        kept = torch.zeros_like(best_PG, dtype=torch.bool)
        kept.scatter_(1, best_PG.topk(self.groups.kept, dim=-1).indices, value=True)
        choice_PE = choice_PGE.masked_fill(~kept[..., None], -torch.inf).flatten(1)
        expert_PK = choice_PE.topk(self.per_token, dim=-1).indices
        weight_PK = score_PE.gather(1, expert_PK)
        # Of a single expert the share would be 1 whatever the router thinks, and it would learn nothing.
        if self.per_token > 1:
            weight_PK = weight_PK / (weight_PK.sum(-1, keepdim=True) + 1e-20)
        return Routing(logits_PE, expert_PK, weight_PK * self.groups.scale)


@torch.no_grad()
def count_loads(routers: list[MoE], routings: list[Routing], mask: Tensor | None, kept: Tensor | None) -> None:
    """Adds to the `load` of each router that is counted what real tokens chose; `mask` (B, W) is 0 at padding.

    `kept` (P,): the flattened positions that went through the last of them, where not all did.
    """
    for router, routing in zip(routers, routings, strict=True):
        if router.load is None:
            continue
        chosen = torch.ones_like(routing.experts)
        if mask is not None and mask.dim() == 2:
            real = (mask != 0).flatten().to(chosen.device)
            chosen = (
                chosen * (real if len(real) == len(chosen) or kept is None else real[kept.to(real.device)])[:, None]
            )
        router.load.index_add_(0, routing.experts.flatten(), chosen.flatten())


def router_losses(routings: list[Routing], batch: int, attention_mask: Tensor | None) -> RouterLosses:
    """Balance loss per row (B,) and z-loss per token (B, W), each the mean over the sparse layers, in fp32.

    Balance (Switch Transformer, arXiv:2101.03961, eq. 4): E * sum_e f_e P_e, with f_e the share of the row's choices
    that fell on expert e and P_e its mean probability; over the row alone, so that the mean over rows does not depend
    on how they are batched. z (ST-MoE, arXiv:2202.08906, eq. 5): logsumexp(logits)^2. Padding counts in neither.
    """
    balances, zs = [], []
    for routing in routings:
        n_experts = routing.logits.shape[-1]
        logits_BWE = routing.logits.float().unflatten(0, (batch, -1))
        choices_BWE = F.one_hot(routing.experts, n_experts).sum(1).float().unflatten(0, (batch, -1))
        real_BW1 = logits_BWE.new_ones((*logits_BWE.shape[:2], 1))
        if attention_mask is not None and attention_mask.dim() == 2:
            real_BW1 = attention_mask[..., None].to(logits_BWE.dtype)
        count_B1 = real_BW1.sum(1).clamp(min=1)
        share_BE = (choices_BWE * real_BW1).sum(1) / (count_B1 * routing.experts.shape[-1])
        probability_BE = (logits_BWE.softmax(-1) * real_BW1).sum(1) / count_B1
        balances.append(n_experts * (share_BE * probability_BE).sum(-1))
        zs.append(logits_BWE.logsumexp(-1).square() * real_BW1[..., 0])
    return RouterLosses(torch.stack(balances).mean(0), torch.stack(zs).mean(0))


@dataclass(frozen=True)
class Surroundings:
    """What every block of one forward pass shares: angles (..., W, 1, R), what may be seen, cache and its slots.

    What may be seen is said by an additive key bias, or by `spans`.
    """

    cos: Tensor
    sin: Tensor
    bias: Tensor | None
    cache: KVCache | None = None
    flat_slots: Tensor | None = None
    spans: Spans | None = None

    def on(self, device: torch.device) -> "Surroundings":
        """These, moved: blocks of one model may lie on several devices."""
        bias = None if self.bias is None else self.bias.to(device)
        slots = None if self.flat_slots is None else self.flat_slots.to(device)
        spans = None if self.spans is None else self.spans.on(device)
        return Surroundings(self.cos.to(device), self.sin.to(device), bias, self.cache, slots, spans)


def key_bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The additive bias for a 1/0 mask (B, T) or (B, W, T); None where nothing is hidden.

    On CPU a mask of ones is found out; on a GPU that would stall the stream, so pass None there. A compiled call keeps it.
    The dtype's minimum, not -inf, keeps a row that sees nothing finite, as the published code does.
    """
    if mask is None:
        return None
    if mask.device.type == "cpu" and not torch.compiler.is_compiling() and bool(mask.all()):
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
        return F.rms_norm(wide(x), weight.shape, eps=self.eps).type_as(x) * weight


class LLaDABlock(FusableModule, GradientCheckpointingLayer):
    """x + attention(norm(x)), then + feed-forward(norm(x)); every position sees every other that the bias allows."""

    fusable = (("q_proj", "k_proj", "v_proj"), ("ff_proj", "up_proj"))  # those that a family's block has

    def __init__(self, shape: Architecture, layer: int) -> None:
        super().__init__()
        self.layer, self.head_width, self.qk_norm = layer, shape.head_width, shape.qk_norm
        # Asked for only where it is needed: some of torch's kernels are not offered to calls that ask.
        self.grouped = shape.n_heads != shape.n_kv_heads
        q_width, kv_width = shape.n_heads * shape.head_width, shape.n_kv_heads * shape.head_width
        self.attn_norm = RMSNorm(shape.width, shape.norm_eps)
        self.fused = (q_width, kv_width, kv_width) if shape.fused_qkv else None
        if self.fused is not None:
            self.qkv_proj = nn.Linear(shape.width, sum(self.fused), bias=shape.qkv_bias)
        else:
            self.q_proj = nn.Linear(shape.width, q_width, bias=shape.qkv_bias)
            self.k_proj = nn.Linear(shape.width, kv_width, bias=shape.qkv_bias)
            self.v_proj = nn.Linear(shape.width, kv_width, bias=shape.qkv_bias)
        if shape.qk_norm != "none":
            whole = shape.qk_norm == "projection"
            self.q_norm = RMSNorm(q_width if whole else shape.head_width, shape.norm_eps)
            self.k_norm = RMSNorm(kv_width if whole else shape.head_width, shape.norm_eps)
        self.attn_out = nn.Linear(q_width, shape.width, bias=False)
        self.ff_norm = RMSNorm(shape.width, shape.norm_eps)
        self.mlp: GatedMLP | MoE | None = None
        self.shared_expert: GatedMLP | None = None
        if shape.moe is None:
            self.ff_proj = nn.Linear(shape.width, shape.mlp_width, bias=False)
            self.up_proj = nn.Linear(shape.width, shape.mlp_width, bias=False)
            self.ff_out = nn.Linear(shape.mlp_width, shape.width, bias=False)
        elif not shape.moe.sparse[layer]:
            self.mlp = GatedMLP(shape.width, shape.mlp_width)
        else:
            groups = shape.moe.groups
            self.mlp = MoE(shape.width, shape.moe) if groups is None else GroupedMoE(shape.width, shape.moe, groups)
            if shape.moe.shared_width:
                self.shared_expert = GatedMLP(shape.width, shape.moe.shared_width)

    def forward(self, x_BWD: Tensor, around: Surroundings, keep: Tensor | None = None) -> tuple[Tensor, Routing | None]:
        """The block's output and, for a sparse block, its routing.

        With `keep` (P,) only those of the B*W flattened positions are finished: the output is (P, D).
        """
        if around.cos.device != x_BWD.device:
            around = around.on(x_BWD.device)
        y_BWD = self._attend(self.attn_norm(x_BWD), around)
        # In the last block every position gives keys and values, but only what is asked for goes on from here: output
        # projection, feed-forward and head then run on those rows alone.
        if keep is not None:
            x_BWD, y_BWD = x_BWD.flatten(0, 1)[keep], y_BWD.flatten(0, 1)[keep]
        x_BWD = x_BWD + self.attn_out(y_BWD)
        y, routing = self._feed_forward(self.ff_norm(x_BWD))
        return x_BWD + y, routing

    def _attend(self, x_BWD: Tensor, around: Surroundings) -> Tensor:
        if self.fused is None:
            q, k, v = self.projected(x_BWD, "q_proj", "k_proj", "v_proj")
        else:
            q, k, v = self.qkv_proj(x_BWD).split(self.fused, dim=-1)
        if self.qk_norm == "projection":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (p.unflatten(-1, (-1, self.head_width)) for p in (q, k, v))  # (B, W, N or N_kv, H)
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        # Cached keys are turned already: a position's angle does not change, and a window turns its own tokens alone.
        q, k = rotate(q, around.cos, around.sin), rotate(k, around.cos, around.sin)
        if around.cache is not None:
            # A cache may have another dtype than the queries (fp32 for a model that computes in bf16).
            k, v = (kept.to(q.dtype) for kept in around.cache.write(self.layer, around.flat_slots, k, v))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if around.spans is not None:
            y_BNWH = around.spans.attend(q, k, v)
        else:
            y_BNWH = F.scaled_dot_product_attention(q, k, v, attn_mask=around.bias, enable_gqa=self.grouped)
        return y_BNWH.transpose(1, 2).flatten(-2)

    def _feed_forward(self, x: Tensor) -> tuple[Tensor, Routing | None]:
        if self.mlp is None:
            gate, up = self.projected(x, "ff_proj", "up_proj")
            return self.ff_out(F.silu(gate) * up), None
        if isinstance(self.mlp, GatedMLP):
            return self.mlp(x), None
        y, routing = self.mlp(x)
        return (y if self.shared_expert is None else y + self.shared_expert(x)), routing
