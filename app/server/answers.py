"""An answer while it is written: the text of it that can no longer change, when it is over, and what it cost."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from app.canvas import GIVEN, OPEN, Frame, Trace
from app.models import LoadedModel
from llada_core.sampling.canvas import Step
from llada_core.sampling.requests import Request

HALF = "\ufffd"  # how the end of a text looks whose last character is not complete yet


@dataclass
class Draft:
    """One choice of what a client asked, behind a `prompt`; `request` is what the sampler writes of it.

    `suffix` columns of the canvas behind it were given. A text is told once nothing before it is open, and, while a rule may take
    tokens back, once its block is done. `stops` cut it, which gives up what is left of the canvas.
    """

    loaded: LoadedModel
    request: Request
    prompt: list[int]
    stops: Sequence[str] = ()
    suffix: int = 0
    whole: bool = False  # a template: all of its text is the answer
    index: int = 0
    trace: Trace = field(init=False)
    told: str = field(init=False, default="")
    finish: str | None = field(init=False, default=None)
    note: str = ""
    taken: int = field(init=False, default=0)  # steps

    def __post_init__(self) -> None:
        self.trace = Trace([] if self.whole else self.prompt)

    def advance(self, step: Step | None) -> str:
        """Takes the next step, None behind the last, and returns the text that is new and certain; `finish` is set once the
        answer is over.
        """
        if step is not None:
            self.trace.frames[:-1] = []  # only what a token's confidence was is needed of what has been
            self.trace.add(step)
            self.taken += 1
        text, over = self._certain(last=step is None)
        cut = first_of(text, self.stops)
        if cut is not None:
            text, over = text[:cut], True
        elif not over:
            text = text[: len(text) - held_back(text, self.stops)]
        if over:
            self.finish = "stop" if cut is not None or self._ended() else "length"
        new, self.told = text[len(self.told) :], text if len(text) > len(self.told) else self.told
        return new

    def give_up(self, note: str) -> str:
        """Ends it where it is, and returns what was not told of the text before the first gap."""
        self.finish, self.note = "length", note
        text, _ = self._certain(last=False)
        new, self.told = text[len(self.told) :], text
        return new

    @property
    def frame(self) -> Frame | None:
        """The canvas as it is now."""
        return self.trace.frames[-1] if self.trace.frames else None

    def tokens(self) -> list[int]:
        """The answer's, up to the first gap and without its end."""
        frame = self.frame
        if frame is None:
            return []
        tokens = frame.tokens[: len(frame.tokens) - self.suffix].tolist()
        state = frame.state[: len(tokens)]
        open_at = np.flatnonzero(state == OPEN)
        tokens = tokens[: int(open_at[0]) if len(open_at) else len(tokens)]
        if self.whole:
            return tokens
        ends = self.loaded.tokenizer.end_ids
        return tokens[: next((i for i, token in enumerate(tokens) if token in ends), len(tokens))]

    def log_probabilities(self) -> list[tuple[str, float]]:
        """Each token's text, and the logarithm of its probability when it was written."""
        assert self.frame is not None
        decode = self.loaded.tokenizer.decode
        sure = self.frame.confidence.tolist()
        return [
            (decode([token]), math.log(max(sure[i], 1e-45)) if not math.isnan(sure[i]) else 0.0)
            for i, token in enumerate(self.tokens())
        ]

    def usage(self) -> dict[str, int]:
        """Tokens of prompt and answer, and forwards of the model."""
        return {
            "prompt_tokens": len(self.prompt),
            "completion_tokens": len(self.tokens()),
            "forwards": self.frame.forwards if self.frame else 0,
        }

    def canvas(self) -> dict[str, Any]:
        """The canvas as a client shows it: the text of each position, null where it is open, and the present block."""
        assert self.frame is not None
        self.trace.spell(self.loaded.decode)
        texts = self.trace.texts(self.frame)
        shown = [None if state == OPEN else text for text, state in zip(texts, self.frame.state, strict=True)]
        return {"step": self.taken, "forwards": self.frame.forwards, "block": list(self.frame.block), "canvas": shown}

    def _certain(self, *, last: bool) -> tuple[str, bool]:
        """The text that stays, and whether there is no more to come."""
        frame = self.frame
        if frame is None:
            return "", last
        tokens, is_open = self.tokens(), bool((frame.state == OPEN).any())
        # A rule of one's own may take back what stands in the block; one that edits, also once nothing in it is open.
        edits = self.request.edits
        changing = edits or (self.request.params.rule is not None and is_open)
        sure = frame.block[0] if changing and not last else len(frame.tokens)
        tokens = tokens[:sure]
        done = last or not (is_open or edits) or (len(tokens) < sure and self._ended(len(tokens)))
        tokenizer = self.loaded.tokenizer
        text = tokenizer.decode(tokens) if self.whole else tokenizer.answer_text(tokens)
        return (text if done else text.rstrip(HALF)), done

    def _ended(self, count: int | None = None) -> bool:
        """Whether an end token follows the tokens that are certain."""
        frame, count = self.frame, len(self.tokens()) if count is None else count
        if frame is None or self.whole or count >= len(frame.tokens) - self.suffix:
            return False
        written = frame.state[count] not in (OPEN, GIVEN)
        return written and int(frame.tokens[count]) in self.loaded.tokenizer.end_ids


def first_of(text: str, stops: Sequence[str]) -> int | None:
    """Where the first of the stop strings begins."""
    return min((at for at in (text.find(stop) for stop in stops) if at >= 0), default=None)


def held_back(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end may be the beginning of a stop string."""
    # No longer than the text: of a stop string of a megabyte, each beginning would be a copy.
    lengths = (n for stop in stops for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n]))
    return max(lengths, default=0)
