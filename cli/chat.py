"""The conversation behind `llada chat`: turns, slash commands, the canvas live while an answer is written.

Knows a loaded model and a rich console; does not know where models come from.
"""

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field

import yaml
from rich.console import Console, Group
from rich.live import Live

from app.canvas import Trace, readable, speller, typed
from app.conversation import Writing
from cli.options import changed
from cli.talk import draw
from llada_core.modeling.predictor import MaskPredictor
from llada_core.sampling import stream
from llada_core.sampling.params import SamplingParams, exactness, preset
from llada_core.tokenizer import Tokenizer

HELP = {
    "/set NAME=VALUE": "change a sampler setting, as /set steps=16",
    "/preset NAME": "exact, fast or creative",
    "/settings": "show all settings",
    "/system TEXT": "what the model is told beforehand (nothing: forget it)",
    "/guesses": "show or hide what it would write at masked positions",
    "/replay": "show the last answer being written again",
    "/again": "write the last answer anew",
    "/undo": "forget the last question and answer",
    "/new": "forget the conversation",
    "/quit": "leave (so does Ctrl-D)",
}


@dataclass
class Conversation:
    """What was said so far, and how the next answer is written."""

    model: MaskPredictor
    tokenizer: Tokenizer
    params: SamplingParams
    system: str
    console: Console
    turns: list[dict[str, str]] = field(default_factory=list)
    trace: Trace = field(default_factory=Trace)
    guesses: bool = False

    def run(self, name: str) -> None:
        """Reads lines until /quit or the end of the input; a mistake is one line, and the conversation goes on."""
        self._say(f"{name} · {exactness(self.params)} /help lists the commands.")
        while True:
            try:
                line = self.console.input("[bold]> [/bold]").strip()
            except (EOFError, KeyboardInterrupt):
                return
            if line == "/quit":
                return
            try:
                if line.startswith("/"):
                    self.command(line)
                elif line:
                    self.turns.append({"role": "user", "content": typed(line)})
                    self.answer()
            except ValueError as error:
                self.console.print(str(error), style="red", markup=False)
                if self.turns and self.turns[-1]["role"] == "user":
                    self.turns.pop()

    def command(self, line: str) -> None:
        """Does what a slash command says; raises ValueError for one that there is not."""
        word, _, rest = line.partition(" ")
        acts: dict[str, Callable[[str], None]] = {
            "/help": lambda _: self._say("\n".join(f"{key:18} {what}" for key, what in HELP.items())),
            "/set": self._set,
            "/preset": self._preset,
            "/settings": lambda _: self._say("\n".join(f"{key} = {value}" for key, value in vars(self.params).items())),
            "/system": self._system,
            "/guesses": self._guesses,
            "/replay": self._replay,
            "/again": self._again,
            "/undo": self._undo,
            "/new": self._new,
        }
        if word not in acts:
            raise ValueError(f"there is no command {word!r}; /help lists them")
        acts[word](rest.strip())

    def answer(self) -> None:
        """Writes the answer to the last question; Ctrl-C keeps what is there."""
        said = [{"role": "system", "content": typed(self.system)}] if self.system else []
        self.trace = Trace(self.tokenizer.chat_ids([*said, *self.turns]), self.params.max_new_tokens)
        steps = stream(self.model, [self.trace.prompt], self.params, look_ahead=self.guesses)
        writing = Writing(self.trace)
        frames = writing.run((step for step in steps), speller(self.tokenizer), limit=float("inf"))
        try:
            with closing(frames), Live(console=self.console, refresh_per_second=25, transient=True) as screen:
                for _ in frames:
                    screen.update(self._drawn(), refresh=True)
        except KeyboardInterrupt:
            self._say("stopped; what was written stays")
        if writing.counts is None:
            self.turns.pop()
            return
        text = self.tokenizer.answer_text(writing.tokens())
        self.turns.append({"role": "assistant", "content": text})
        self.console.print(
            readable(text) or "(nothing: the model ended its answer at once)", markup=False, highlight=False
        )
        self._say(writing.counts.sentence())

    def _drawn(self, number: int = -1) -> Group:
        return draw(self.trace, self.tokenizer, self.console.width, number, guesses=self.guesses)

    def _say(self, text: str) -> None:
        self.console.print(text, style="dim", markup=False, highlight=False)

    def _set(self, text: str) -> None:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError("write it as /set name=value")
        self.params = changed(self.params, {name.strip(): yaml.safe_load(value)})
        self._say(exactness(self.params))

    def _preset(self, name: str) -> None:
        self.params = preset(name, self.params)
        self._say(exactness(self.params))

    def _system(self, text: str) -> None:
        self.system = text
        self._say("it is told so before every question" if text else "it is told nothing beforehand")

    def _new(self, _: str) -> None:
        self.turns.clear()
        self._say("a new conversation")

    def _guesses(self, _: str) -> None:
        self.guesses = not self.guesses
        self._say(f"guesses are {'shown' if self.guesses else 'hidden'}")

    def _replay(self, _: str) -> None:
        if not self.trace.frames:
            raise ValueError("nothing was written yet")
        with Live(console=self.console, auto_refresh=False) as screen:
            for number in range(len(self.trace.frames)):
                screen.update(self._drawn(number), refresh=True)
                time.sleep(min(0.1, 5 / len(self.trace.frames)) if self.console.is_terminal else 0)

    def _again(self, _: str) -> None:
        if not self.turns:
            raise ValueError("nothing was asked yet")
        before = self.turns.pop()
        try:
            self.answer()
        except ValueError:
            self.turns.append(before)
            raise

    def _undo(self, _: str) -> None:
        if not self.turns:
            raise ValueError("there is nothing to undo")
        self._say(f"forgotten: {readable(self.turns[-2]['content'])}")
        del self.turns[-2:]
