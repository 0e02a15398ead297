"""What a run knows of itself: its counters, its metrics file with roll-backs, its FLOPs."""

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llada_core.files import complete, document, line_of, parsed
from llada_core.modeling.predictor import MaskPredictor
from llada_core.training.accelerator import Ranks
from llada_core.training.params import RecoveryParams, TrainingParams

_PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # dense bf16 FLOP/s by accelerator name


def active_parameters(model: MaskPredictor) -> int:
    """Parameters that a token is multiplied with: all but the input table, and of the experts the share that is chosen."""
    total = sum(
        p.numel() * (model.expert_share if ".experts." in name else 1.0) for name, p in model.named_parameters()
    )
    outer = (model.get_input_embeddings(), model.get_output_embeddings())
    table, head = (None if layer is None else layer.get_parameter("weight") for layer in outer)
    tied = head is None or head is table
    return int(total) - (0 if tied or table is None else table.numel())


def training_flops(parameters: int, trained_tokens: float, inference_tokens: float = 0.0) -> float:
    """FLOPs of a step."""
    return 6.0 * parameters * trained_tokens + 2.0 * parameters * inference_tokens


def peak_flops(device_name: str) -> float | None:
    """The accelerator's dense bf16 peak; None when it is not in the table."""
    return next((peak for name, peak in _PEAK.items() if name in device_name), None)


# After a resume or a roll-back a line says so, and what it undoes is dropped by `read_metrics`.

Follower = Callable[[dict[str, Any]], None]


class MetricsFile:
    """Appends lines on the first rank; `follow` is called with each line as well."""

    def __init__(self, path: Path, ranks: Ranks, follow: Follower | None = None) -> None:
        self._path, self._first, self._follow = path, ranks.first, follow

    def write(self, step: int, values: Mapping[str, Any], file_name: str | None = None) -> None:
        """One line with step and time; a whole line in one write, so that readers never see half of one."""
        if not self._first:
            return
        line = {"step": step, "time": round(time.time(), 3), **values}
        path = self._path if file_name is None else self._path.with_name(file_name)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(handle, line_of(line).encode())
        finally:
            os.close(handle)
        if self._follow is not None and file_name is None:
            self._follow(line)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines that still hold: after a line with `back_to`, those of later steps are gone. A torn last line is skipped."""
    kept: list[dict[str, Any]] = []
    if not path.exists():
        return kept
    for text in complete(path.read_bytes()):
        try:
            line = parsed(text, str(path))
        except ValueError:
            continue
        if "back_to" in line:  # one that starts anew was killed before its first checkpoint
            kept = [old for old in kept if old["step"] <= line["back_to"] and line.get("event") != "started"]
        if line.get("validates_again"):  # the checkpoint did not know yet what its step's validation had found
            kept = [old for old in kept if old["step"] < line["back_to"] or not _validated(old)]
        kept.append(line)
    return kept


def _validated(line: Mapping[str, Any]) -> bool:
    return any(name.startswith("validation_") for name in line)


class Meter:
    """Adds up (sum, count) pairs on the device and gives their ratios, over all ranks, when asked."""

    def __init__(self) -> None:
        self._totals: dict[str, Tensor] = {}

    def add(self, parts: Mapping[str, Tensor]) -> None:
        """Each part is (2,) or (2, K): sums and counts, added up in float64 (float32 on mps, which has no other).

        Between two lines of a large run lie more tokens than float32 counts one by one.
        """
        for name, part in parts.items():
            wide = part if part.device.type == "mps" else part.to(torch.float64)
            self._totals[name] = self._totals[name].to(wide) + wide if name in self._totals else wide

    def take(self, ranks: Ranks) -> dict[str, float | list[float | None]]:
        """The ratios since the last call (None where nothing was counted); every rank must hold the same names."""
        names = sorted(self._totals)
        # With offload some lie on the CPU (the gradients' norm) and some on the GPU; one transfer brings all of them.
        devices = [self._totals[n].device for n in names]
        device = next((d for d in devices if d.type != "cpu"), torch.device("cpu"))
        parts = [self._totals[n].flatten().to(device, torch.float64, non_blocking=True) for n in names]
        flat = torch.cat(parts).tolist() if names else []
        flat, ratios = ranks.sum(flat), {}
        for name in names:
            size = self._totals[name].numel()
            part, flat = flat[:size], flat[size:]
            values = [s / c if c else None for s, c in zip(part[: size // 2], part[size // 2 :], strict=True)]
            ratios[name] = values if self._totals[name].ndim == 2 else values[0]
        self._totals = {}
        return {name: value for name, value in ratios.items() if value is not None}

    def state(self, ranks: Ranks) -> dict[str, list[Any]]:
        """What was added since the last `take`, over all ranks, as JSON: a stop in between loses nothing of the mean."""
        totals = sorted(self._totals.items())
        return {name: torch.tensor(ranks.sum(part.flatten().tolist())).view_as(part).tolist() for name, part in totals}

    def load_state(self, state: Mapping[str, list[Any]], ranks: Ranks) -> None:
        """Go on from `state`, which the first rank holds for all."""
        self._totals = {name: torch.tensor(part, dtype=torch.float64) * ranks.first for name, part in state.items()}


@dataclass
class Progress:
    """The counters of a run, stored with every checkpoint."""

    step: int = 0
    tokens: float = 0.0
    flops: float = 0.0
    seconds: float = 0.0
    mean_loss: float | None = None
    done: bool = False
    best: float | None = None  # the best validation so far, where the objective is judged by one, and whose it was
    best_step: int | None = None
    since_best: int = 0  # validations
    first: dict[str, float] = field(default_factory=dict)  # the shares that the first validation found

    def share(self, params: TrainingParams, steps_per_epoch: int) -> float:
        """The share of the run that is done, by whichever limit is nearest."""
        limits = []
        if params.max_steps is not None:
            limits.append(self.step / params.max_steps)
        if params.epochs is not None:
            limits.append(self.step / max(1, round(params.epochs * steps_per_epoch)))
        if params.max_flops is not None:
            limits.append(self.flops / params.max_flops)
        return max(limits)

    def compare(self, score: float, patience: int, shares: Mapping[str, float], rows: Mapping[str, int]) -> None:
        """Note a validation of the present step; of equals the earliest stays the best. `patience` 0: never done.

        A step is no better, whatever its score, while one of `shares` (of so many `rows` each) lies below the first
        validation's by more than noise, two standard errors: no task is to pay for another.
        """
        if self.best is None:
            self.first = dict(shares)
        held = all(not _fell(self.first[name], now, rows[name]) for name, now in shares.items() if name in self.first)
        if self.best is None or (held and score > self.best):
            self.best, self.best_step, self.since_best = score, self.step, 0
        else:
            self.since_best += 1
        self.done = 0 < patience <= self.since_best


def _fell(before: float, now: float, rows: int) -> bool:
    return before - now > 2 * math.sqrt((before * (1 - before) + now * (1 - now)) / rows)


class Recovery:
    """The roll-backs of a run folder: from which step on, how much data to skip and how much slower to learn.

    Data position and learning rate are pure functions of the step and this list, so a resume after one is exact.
    """

    def __init__(self, path: Path, params: RecoveryParams, ranks: Ranks) -> None:
        self._path, self._params, self._ranks = path, params, ranks
        self._events: list[dict[str, int]] = document(path) if path.exists() else []

    def data_step(self, step: int) -> int:
        """Which step's data update `step` sees."""
        return step + sum(event["skip"] for event in self._events if step >= event["from"])

    def factor(self, step: int) -> float:
        """By how much the learning rate of update `step` is reduced."""
        return self._params.learning_rate_factor ** sum(step >= event["from"] for event in self._events)

    def record(self, good: int, bad: int) -> bool:
        """Note that training goes on from step `good` without the data up to step `bad`; False when no tries are left."""
        if len(self._events) >= self._params.tries:
            return False
        self._events.append({"from": good, "skip": bad - good})
        if self._ranks.first:
            partial = self._path.with_suffix(".partial")
            partial.write_text(json.dumps(self._events, sort_keys=True), encoding="utf-8")
            os.replace(partial, self._path)
        return True
