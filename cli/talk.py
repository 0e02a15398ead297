"""`llada sample` and `llada chat`: answers in a terminal, with the canvas live if wanted.

Knows the library's sampler; does not know the page. Heavy packages are imported inside.
"""

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
        from cli.chat import Conversation

        given = {
            "max_new_tokens": max_new_tokens, "block_length": block_length, "steps": steps, "temperature": temperature,
            "threshold": threshold, "cache": cache, "seed": seed,
        }  # fmt: skip
        name = name_or_champion(model)
        params = settings(name, preset, given, others)
        Conversation(*loaded(name, device, bits), params, system, Console()).run(name)
