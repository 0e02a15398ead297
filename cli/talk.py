"""llada sample and llada chat."""

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from cli.options import (
    Bits,
    Block,
    Cache,
    Device,
    Length,
    Model,
    Preset,
    Seed,
    Set,
    Steps,
    Temperature,
    Threshold,
    loaded,
    name_or_champion,
    settings,
)
from llada_core.files import line_of
from llada_core.sampling.params import SamplingParams
from tasks.errors import one_line_errors

if TYPE_CHECKING:
    from app.canvas import Trace
    from llada_core.modeling.predictor import MaskPredictor
    from llada_core.sampling import Step
    from llada_core.tokenizer import Tokenizer
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field

import yaml

from app.canvas import Trace, readable, speller, typed
from app.conversation import Writing
from cli.options import changed
from llada_core.modeling.predictor import MaskPredictor
from llada_core.sampling import stream
from llada_core.sampling.params import exactness, preset
from llada_core.tokenizer import Tokenizer


def sample(
    prompts: Annotated[list[str], typer.Argument(help="questions, answered as one batch; - reads one per line")],
    model: Model = "",
    infill: Annotated[bool, typer.Option(help="the texts have gaps to fill: [[5]] is room for five tokens")] = False,
    pin: Annotated[str, typer.Option(help="words of the answer at fixed positions, as 0:Once,12:end")] = "",
    raw: Annotated[bool, typer.Option(help="continue the text itself instead of answering it in a chat")] = False,
    visualize: Annotated[bool, typer.Option("--visualize", "-v", help="show every denoising step")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="one JSON object per answer, with forwards and tokens")
    ] = False,
    preset: Preset = "",
    max_new_tokens: Length = None,
    block_length: Block = None,
    steps: Steps = None,
    temperature: Temperature = None,
    threshold: Threshold = None,
    cache: Cache = None,
    seed: Seed = None,
    device: Device = "auto",
    bits: Bits = None,
    others: Set = [],  # noqa: B006 (typer's way; never changed)
) -> None:
    """Answer one or more questions, or fill the gaps of texts.

    llada sample "Solve the sudoku 1030340020030001" -v
    """
    with one_line_errors():
        from app.canvas import readable, typed

        given = {
            "max_new_tokens": max_new_tokens, "block_length": block_length, "steps": steps, "temperature": temperature,
            "threshold": threshold, "cache": cache, "seed": seed,
        }  # fmt: skip
        texts = [typed(line.rstrip("\n")) for p in prompts for line in (sys.stdin if p == "-" else [p])]
        name = name_or_champion(model)
        params = settings(name, preset, given, others)
        writer, tokenizer = loaded(name, device, bits)
        batch = _gaps(texts, tokenizer, params) if infill else _questions(texts, tokenizer, params, raw=raw)
        seen = _steps(writer, tokenizer, batch[0], batch[2], infill=infill, pin=pin)
        traces = _watch(seen, batch[1], tokenizer, live=visualize)
        for text, trace in zip(texts, traces, strict=True):
            tokens = trace.frames[-1].tokens.tolist()
            answer = tokenizer.decode(tokens) if infill else tokenizer.answer_text(tokens)
            record = {"prompt": text, "answer": answer, "forwards": trace.frames[-1].forwards, "tokens": tokens}
            print(line_of(record).rstrip("\n") if as_json else readable(answer))


Batch = tuple[list[list[int]], "list[Trace]", SamplingParams]


def _questions(texts: list[str], tokenizer: "Tokenizer", params: SamplingParams, *, raw: bool) -> Batch:
    from app.canvas import Trace

    rows = [tokenizer.encode(t) if raw else tokenizer.chat_ids([{"role": "user", "content": t}]) for t in texts]
    return rows, [Trace(row, params.max_new_tokens) for row in rows], params


def _gaps(texts: list[str], tokenizer: "Tokenizer", params: SamplingParams) -> Batch:
    from app.canvas import Trace, for_template, with_gaps

    mask = tokenizer.special.mask_id
    rows = [with_gaps(t, tokenizer.encode, mask, 1 << 20) for t in texts]
    return rows, [Trace([], len(row)) for row in rows], for_template(params, rows, mask)


def _steps(
    writer: "MaskPredictor",
    tokenizer: "Tokenizer",
    rows: list[list[int]],
    params: SamplingParams,
    *,
    infill: bool,
    pin: str,
) -> "Iterator[Step]":
    from app.canvas import pinned
    from llada_core.sampling import stream, stream_infill

    if infill:
        return stream_infill(writer, rows, params)
    return stream(writer, rows, params, pinned=pinned(params.max_new_tokens, pin, tokenizer.encode))


def _watch(steps: "Iterator[Step]", traces: "list[Trace]", tokenizer: "Tokenizer", *, live: bool) -> "list[Trace]":
    console = Console(stderr=True)
    with Live(console=console, refresh_per_second=25) if live else nullcontext() as screen:
        for step in steps:
            for row, trace in enumerate(traces):
                trace.add(step, row)
            if screen is not None:
                screen.update(Group(*(draw(trace, tokenizer, console.width) for trace in traces)), refresh=True)
    return traces


def draw(trace: "Trace", tokenizer: "Tokenizer", width: int, number: int = -1, *, guesses: bool = False) -> Group:
    """One frame of a trace with its caption."""
    from app.canvas import picture, speller

    frame = trace.frames[number]
    step = len(trace.frames) if number < 0 else number + 1
    caption = Text(f"step {step} · {frame.forwards} forwards · {frame.written} of {len(frame.state)} tokens", "dim")
    cells = trace.cells(frame, speller(tokenizer), guesses=guesses)
    return Group(caption, picture(cells, width))


def chat(
    model: Model = "",
    system: Annotated[str, typer.Option(help="what the model is told before the conversation")] = "",
    preset: Preset = "",
    max_new_tokens: Length = None,
    block_length: Block = None,
    steps: Steps = None,
    temperature: Temperature = None,
    threshold: Threshold = None,
    cache: Cache = None,
    seed: Seed = None,
    device: Device = "auto",
    bits: Bits = None,
    others: Set = [],  # noqa: B006
) -> None:
    """Talk to a model in the terminal and watch it write; /help inside lists the commands, Ctrl-C stops an answer."""
    with one_line_errors():
        given = {
            "max_new_tokens": max_new_tokens, "block_length": block_length, "steps": steps, "temperature": temperature,
            "threshold": threshold, "cache": cache, "seed": seed,
        }  # fmt: skip
        name = name_or_champion(model)
        params = settings(name, preset, given, others)
        Conversation(*loaded(name, device, bits), params, system, Console()).run(name)


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
