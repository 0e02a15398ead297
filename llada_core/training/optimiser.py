"""The optimiser and the learning-rate curve. Knows parameters and progress; does not know losses or data."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from llada_core.config.training import TrainingParams
from llada_core.modeling import MaskPredictor


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024) for the matrices inside the blocks, AdamW for everything else, as one optimiser.

    Muon's steps are scaled to AdamW's root mean square (arXiv:2502.16982), so one learning rate serves both.
    """

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self._parts = tuple(parts)
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        groups = iter(self.param_groups)
        for part in self._parts:
            part.state = self.state
            part.param_groups = [next(groups) for _ in part.param_groups]

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for part in self._parts:
            part.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()


def optimiser_for(model: MaskPredictor, params: TrainingParams) -> torch.optim.Optimizer:
    """The optimiser that `params.optimiser` names, over the parameters that train; norms and biases do not decay."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    hidden = _hidden_matrices(model) if params.optimiser == "muon" else set()
    matrices = [p for p in trainable if p.ndim >= 2 and p not in hidden]
    groups = [
        {"params": matrices, "weight_decay": params.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]  # of adapters all weights are matrices inside the blocks
    adamw = [torch.optim.AdamW(groups, lr=params.learning_rate, betas=params.betas, fused=True)] if groups else []
    if not hidden:
        return adamw[0]
    muon = torch.optim.Muon(
        [p for p in trainable if p in hidden],
        lr=params.learning_rate,
        weight_decay=params.weight_decay,
        momentum=0.95,
        adjust_lr_fn="match_rms_adamw",
    )
    return MuonAndAdamW([muon, *adamw])


def _hidden_matrices(model: MaskPredictor) -> set[nn.Parameter]:
    outer = {id(m.weight) for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None}
    return {p for p in model.parameters() if p.requires_grad and p.ndim == 2 and id(p) not in outer}


def learning_rate(params: TrainingParams, step: int, progress: float) -> float:
    """The learning rate of update number `step` (from 0) when `progress` in [0, 1] of the run is done.

    `progress` rather than a last step, because a run may end after a given number of FLOPs. The paper's curve is wsd:
    linear warm-up, constant, linear decay to `final_ratio`; or any `phases`, each a straight line.
    """
    if params.schedule == "phases":
        return _on_phases(params, step)
    if step < params.warmup >= 1:
        return params.learning_rate * (step + 1) / params.warmup
    if progress < params.warmup < 1:
        return params.learning_rate * max(progress / params.warmup, 0.01)
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
