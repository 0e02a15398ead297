"""A training run as a person watches it: a bar with the time left on a terminal, plain lines in a log.

Knows the lines of metrics.jsonl; does not know training.
"""

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0
_SHOWN = ("loss", "nll", "reward", "rollout_correct", "validation_nll", "validation_loss", "validation_correct")


class TrainingProgress:
    """Call it with every line of metrics.jsonl."""

    def __init__(self, stage: str) -> None:
        self._stage, self._shown = stage, 0.0
        self._bar = self._task = None
        if sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
            self._bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(stage, total=1.0)
            self._bar.start()

    def __call__(self, line: dict[str, Any]) -> None:
        """Show a line; training lines at most every ten seconds where there is no bar."""
        if self._bar is not None and self._task is not None and "share" in line:
            self._bar.update(self._task, completed=line["share"], description=sentence(self._stage, line))
            if line["share"] >= 1:
                self._bar.stop()
            return
        now = time.monotonic()
        if "share" not in line or line["share"] >= 1 or now - self._shown >= SECONDS_BETWEEN_LINES:
            self._shown = now if "share" in line else self._shown
            sys.stderr.write(sentence(self._stage, line) + "\n")
            sys.stderr.flush()


def sentence(stage: str, line: dict[str, Any]) -> str:
    """What one line of metrics.jsonl says."""
    words = [f"{stage} step {line['step']}"]
    if "event" in line:
        words.append(line["event"])
    words += [f"{name.replace('_', ' ')} {line[name]:.4g}" for name in _SHOWN if isinstance(line.get(name), float)]
    if "learning_rate" in line:
        words.append(f"learning rate {line['learning_rate']:.2g}")
    if "tokens_per_second" in line:
        words.append(f"{line['tokens_per_second']:.0f} tokens/s")
    if "share" in line:
        words.append(f"{line['share']:.0%}")
    if 0 < line.get("share", 0) < 1 and line.get("seconds"):
        left = line["seconds"] * (1 - line["share"]) / line["share"]
        words.append(f"{int(left // 60)}:{int(left % 60):02d} left")
    return ", ".join(words)
