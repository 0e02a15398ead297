"""How far a run is and which of its validations was the best; stored with every checkpoint. Knows no model and no files."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from llada_core.config.training import TrainingParams


@dataclass
class Progress:
    """The counters of a run."""

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
