"""What a run knows of itself: how far it is, which validation was the best, and its roll-backs. Knows no model."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from llada_core.files import document
from llada_core.training.params import RecoveryParams, TrainingParams
from llada_core.training.ranks import Ranks


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
