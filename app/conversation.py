"""One conversation, its running answer, Stop: the same for the page, the terminal and programs."""

import math
import time
from collections.abc import Callable, Generator, Set
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from app.canvas import FRESH, OPEN, UNWRITTEN, Frame, Trace, counted, typed
from app.guide import Verdict, judged
from app.models import LoadedModel, UserError
from llada_core.sampling.canvas import Step
from llada_core.sampling.params import SamplingParams

LONGEST_MESSAGE = 20_000  # characters, also of the system prompt
MOST_TURNS = 50
EMPTY = "The model ended its answer at once (nothing but end-of-text). Try other words or more steps."
ALONE = "This model learnt single questions: the turns before were not shown to it."


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
            f"{counted(self.steps, 'step')} · {counted(self.forwards, 'forward')} · {per_forward:.2f} tokens per forward · "
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
    shown_in: float = 0.0  # seconds that a view takes to show it; a person may change their mind
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
                self.note = (
                    "Stopped; what was written stays." if self.trace.frames else "Stopped before anything was written."
                )
        finally:
            steps.close()
            tokenizer = loaded.tokenizer
            if self.whole or not self.trace.frames:
                self.text = (read or tokenizer.answer_text)(self.tokens())
            else:
                self.text = self._with_gaps(read or tokenizer.answer_text, frozenset() if read else tokenizer.end_ids)
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

    @property
    def whole(self) -> bool:
        """Whether nothing is left to be written."""
        return bool(self.trace.frames) and not (self.trace.frames[-1].state == OPEN).any()

    def _with_gaps(self, read: Callable[[list[int]], str], ends: Set[int]) -> str:
        """What is written of an unfinished answer, `UNWRITTEN` for each position that is not, up to an end or the last."""
        last, parts = self.trace.frames[-1], []
        for is_open, run in groupby(
            zip(last.tokens.tolist(), last.state.tolist(), strict=True), lambda at: at[1] == OPEN
        ):
            tokens = [token for token, _ in run]
            parts.append(UNWRITTEN * len(tokens) if is_open else read(tokens))
            if not is_open and not ends.isdisjoint(tokens):
                return "".join(parts)
        return "".join(parts).rstrip(UNWRITTEN) + "…"


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
    """What was asked, the answer once there is one, and what can be said of it."""

    user: str
    answer: str | None = None
    verdict: Verdict | None = None


@dataclass
class Conversation:
    """Turns of question and answer; `last` is the denoising of the last answer.

    A question of whose answer nothing can be written leaves no trace: the turns are as they were, and `returned` holds its
    text, with the number of the turn that it was to replace.
    The bounds are those of a page that others share; without them (`bounded` False, in a terminal) only the model's own
    length counts.
    """

    system: str = ""
    turns: list[Turn] = field(default_factory=list)
    last: LiveAnswer = field(default_factory=LiveAnswer)
    writing: bool = False
    bounded: bool = True
    picture: str = ""  # what a view drew of the last answer, for the view alone
    told: str = ""  # what was refused while an answer was being written, said until it is
    returned: tuple[str, int | None] = ("", None)
    kept: tuple[list[Turn], LiveAnswer] = field(default_factory=lambda: ([], LiveAnswer()))  # before the last question

    @property
    def waiting(self) -> bool:
        """Whether the last question has no answer yet."""
        return bool(self.turns) and self.turns[-1].answer is None

    def ask(self, text: str) -> None:
        """Adds a turn; raises UserError for an empty or far too long message, or while an answer is being written."""
        self._require_idle()
        if self.waiting:
            raise UserError("The last question still waits for its answer: press Stop, or Write again.")
        self._begin(self.turns, text)

    def edit(self, index: int, text: str) -> None:
        """Replaces the question of turn `index` and forgets everything after it, once there is an answer."""
        self._require_idle()
        self._begin(self.turns[:index], text)

    def again(self) -> None:
        """Lets `reply` write the last answer anew; the present one comes back if that cannot be."""
        self._require_idle()
        if not self.turns:
            raise UserError("There is nothing to write again yet.")
        self._begin(self.turns[:-1], self.turns[-1].user)

    def _begin(self, before: list[Turn], text: str) -> None:
        longest = LONGEST_MESSAGE if self.bounded else math.inf
        asked = question(text, longest=longest)
        _bounded("system prompt", self.system, longest)
        if self.bounded and len(before) >= MOST_TURNS:
            raise UserError(f"This conversation has {MOST_TURNS} turns; start a new one.")
        self.kept, self.returned = (self.turns, self.last), ("", None)
        self.turns, self.last, self.picture = [*before, Turn(asked["content"])], LiveAnswer(), ""

    def undo(self) -> str:
        """Removes the last turn and returns its question."""
        self._require_idle()
        if not self.turns:
            raise UserError("There is nothing to undo.")
        self.last, self.picture = LiveAnswer(), ""
        return self.turns.pop().user

    def clear(self) -> None:
        """Starts a new conversation under the same system prompt; an answer that is being written is stopped and gone."""
        self.stop()
        self.turns, self.last, self.writing, self.picture, self.told = [], LiveAnswer(), False, "", ""

    def stop(self) -> None:
        """Ends the running answer after its present step; called from any thread."""
        self.last.stopping = True

    def give_up(self) -> None:
        """Takes back a question of whose answer nothing could be written; its text is `returned`, unless it was there before."""
        if not self.waiting:
            return
        asked, place = self.turns[-1].user, len(self.turns) - 1
        self.turns, self.last = self.kept
        replaced = self.turns[place].user if place < len(self.turns) else None
        if asked != replaced:
            self.returned = asked, None if replaced is None else place

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
        live, turn = self.last, self.turns[-1]
        self.writing = True
        try:
            prompt = prompt_ids(loaded, self.messages(), params)
            by_blocks = loaded.model.block_length is not None
            live.trace = Trace(prompt, blocks=params.block_length if by_blocks else None)
            steps = loaded.write(prompt, params, look_ahead=look_ahead)
            yield from live.run(loaded, steps, limit=limit, clock=clock)
        finally:
            if self.last is live:  # else a new conversation was begun meanwhile
                if live.counts is not None:
                    turn.answer = live.text
                    turn.verdict = judged(turn.user, live.text, loaded.usage) if live.whole else None
                    if turn.verdict is not None and live.note == EMPTY:
                        live.note = ""  # the verdict says more
                    alone = loaded.usage.turns == "single" and len(self.turns) > 1
                    said = [live.note, *([ALONE] if alone else []), loaded.doubts(params)]
                    live.note = " ".join(said).strip()
                self.give_up()
                self.writing, self.told = False, ""
