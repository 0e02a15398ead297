"""One conversation, its running answer, Stop."""

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from app.canvas import FRESH, OPEN, Frame, Trace, typed
from llada_core.sampling.canvas import Step
from llada_core.sampling.params import SamplingParams

if TYPE_CHECKING:
    from app.models import Engine


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


LONGEST_MESSAGE = 20_000  # characters, also of the system prompt
MOST_TURNS = 50


@dataclass
class Turn:
    """What was asked, and the answer once there is one."""

    user: str
    answer: str | None = None


@dataclass
class ChatSession:
    """A conversation with at most `MOST_TURNS` turns; `last` is the denoising of its last answer."""

    system: str = ""
    turns: list[Turn] = field(default_factory=list)
    last: Writing = field(default_factory=Writing)
    writing: bool = False
    picture: str = ""  # what a view drew of the last answer, for the view alone

    @property
    def waiting(self) -> bool:
        """Whether the last question has no answer yet."""
        return bool(self.turns) and self.turns[-1].answer is None

    def ask(self, text: str) -> None:
        """Adds a turn; raises Refused for an empty or far too long message, or while an answer is being written."""
        self._idle()
        if self.waiting:
            raise Refused("The last question still waits for its answer: press Stop, or Write again.")
        text = typed(text)
        if not text.strip():
            raise Refused("Write something first: the message is empty.")
        for what, said in (("message", text), ("system prompt", self.system)):
            if len(said) > LONGEST_MESSAGE:
                raise Refused(
                    f"The {what} has {len(said):,} characters; at most {LONGEST_MESSAGE:,} are read. Shorten it."
                )
        if len(self.turns) >= MOST_TURNS:
            raise Refused(f"This conversation has {MOST_TURNS} turns; start a new one.")
        self.turns.append(Turn(text))
        self.last = Writing()

    def edit(self, index: int, text: str) -> None:
        """Replaces the question of turn `index` and forgets everything after it."""
        self._idle()
        kept, self.turns = self.turns, self.turns[:index]
        try:
            self.ask(text)
        except Refused:
            self.turns = kept
            raise

    def again(self) -> None:
        """Forgets the last answer, so that `reply` writes another."""
        self._idle()
        if not self.turns:
            raise Refused("There is nothing to write again yet.")
        self.turns[-1].answer = None
        self.last = Writing()

    def undo(self) -> str:
        """Removes the last turn and returns its question."""
        self._idle()
        if not self.turns:
            raise Refused("There is nothing to undo.")
        self.last, self.picture = Writing(), ""
        return self.turns.pop().user

    def clear(self) -> None:
        """Starts a new conversation under the same system prompt."""
        self._idle()
        self.turns, self.last, self.picture = [], Writing(), ""

    def stop(self) -> None:
        """Ends the running answer after its present step; called from any thread."""
        self.last.stopping = True

    def _idle(self) -> None:
        if self.writing:
            raise Refused("An answer is being written; press Stop first.")

    def messages(self) -> list[dict[str, str]]:
        """The conversation as the chat template takes it."""
        told = typed(self.system)
        system = [{"role": "system", "content": told}] if told.strip() else []
        said = [
            {"role": role, "content": content}
            for turn in self.turns
            for role, content in (("user", turn.user), ("assistant", turn.answer))
            if content is not None
        ]
        return system + said

    def reply(
        self,
        writer: "Engine",
        params: SamplingParams,
        *,
        watch: bool = False,
        limit: float = 120.0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> Generator[Frame, None, None]:
        """Writes the answer to the last turn, frame by frame; Stop or `limit` seconds keep what is there.

        Raises Refused when there is nothing to answer or the conversation no longer fits the model.
        """
        if not self.waiting:
            raise Refused("There is no question to answer.")
        prompt = writer.chat_ids(self.messages())
        fits(writer, len(prompt), params)
        self.last.trace, self.writing = Trace(prompt), True
        steps = writer.write(prompt, params, watch=watch)
        frames = self.last.run(steps, writer.decode, limit=limit, clock=clock)
        try:
            yield from frames
        finally:
            frames.close()
            self._finish(writer)
            self.writing = False

    def _finish(self, writer: "Engine") -> None:
        answer = writer.text(self.last.tokens())
        self.turns[-1].answer = answer
        if not answer.strip() and not self.last.note:
            self.last.note = (
                "The model ended its answer at once (nothing but end-of-text). Try other words or more steps."
            )


def fits(writer: "Engine", prompt: int, params: SamplingParams) -> None:
    """Raises Refused when prompt and answer are longer than the model can read."""
    if prompt + params.max_new_tokens > writer.context:
        raise Refused(
            f"The conversation has {prompt} tokens and the answer asks for {params.max_new_tokens}; this model reads "
            f"{writer.context} at most. Undo some turns, start a new conversation, or lower max_new_tokens."
        )


class Refused(ValueError):  # noqa: N818 - a sentence for a person rather than a fault
    """Something the person asked for that cannot be done; the text is a sentence for them."""


@contextmanager
def refusing() -> Iterator[None]:
    """What the library says of a value that does not fit is a sentence for the person."""
    try:
        yield
    except ValueError as error:
        raise Refused(str(error)) from error
