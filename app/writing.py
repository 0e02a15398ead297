"""One canvas being written: recorded, timed, stoppable. What chat, infill, sudoku and compare have in common.

Knows steps and traces; does not know where they come from or how they are shown.
"""

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path

from llada_core.sampling.canvas import Step
from llada_core.sampling.trace import FRESH, OPEN, Frame, Trace


@dataclass(frozen=True)
class Counts:
    """What a generation cost."""

    steps: int
    forwards: int
    tokens: int
    seconds: float

    def sentence(self) -> str:
        """The counts as one line."""
        per_forward = self.tokens / max(1, self.forwards)
        per_second = self.tokens / self.seconds if self.seconds > 0 else 0.0
        return (
            f"{self.steps} steps · {self.forwards} forwards · {per_forward:.2f} tokens per forward · "
            f"{self.seconds:.1f} s · {per_second:.0f} tokens/s"
        )


@dataclass
class Writing:
    """The trace of one canvas; `stopping` is set from another thread and ends it after its present step."""

    trace: Trace = field(default_factory=Trace)
    counts: Counts | None = None
    note: str = ""
    stopping: bool = False
    by: Path | None = None  # the folder of the model, for whoever looks at the trace with it later

    def run(
        self,
        steps: Generator[Step, None, None],
        decode: Callable[[int], str],
        *,
        limit: float = 120.0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> Generator[Frame, None, None]:
        """Records the steps, one frame each; stopped or after `limit` seconds, what is there stays and `note` says so.

        The time that the reader of the frames takes is not counted.
        """
        seconds = 0.0
        try:
            while not self.stopping:
                started = clock()
                step = next(steps, None)
                if step is None:
                    break
                frame = self.trace.add(step)
                seconds += clock() - started
                yield frame
                if seconds > limit:
                    self.note = f"Stopped after {limit:.0f} s, the time allowed for one answer; what was written stays."
                    break
            if self.stopping:
                self.note = "Stopped; what was written stays."
        finally:
            steps.close()
            self.trace.spell(decode)
            if self.trace.frames:
                own = ((f.state == FRESH) & (f.tokens == f.guesses) for f in self.trace.frames)
                tokens = int(sum(each.sum() for each in own))  # not what was filled after an answer's end
                self.counts = Counts(len(self.trace.frames), self.trace.frames[-1].forwards, tokens, seconds)

    def tokens(self) -> list[int]:
        """What is written so far; masked positions are left out."""
        if not self.trace.frames:
            return []
        last = self.trace.frames[-1]
        return [int(t) for t, state in zip(last.tokens, last.state, strict=True) if state != OPEN]
