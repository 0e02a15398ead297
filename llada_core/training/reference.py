"""The policy that a trained one must not leave: a frozen copy, or the same model with its adapters switched off."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from llada_core.modeling import MaskPredictor
from llada_core.modeling.adapters import adapter_off
from llada_core.training.params import GRPOParams, PreferenceParams


class Reference:
    """The reference of a run; with beta 0 there is none and nothing is copied."""

    def __init__(self, model: MaskPredictor, params: GRPOParams | PreferenceParams) -> None:
        self._policy, self._adapter, self._low = model, params.lora is not None, params.precision == "bf16"
        self._every, self._mix = (params.sync_every, params.sync_mix) if isinstance(params, GRPOParams) else (0, 0.0)
        self.copied = (
            copy.deepcopy(model).requires_grad_(False).eval() if params.beta > 0 and not self._adapter else None
        )

    @contextmanager
    def active(self, model: nn.Module) -> Iterator[nn.Module]:
        """The reference as a model to call; `model` is the policy as the loop wraps it."""
        if self.copied is not None:
            device = self._policy.device
            self.copied.to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=self._low):  # as accelerate runs the policy
                yield self.copied
        else:
            with adapter_off(self._policy):
                yield model

    @torch.no_grad()
    def sync(self, policy: nn.Module, step: int) -> None:
        """Every `sync_every` steps: reference = mix * policy + (1 - mix) * reference."""
        if self.copied is None or not self._every or step == 0 or step % self._every:
            return
        for mine, theirs in zip(self.copied.parameters(), policy.parameters(), strict=True):
            mine.to(theirs.device).lerp_(theirs.detach().to(mine.dtype), self._mix)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold: a copy that moves."""
        if self.copied is None or not self._every:
            return {}
        return {f"reference.{name}": p for name, p in self.copied.named_parameters()}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Back to a stored copy."""
        if self.state():
            for name, parameter in self.copied.named_parameters():  # type: ignore[union-attr]
                parameter.data.copy_(tensors[f"reference.{name}"])
