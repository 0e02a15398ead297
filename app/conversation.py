"""One conversation, its running answer, Stop: the same for the page, the terminal and programs."""

import math
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path

from app.canvas import FRESH, OPEN, Frame, Trace, typed
from app.models import LoadedModel, UserError
from llada_core.sampling.canvas import Step
from llada_core.sampling.params import SamplingParams

LONGEST_MESSAGE = 20_000  # characters, also of the system prompt
MOST_TURNS = 50
EMPTY = "The model ended its answer at once (nothing but end-of-text). Try other words or more steps."


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
class LiveAnswer:
    """One canvas while it is written, and what came of it.

    `stopping` is set from another thread and ends it after its present step. `text` and `counts` are there once it has
    ended (no counts: nothing was written), `note` if there is something to say of how it ended. `by` is the folder of
    the model, for whoever looks at the trace with it later.
    """

    trace: Trace = field(default_factory=Trace)
    counts: Counts | None = None
    text: str = ""
    note: str = ""
    stopping: bool = False
    by: Path | None = None

    def run(
        self,
        loaded: LoadedModel,
        steps: Generator[Step, None, None],
        *,
        read: Callable[[list[int]], str] | None = None,
        limit: float = 120.0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> Generator[Frame, None, None]:
        """Records the steps, one frame each; stopped or after `limit` seconds, what is there stays and `note` says so.

        `read` makes the text of the tokens written (none: an answer's, which ends at its end token). The time that the
        reader of the frames takes is not counted.
        """
        self.by, seconds = loaded.folder, 0.0
        try:
            while not self.stopping:
                started = clock()
                step = next(steps, None)
                if step is None:
                    break
                frame = self.trace.add(step)
                self.trace.spell(loaded.decode)
                seconds += clock() - started
                yield frame
                if seconds > limit:
                    self.note = f"Stopped after {limit:.0f} s, the time allowed for one answer; what was written stays."
                    break
            if self.stopping:
                self.note = "Stopped; what was written stays."
        finally:
            steps.close()
            self.text = (read or loaded.tokenizer.answer_text)(self.tokens())
            if self.trace.frames:
                own = ((f.state == FRESH) & (f.tokens == f.guesses) for f in self.trace.frames)
                tokens = int(sum(each.sum() for each in own))  # not what was filled after an answer's end
                self.counts = Counts(len(self.trace.frames), self.trace.frames[-1].forwards, tokens, seconds)
                if not self.text.strip() and not self.note:
                    self.note = EMPTY

    def tokens(self) -> list[int]:
        """What is written so far; masked positions are left out."""
        if not self.trace.frames:
            return []
        last = self.trace.frames[-1]
        return [int(t) for t, state in zip(last.tokens, last.state, strict=True) if state != OPEN]


def prompt_ids(loaded: LoadedModel, messages: list[dict[str, str]], params: SamplingParams) -> list[int]:
    """The ids of a conversation, as the model is to be asked; raises UserError when they and the answer are longer than the model can read."""
    prompt = loaded.tokenizer.chat_ids(loaded.usage.messages(messages))
    if len(prompt) + params.max_new_tokens > loaded.context:
        raise UserError(
            f"The conversation has {len(prompt)} tokens and the answer asks for {params.max_new_tokens}; this model "
            f"reads {loaded.context} at most. Undo some turns, start a new conversation, or lower max_new_tokens."
        )
    return prompt


def question(text: str, *, longest: float = LONGEST_MESSAGE) -> dict[str, str]:
    """A person's text as a message; raises UserError for an empty or far too long one."""
    text = typed(text)
    if not text.strip():
        raise UserError("Write something first: the message is empty.")
    _bounded("message", text, longest)
    return {"role": "user", "content": text}


def _bounded(what: str, text: str, longest: float) -> None:
    if len(text) > longest:
        raise UserError(f"The {what} has {len(text):,} characters; at most {longest:,} are read. Shorten it.")


@dataclass
class Turn:
    """What was asked, and the answer once there is one; `before`, the answer that it replaces, if it is written anew."""

    user: str
    answer: str | None = None
    before: str | None = None


@dataclass
class Conversation:
    """Turns of question and answer; `last` is the denoising of the last answer.

    The bounds are those of a page that others share; without them (`bounded` False, in a terminal) only the model's own
    length counts.
    """

    system: str = ""
    turns: list[Turn] = field(default_factory=list)
    last: LiveAnswer = field(default_factory=LiveAnswer)
    writing: bool = False
    bounded: bool = True
    picture: str = ""  # what a view drew of the last answer, for the view alone

    @property
    def waiting(self) -> bool:
        """Whether the last question has no answer yet."""
        return bool(self.turns) and self.turns[-1].answer is None

    def ask(self, text: str) -> None:
        """Adds a turn; raises UserError for an empty or far too long message, or while an answer is being written."""
        self._require_idle()
        if self.waiting:
            raise UserError("The last question still waits for its answer: press Stop, or Write again.")
        longest = LONGEST_MESSAGE if self.bounded else math.inf
        asked = question(text, longest=longest)
        _bounded("system prompt", self.system, longest)
        if self.bounded and len(self.turns) >= MOST_TURNS:
            raise UserError(f"This conversation has {MOST_TURNS} turns; start a new one.")
        self.turns.append(Turn(asked["content"]))
        self.last = LiveAnswer()

    def edit(self, index: int, text: str) -> None:
        """Replaces the question of turn `index` and forgets everything after it."""
        self._require_idle()
        kept, self.turns = self.turns, self.turns[:index]
        try:
            self.ask(text)
        except UserError:
            self.turns = kept
            raise

    def again(self) -> None:
        """Lets `reply` write the last answer anew; the present one comes back if that cannot be."""
        self._require_idle()
        if not self.turns:
            raise UserError("There is nothing to write again yet.")
        turn = self.turns[-1]
        turn.before, turn.answer = turn.answer, None
        self.last = LiveAnswer()

    def undo(self) -> str:
        """Removes the last turn and returns its question."""
        self._require_idle()
        if not self.turns:
            raise UserError("There is nothing to undo.")
        self.last, self.picture = LiveAnswer(), ""
        return self.turns.pop().user

    def clear(self) -> None:
        """Starts a new conversation under the same system prompt."""
        self._require_idle()
        self.turns, self.last, self.picture = [], LiveAnswer(), ""

    def stop(self) -> None:
        """Ends the running answer after its present step; called from any thread."""
        self.last.stopping = True

    def give_up(self) -> None:
        """Ends the wait for an answer of which nothing could be written: the one before comes back, if there was one."""
        if self.waiting:
            self.turns[-1].answer = self.turns[-1].before or ""

    def _require_idle(self) -> None:
        if self.writing:
            raise UserError("An answer is being written; press Stop first.")

    def messages(self) -> list[dict[str, str]]:
        """The conversation as the chat template takes it."""
        beforehand = typed(self.system)
        system = [{"role": "system", "content": beforehand}] if beforehand.strip() else []
        said = [
            {"role": role, "content": content}
            for turn in self.turns
            for role, content in (("user", turn.user), ("assistant", turn.answer))
            if content is not None
        ]
        return system + said

    def reply(
        self,
        loaded: LoadedModel,
        params: SamplingParams,
        *,
        look_ahead: bool = False,
        limit: float = 120.0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> Generator[Frame, None, None]:
        """Writes the answer to the last turn, frame by frame; Stop or `limit` seconds keep what is there.

        Raises UserError when there is nothing to answer or the conversation no longer fits the model.
        """
        if not self.waiting:
            raise UserError("There is no question to answer.")
        self.writing = True
        try:
            prompt = prompt_ids(loaded, self.messages(), params)
            self.last.trace = Trace(prompt)
            steps = loaded.write(prompt, params, look_ahead=look_ahead)
            yield from self.last.run(loaded, steps, limit=limit, clock=clock)
        finally:
            if self.last.counts is not None:
                self.turns[-1].answer = self.last.text
            self.give_up()
            self.writing = False
