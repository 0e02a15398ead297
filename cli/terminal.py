"""A canvas and a conversation in a terminal: what `llada sample` and `llada chat` show."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field

import yaml
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from app.canvas import (
    FRESH,
    GIVEN,
    OPEN,
    REPLACED,
    Frame,
    Trace,
    fixed_tokens,
    for_template,
    parse_template,
    readable,
    speller,
)
from app.conversation import Conversation
from app.models import LoadedModel
from llada_core.modeling.predictor import MaskPredictor
from llada_core.sampling import Step, stream, stream_infill
from llada_core.sampling.graph import Compiled
from llada_core.sampling.params import SamplingParams, changed, exactness, preset
from llada_core.tokenizer import Tokenizer
from llada_core.usage import Usage

BOX = 6  # columns of one position, a space included
SHADES = ("dim", "", "cyan", "bold cyan", "bold bright_white")  # unsure to sure, one for each level
REPLACING = "↻"
MASK, MASK_IN_BLOCK = "░" * (BOX - 1), "▒" * (BOX - 1)
LONGEST_TEMPLATE = 1 << 20  # tokens; the model's own length is checked by the sampler


def picture(frame: Frame, texts: Sequence[str], width: int) -> Text:
    """The canvas in lines of `width` columns; `texts` (W) stand at its positions.

    Masked positions are hatched (closer in the present block), given ones underlined, fresh ones in reverse (behind a sign
    where they replace another token), others by confidence.
    """
    drawn, per_line = Text(), max(1, width // BOX)
    for at, text in enumerate(texts):
        drawn.append(box(frame, at, text), style_of(frame, at, text))
        drawn.append("\n" if at % per_line == per_line - 1 else " ")
    return drawn


def box(frame: Frame, at: int, text: str) -> str:
    """The text of a position, cut or padded to its box."""
    if frame.state[at] == OPEN and not text:
        return MASK_IN_BLOCK if frame.in_block(at) else MASK
    text = REPLACING + text if frame.state[at] == REPLACED else text
    return text.ljust(BOX - 1) if len(text) < BOX else text[: BOX - 2] + "…"


def style_of(frame: Frame, at: int, text: str) -> str:
    """How a position looks; no meaning hangs on colour alone."""
    if frame.state[at] == OPEN:
        return "italic yellow" if text else ("bright_black" if frame.in_block(at) else "dim bright_black")
    if frame.state[at] == GIVEN:
        return "underline"
    return "reverse bold" if frame.state[at] in (FRESH, REPLACED) else SHADES[frame.level(at)]


def draw(trace: Trace, width: int, number: int = -1, *, guesses: bool = False) -> Group:
    """One frame of a spelled trace with its caption."""
    frame = trace.frames[number]
    return Group(Text(frame.caption, "dim"), picture(frame, trace.texts(frame, guesses=guesses), width))


Started = tuple[list[Trace], Iterator[Step]]


def answers(
    model: MaskPredictor,
    tokenizer: Tokenizer,
    texts: list[str],
    params: SamplingParams,
    *,
    usage: Usage | None,
    pins: str,
    compiled: Compiled = "off",
) -> Started:
    """The answers to questions as one batch (without `usage`: what follows the texts themselves), not yet begun."""
    rows = [
        tokenizer.encode(text)
        if usage is None
        else tokenizer.chat_ids(usage.messages([{"role": "user", "content": text}]))
        for text in texts
    ]
    fixed = fixed_tokens(params.max_new_tokens, pins, tokenizer.encode)
    steps = stream(model, rows, params, pinned=fixed, compiled=compiled)
    return [Trace(row, params.max_new_tokens) for row in rows], steps


def templates(
    model: MaskPredictor, tokenizer: Tokenizer, texts: list[str], params: SamplingParams, compiled: Compiled = "off"
) -> Started:
    """Texts with gaps as one batch, not yet begun."""
    mask_id = tokenizer.special.mask_id
    rows = [parse_template(text, tokenizer.encode, mask_id, LONGEST_TEMPLATE) for text in texts]
    steps = stream_infill(model, rows, for_template(params, rows, mask_id), compiled=compiled)
    return [Trace([], len(row)) for row in rows], steps


def follow(traces: list[Trace], steps: Iterator[Step], tokenizer: Tokenizer, *, live: bool) -> None:
    """Takes all steps, a row of the batch in each trace; `live` shows them on stderr."""
    console = Console(stderr=True)
    with Live(console=console, refresh_per_second=25) if live else nullcontext() as screen:
        for step in steps:
            for row, trace in enumerate(traces):
                trace.add(step, row)
                if live:
                    trace.spell(speller(tokenizer))
            if screen is not None:
                screen.update(Group(*(draw(trace, console.width) for trace in traces)), refresh=True)


HELP = {
    "/set NAME=VALUE": "change a sampler setting, as /set steps=16",
    "/preset NAME": "exact, fast or creative; of LLaDA2 also quality or speed",
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
class TerminalChat:
    """A conversation with one model, and how its next answer is written and shown."""

    loaded: LoadedModel
    params: SamplingParams
    conversation: Conversation = field(default_factory=lambda: Conversation(bounded=False))
    console: Console = field(default_factory=Console)
    guesses: bool = False

    def run(self) -> None:
        """Reads lines until /quit or the end of the input; a mistake is one line, and the conversation goes on."""
        self._say(f"{self.loaded.name} · {exactness(self.params)} /help lists the commands.")
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
                    self.conversation.ask(line)
                    self.answer()
            except ValueError as error:
                self.console.print(str(error), style="red", markup=False)

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
            "/undo": lambda _: self._say(f"forgotten: {readable(self.conversation.undo())}"),
            "/new": self._new,
        }
        if word not in acts:
            raise ValueError(f"there is no command {word!r}; /help lists them")
        acts[word](rest.strip())

    def answer(self) -> None:
        """Writes the answer to the last question; Ctrl-C keeps what is there, and a question without answer goes."""
        talk = self.conversation
        live = talk.last
        frames = talk.reply(self.loaded, self.params, look_ahead=self.guesses, limit=math.inf)
        try:
            with closing(frames), Live(console=self.console, refresh_per_second=25, transient=True) as screen:
                for _ in frames:
                    screen.update(self._drawn(), refresh=True)
        except KeyboardInterrupt:
            self._say("stopped; what was written stays")
        if live.counts is not None:
            said = readable(live.text) or "(nothing: the model ended its answer at once)"
            self.console.print(said, markup=False, highlight=False)
            for line in (talk.turns[-1].verdict and talk.turns[-1].verdict.text, live.note, live.counts.sentence()):
                if line:
                    self._say(line)

    def _drawn(self, number: int = -1) -> Group:
        return draw(self.conversation.last.trace, self.console.width, number, guesses=self.guesses)

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
        self.conversation.system = text
        own = self.loaded.usage.system
        self._say("it is told so before every question" if text else f"it is told {own or 'nothing'} beforehand")

    def _new(self, _: str) -> None:
        self.conversation.clear()
        self._say("a new conversation")

    def _guesses(self, _: str) -> None:
        self.guesses = not self.guesses
        self._say(f"guesses are {'shown' if self.guesses else 'hidden'}")

    def _replay(self, _: str) -> None:
        frames = self.conversation.last.trace.frames
        if not frames:
            raise ValueError("nothing was written yet")
        with Live(console=self.console, auto_refresh=False) as screen:
            for number in range(len(frames)):
                screen.update(self._drawn(number), refresh=True)
                time.sleep(min(0.1, 5 / len(frames)) if self.console.is_terminal else 0)

    def _again(self, _: str) -> None:
        self.conversation.again()
        self.answer()
