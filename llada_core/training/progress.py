"""How far a run is and which of its validations was the best; stored with every checkpoint. Knows no model and no files."""

from dataclasses import dataclass

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

    def compare(self, score: float, patience: int) -> None:
        """Note a validation of the present step; of equals the earliest stays the best. `patience` 0: never done."""
        if self.best is None or score > self.best:
            self.best, self.best_step, self.since_best = score, self.step, 0
        else:
            self.since_best += 1
        self.done = 0 < patience <= self.since_best
