"""Auxiliary losses of mixture-of-experts routers, in forms that add up over micro-batches and ranks.

Knows routings and padding; does not know a loss's weight.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from llada_core.modeling.experts import Routing
from llada_core.modeling.predictor import RouterLosses


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
