"""The optimiser and the learning-rate curve. Knows parameters and progress; does not know losses or data."""

import math

import torch
from torch import nn

from llada_core.config.training import TrainingParams


def adamw(model: nn.Module, params: TrainingParams) -> torch.optim.AdamW:
    """AdamW (fused) over the parameters that train; matrices decay, norms and biases do not."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trainable if p.ndim >= 2], "weight_decay": params.weight_decay},
              {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=params.learning_rate, betas=params.betas, fused=True)


def learning_rate(params: TrainingParams, step: int, progress: float) -> float:
    """The learning rate of update number `step` (from 0) when `progress` in [0, 1] of the run is done.

    `progress` rather than a last step, because a run may end after a given number of FLOPs. The paper's curve is wsd:
    linear warm-up, constant, linear decay to `final_ratio`; or any `phases`, each a straight line.
    """
    if params.schedule == "phases":
        return _on_phases(params, step)
    warm = step / params.warmup if params.warmup >= 1 else progress / params.warmup if params.warmup else 1.0
    if params.warmup and warm < 1:
        return params.learning_rate * (step + 1) / params.warmup if params.warmup >= 1 else params.learning_rate * max(warm, 0.01)
    start = params.warmup if params.warmup < 1 else 0.0
    done = min(max((progress - start) / (1 - start), 0.0), 1.0)
    return params.learning_rate * _shape(params, progress, done)


def _shape(params: TrainingParams, progress: float, done: float) -> float:
    low = params.final_ratio
    if params.schedule == "cosine":
        return low + (1 - low) * (1 + math.cos(math.pi * done)) / 2
    if params.schedule == "linear":
        return 1 - (1 - low) * done
    if params.schedule == "wsd" and params.decay and progress > 1 - params.decay:
        return 1 - (1 - low) * min((progress - (1 - params.decay)) / params.decay, 1.0)
    return 1.0


def _on_phases(params: TrainingParams, step: int) -> float:
    for phase in params.phases:
        if step < phase.steps:
            return phase.start + (phase.end - phase.start) * step / phase.steps
        step -= phase.steps
    return params.phases[-1].end


def clip_coefficient(norm: torch.Tensor, limit: float) -> torch.Tensor:
    """The factor that brings gradients of this norm within the limit; 1 when they already are."""
    return torch.clamp(limit / (norm + 1e-6), max=1.0)
