"""Mixture of experts: a softmax router and stacked expert weights, with the plain loop kept as oracle.

Knows tokens as rows, and a router's auxiliary losses in forms that add up over micro-batches and ranks; does not know
attention or how a loss weighs the router.
Shapes: T tokens, D width, E experts, K experts per token, F expert width.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llada_core.modeling.architecture import ExpertShape
from llada_core.modeling.linear import Linear, autocast_dtype
from llada_core.modeling.predictor import RouterLosses


class Routing(NamedTuple):
    """What the router decided: its logits (T, E), and for each token the chosen experts and their weights (T, K)."""

    logits: Tensor
    experts: Tensor
    weights: Tensor


class GatedMLP(nn.Module):
    """SwiGLU feed-forward with the published names of LLaDA-MoE's dense layers and shared experts."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = Linear(width, hidden, bias=False)
        self.up_proj = Linear(width, hidden, bias=False)
        self.down_proj = Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """All experts of a layer as two stacked parameters: `gate_up` (E, 2F, D), gate rows first, and `down` (E, D, F)."""

    def __init__(self, width: int, shape: ExpertShape) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(shape.n_experts, 2 * shape.width, width))
        self.down = nn.Parameter(torch.empty(shape.n_experts, width, shape.width))
        nn.init.trunc_normal_(self.gate_up, std=0.02)
        nn.init.trunc_normal_(self.down, std=0.02)

    def forward(self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """Sum over each token's experts of weight times expert output, (T, D), by two grouped products."""
        gate_up: Tensor = self.gate_up
        down: Tensor = self.down
        low = autocast_dtype(x_TD)
        if low is not None:  # grouped_mm is not on autocast's list
            x_TD, gate_up, down = x_TD.to(low), gate_up.to(low), down.to(low)
        n_tokens, chosen = expert_TK.shape
        sorted_TK, order = expert_TK.flatten().sort(stable=True)
        # Where each expert's rows end. Not by bincount: it reads its largest value back from a GPU, which has to be
        # waited for in every sparse layer, and once more where activations are computed again.
        experts = torch.arange(gate_up.shape[0], device=sorted_TK.device)
        ends = torch.searchsorted(sorted_TK, experts, right=True, out_int32=True)
        gate, up = F.grouped_mm(x_TD[order // chosen], gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
        y = F.grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=ends)
        y_TKD = torch.empty_like(y).index_copy(0, order, y).view(n_tokens, chosen, down.shape[1])
        return (y_TKD * weight_TK[..., None].type_as(y_TKD)).sum(1)

    def loop(self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """The same sum, one expert after another: the oracle of `forward`."""
        y_TD = torch.zeros_like(x_TD)
        for index in range(self.gate_up.shape[0]):
            token, slot = torch.where(expert_TK == index)
            gate, up = F.linear(x_TD[token], self.gate_up[index]).chunk(2, dim=-1)
            y = F.linear(F.silu(gate) * up, self.down[index])
            y_TD = y_TD.index_add(0, token, y * weight_TK[token, slot, None].type_as(y))
        return y_TD


class MoE(nn.Module):
    """A softmax router over all experts, the best K kept with their probabilities as weights, not renormalised."""

    expert_bias: Tensor | None

    def __init__(self, width: int, shape: ExpertShape) -> None:
        super().__init__()
        self.per_token = shape.per_token
        self.gate = Linear(width, shape.n_experts, bias=False)
        self.experts = Experts(width, shape)
        self.register_buffer("expert_bias", torch.zeros(shape.n_experts) if shape.router_bias else None)

    def route(self, x_TD: Tensor) -> Routing:
        logits_TE = self.gate(x_TD)
        score_TE = logits_TE.float().softmax(-1)
        if self.expert_bias is not None:  # as published: the bias takes part in choosing and in weighting
            score_TE = score_TE + self.expert_bias
        weight_TK, expert_TK = score_TE.topk(self.per_token, dim=-1)
        return Routing(logits_TE, expert_TK, weight_TK)

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """`x` (..., D) through its experts, and what the router decided for the flattened tokens."""
        x_TD = x.flatten(0, -2)
        routing = self.route(x_TD)
        return self.experts(x_TD, routing.experts, routing.weights).type_as(x).view_as(x), routing


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
