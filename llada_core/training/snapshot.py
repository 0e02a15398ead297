"""Everything a run needs to go on, as named tensors: trainable weights, AdamW moments, the objective's own state.

Knows how model, optimiser and objective are laid out; does not know files (`checkpoint.py`) or the loop. What DeepSpeed
splits it writes and reads itself, in a folder of its own within ours.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llada_core.training.checkpoint import Checkpoints, Stored, note, read_state
from llada_core.training.objectives import Objective

_MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")
_ZERO = "zero"
_WRAPPERS = ("module.", "_orig_mod.", "_checkpoint_wrapped_module.")


class Snapshot:
    """Saves and restores the parts of a run in place."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        model: nn.Module,
        optimiser: torch.optim.Optimizer,
        objective: Objective,
        fingerprint: Mapping[str, str],
        *,
        extend: bool = False,
    ) -> None:
        self._checkpoints, self._model, self._optimiser, self._objective = checkpoints, model, optimiser, objective
        self._fingerprint, self._extend = dict(fingerprint), extend

    def save(self, step: int, state: Mapping[str, Any], *, also_keep: int | None = None) -> bool:
        """Write a checkpoint and keep that of step `also_keep` too; False when it could not be written."""
        tensors: dict[str, Tensor] = {f"objective.{name}": t for name, t in self._objective.state().items()}
        state = {**state, "updates": 0, "fingerprint": self._fingerprint}
        if self._zero is not None:
            write = partial(self._zero.save_checkpoint, tag=_ZERO, save_latest=False, exclude_frozen_parameters=True)
            return self._checkpoints.save(step, tensors, state, also_keep=also_keep, beside=write)
        for name, parameter in self._trainable().items():
            slots = self._optimiser.state.get(parameter, {})
            tensors[f"model.{name}"] = parameter
            tensors |= {f"optimiser.{moment}.{name}": slots[moment] for moment in _MOMENTS if moment in slots}
        return self._checkpoints.save(step, tensors, {**state, "updates": self._updates()}, also_keep=also_keep)

    def note(self, step: int, state: Mapping[str, Any]) -> None:
        """Change parts of the state of a checkpoint that was written; where that fails, the state stays as it was."""
        if self._checkpoints.ranks.first:
            note(self._checkpoints.folder / f"step-{step:08d}", state)

    def restore(self) -> dict[str, Any] | None:
        """Go back to the newest valid checkpoint and return its state; None when there is none.

        Raises ValueError when it belongs to a run of another configuration, to another model, or DeepSpeed wrote it and
        does not run now (or the other way round).
        """
        folder = self._checkpoints.newest()
        if folder is None:
            return None
        state = read_state(folder)
        self._check(state["fingerprint"], folder.parent.parent.name)
        stored = Stored(folder)
        if not self._load_zero(folder):
            self._copy_weights(stored)
            self._restore_moments(stored, state["updates"])
        prefix = "objective."
        self._objective.load_state({name.removeprefix(prefix): stored.full(name) for name in stored.names(prefix)})
        return state

    def restore_weights(self, step: int) -> None:
        """The weights of one kept step and nothing else; raises OSError when its checkpoint is damaged."""
        folder = self._checkpoints.folder / f"step-{step:08d}"
        damage = self._checkpoints.damage(folder)
        if damage is not None:
            raise OSError(
                f"{folder}, the best step by validation, is damaged ({damage}); remove the checkpoints from this one on "
                "and run again: what they held is trained anew"
            )
        if not self._load_zero(folder, load_module_only=True):
            self._copy_weights(Stored(folder))

    @property
    def _zero(self) -> Any:
        """DeepSpeed's engine, where it is what trains."""
        return self._model if hasattr(self._model, "zero_optimization_stage") else None

    def _load_zero(self, folder: Path, *, load_module_only: bool = False) -> bool:
        """Whether DeepSpeed has read its part of a checkpoint; raises ValueError when only one of the two is there."""
        if (self._zero is not None) != (folder / _ZERO).is_dir():
            raise ValueError(
                f"{folder} was {'not ' if self._zero else ''}written by DeepSpeed: go on with the distribution.kind that "
                "began the run, or start a new one from its weights with init_from"
            )
        if self._zero is not None:
            only = {"load_module_only": True} if load_module_only else {"load_lr_scheduler_states": False}
            read, _ = self._zero.load_checkpoint(str(folder), tag=_ZERO, load_module_strict=False, **only)
            if read is None:  # DeepSpeed only warns, and would train on with other weights
                raise OSError(f"{folder}: DeepSpeed could not read its part; go on with as many ranks as wrote it")
        return self._zero is not None

    def _copy_weights(self, stored: Stored) -> None:
        for name, parameter in self._trainable().items():
            stored.copy_into(f"model.{name}", parameter.data)

    def _restore_moments(self, stored: Stored, updates: int) -> None:
        for name, parameter in self._trainable().items():
            self._optimiser.state.pop(parameter, None)
            moments = {m: torch.zeros_like(parameter) for m in _MOMENTS if f"optimiser.{m}.{name}" in stored}
            for moment, tensor in moments.items():
                stored.copy_into(f"optimiser.{moment}.{name}", tensor)
            if "exp_avg" in moments:
                moments["step"] = torch.tensor(float(updates), device=parameter.device)
            if moments:
                self._optimiser.state[parameter] = moments

    def _updates(self) -> int:
        return next((int(slots["step"]) for slots in self._optimiser.state.values() if "step" in slots), 0)

    def _trainable(self) -> dict[str, nn.Parameter]:
        found = {}
        for name, parameter in self._model.named_parameters():
            for wrapper in _WRAPPERS:
                name = name.replace(wrapper, "") if wrapper != "module." else name.removeprefix(wrapper)
            if parameter.requires_grad:
                found[name] = parameter
        return found

    def _check(self, found: Mapping[str, str], run: str) -> None:
        may_differ = {"length"} if self._extend else set()
        compared = {*found, *self._fingerprint} - may_differ
        different = sorted(k for k in compared if found.get(k) != self._fingerprint.get(k))
        if different:
            what = "; ".join(f"{k}: {found.get(k)} there, {self._fingerprint.get(k)} now" for k in different)
            raise ValueError(
                f"run folder {run} holds another run ({what}); use a new folder, start from its weights "
                "with init_from, or to train the same run for longer set extend: true"
            )
