"""What a run remembers of its roll-backs: from which step on, how much data to skip and how much slower to learn.

Data position and learning rate are pure functions of the step and this list, so that a resume after a recovery is exact.
"""

import json
import os
from pathlib import Path

from llada_core.config.training import RecoveryParams
from llada_core.training.ranks import Ranks


class Recovery:
    """The recoveries of a run folder."""

    def __init__(self, path: Path, params: RecoveryParams, ranks: Ranks) -> None:
        self._path, self._params, self._ranks = path, params, ranks
        self._events: list[dict[str, int]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []

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
