"""What each fault cost: how often it was injected, the steps computed again, the seconds until the run went on.

`pytest tests/slurm` prints the table at its end.
"""

import time
from dataclasses import dataclass, field

from tasks.record.runs import RunFolder


@dataclass
class Recovery:
    """One fault: `struck()` when it is injected (or mended, or answered by a command), then one of the others."""

    fault: str
    until: str
    seconds: list[float] = field(default_factory=list)
    again: list[int] = field(default_factory=list)
    _struck: float = 0.0

    def struck(self, at: float | None = None) -> None:
        """The clock starts, now or at a time since the epoch."""
        self._struck = time.time() if at is None else at

    def over(self, again: int = 0, at: float | None = None) -> None:
        """The run goes on, with so many steps to compute again."""
        self.seconds.append((time.time() if at is None else at) - self._struck)
        self.again.append(again)

    def next_step(self, run: RunFolder) -> None:
        """The run went on with the first step that a toy stage noted after the fault."""
        noted = [line.split() for line in (run.path / "steps.txt").read_text().splitlines()]
        steps = [int(line[0]) for line in noted]
        self.over(len(steps) - len(set(steps)), min(float(line[2]) for line in noted if float(line[2]) > self._struck))

    def row(self) -> str:
        """A line of the table."""
        low, high = min(self.seconds), max(self.seconds)
        seconds = f"{low:.1f}" if len(self.seconds) == 1 else f"{low:.1f} to {high:.1f}"
        return f"| {self.fault} | {len(self.seconds)} | {max(self.again)} | {seconds} | {self.until} |"


HEADER = "| fault | times | steps computed again | seconds | until |\n|---|---|---|---|---|"
