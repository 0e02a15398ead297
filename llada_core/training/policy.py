"""The arithmetic of policy optimisation: token log-probabilities under chosen masks, advantages, clipped losses.

Pure functions of tensors; knows no rewards, prompts or files. Shapes: R completions, T tokens (prompt and completion).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llada_core.diffusion import masked_nll
from llada_core.training.params import GRPOParams


@dataclass(frozen=True)
class Completions:
    """Sampled sequences: tokens (R, T) int64, attention (R, T) 1/0, scored (R, T) bool (completion up to its first end
    token, which is included), written (R, T) bool (the whole completion), advantages (R,) float32.
    """

    tokens: Tensor
    attention: Tensor
    scored: Tensor
    written: Tensor
    advantages: Tensor

    def rows(self, index: Tensor | slice) -> "Completions":
        """Some of the rows."""
        return Completions(*(x[index] for x in vars(self).values()))

    def columns_from(self, first: int) -> "Completions":
        """Without the first columns."""
        return Completions(*(x[:, first:] if x.ndim == 2 else x for x in vars(self).values()))


@dataclass(frozen=True)
class Masks:
    """Which positions of each row the log-probabilities are taken under: masked (R, T) bool, and each row's weight (R,)."""

    masked: Tensor
    weight: Tensor


def masks_for(params: GRPOParams, rows: Completions, uniforms: Tensor, ratio: Tensor) -> Masks:
    """The masks of one update; `uniforms` (R, T) and `ratio` (R,) in (0, 1] are the update's random numbers.

    one_forward (d1, arXiv:2504.12216): the whole completion and a share of the prompt. elbo (LLaDA eq. 3, used by ESPO
    and SPG): each token of the completion with probability `ratio`, weighted by its inverse.
    """
    if params.likelihood == "one_forward":
        prompt = ~rows.written & rows.attention.bool()
        return Masks(rows.written | (prompt & (uniforms < params.mask_prompt)), torch.ones_like(ratio))
    return Masks(rows.written & (uniforms < ratio[:, None]), 1 / ratio)


def token_log_probabilities(model: nn.Module, rows: Completions, masks: Masks, mask_id: int) -> Tensor:
    """log p(token) under the masks at scored and masked positions, (R, T) float32; zero elsewhere."""
    noisy = torch.where(masks.masked, mask_id, rows.tokens)
    chosen = rows.scored & masks.masked
    nll = masked_nll(model, noisy, rows.tokens, chosen, rows.attention).nll
    index = chosen.flatten().nonzero()[:, 0].to(nll.device, non_blocking=True)
    empty = torch.zeros(chosen.numel(), dtype=nll.dtype, device=nll.device)
    return empty.index_copy(0, index, -nll).view(chosen.shape)


def group_advantages(rewards: Tensor, valid: Tensor, params: GRPOParams) -> Tensor:
    """Advantages (prompts, G) of rewards (prompts, G) over the valid completions of each group; zero for invalid ones.

    Not divided by the group's standard deviation unless asked (Dr. GRPO, arXiv:2503.20783; d1 as run by dllm).
    """
    count = valid.sum(1, keepdim=True).clamp(min=1)
    mean = torch.where(valid, rewards, 0.0).sum(1, keepdim=True) / count
    advantages = torch.where(valid, rewards - mean, 0.0)
    if params.scale_rewards:
        variance = advantages.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)
        advantages = advantages / (variance.sqrt() + 1e-4)
    return torch.where(advantages < 0, advantages * params.negative_weight, advantages)


@dataclass(frozen=True)
class PolicyLoss:
    """Sum to be divided by the step's count, and sums to log: KL, clipped and counted tokens (or rows)."""

    sum: Tensor
    kl: Tensor
    clipped: Tensor
    counted: Tensor


def policy_loss(
    params: GRPOParams, now: Tensor, old: Tensor, reference: Tensor | None, rows: Completions, masks: Masks
) -> PolicyLoss:
    """The clipped objective: -min(r A, clip(r) A) + beta KL, summed over scored tokens (ratio token) or rows (sequence).

    now, old, reference: (R, T) log-probabilities under the same masks. With ratio "sequence" r is the exponential of the
    mean difference of a row's likelihood bounds per token (ESPO); rows then holds `mask_samples` copies of every
    completion, one after another, whose bounds are averaged first. KL: `divergence`.
    """
    device = now.device
    weight = (masks.weight[:, None] * (rows.scored & masks.masked)).to(device, non_blocking=True)
    advantages = rows.advantages.to(device, non_blocking=True)[:, None]
    gap = None if reference is None else reference - now
    kl = torch.zeros_like(now) if gap is None else divergence(gap) * weight
    difference = now - old
    if params.ratio == "sequence":
        samples = mask_samples(params)
        lengths = rows.scored.sum(1, keepdim=True).clamp(min=1).to(device, non_blocking=True)
        difference, kl, advantages = (
            x.sum(1).view(samples, -1).mean(0) for x in (difference * weight / lengths, kl / lengths, advantages)
        )
        counts = rows.scored.any(1).view(samples, -1)[0]  # a row that nothing of is scored counts nowhere
        weight = counts.to(difference, non_blocking=True)
    ratio = difference.exp()
    low, high = 1 - params.epsilon, 1 + params.epsilon
    losses = -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages) * weight
    clipped = (((ratio < low) & (advantages < 0)) | ((ratio > high) & (advantages > 0))) & (weight > 0)
    return PolicyLoss(
        losses.sum() + params.beta * kl.sum(), kl.sum().detach(), clipped.sum().detach(), (weight > 0).sum().detach()
    )


def divergence(gap: Tensor) -> Tensor:
    """The estimate exp(gap) - gap - 1 of the KL, of a token's log p(reference) - log p(policy); a line beyond a nat.

    A sampled token is often unlikely under random masks. The gradient exp(gap) - 1 of the few that have become much
    less likely outweighed that of all others and of the rewards together; so it ends at e - 1.
    """
    near = gap.clamp(max=1.0)
    return near.exp() * (1 + gap - near) - gap - 1


def mask_samples(params: GRPOParams) -> int:
    """Masks per completion and update."""
    return params.mask_samples if params.likelihood == "elbo" else 1
