"""llada sample and llada chat: their options; what they show is `cli.terminal`'s."""

import sys
from typing import Annotated

import typer

from cli.options import Compiled, ModelOptions, model_folder, name_or_champion, settings, with_model_options
from llada_core.files import line_of
from llada_core.settings import while_imported


@with_model_options
def sample(
    prompts: Annotated[list[str], typer.Argument(help="questions, answered as one batch; - reads one per line")],
    infill: Annotated[bool, typer.Option(help="the texts have gaps to fill: [[5]] is room for five tokens")] = False,
    pin: Annotated[str, typer.Option(help="words of the answer at fixed positions, as 0:Once,12:end")] = "",
    raw: Annotated[bool, typer.Option(help="continue the text itself instead of answering it in a chat")] = False,
    compiled: Compiled = "off",
    visualize: Annotated[bool, typer.Option("--visualize", "-v", help="show every denoising step")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="one JSON object per answer, with forwards and tokens")
    ] = False,
    *,
    options: ModelOptions,
) -> None:
    """Answer one or more questions, or fill the gaps of texts.

    llada sample "Solve the sudoku 1030340020030001" -v
    """
    from tasks.project import Project
    from tasks.record.model_usage import usage_of

    if infill and pin:
        raise ValueError("--pin pins words of the answer to a question; leave it out, or --infill")
    name = name_or_champion(options.model)
    folder = model_folder(name)
    usage = usage_of(Project.at(), name)
    params = settings(usage.sampling, options)

    with while_imported():
        from app.canvas import readable, typed  # these import torch: after all that can be wrong without it
        from app.models import Setting, compiled_as, opened
        from cli.terminal import answers, follow, templates

        way = compiled_as(compiled)
        loaded = opened(name, folder, usage, Setting.one(options.device, options.bits, way))
    texts = [typed(line.rstrip("\n")) for p in prompts for line in (sys.stdin if p == "-" else [p])]
    writer, tokenizer = loaded.model, loaded.tokenizer
    if way != "off":
        print(loaded.engine.told(), file=sys.stderr)
    for line in usage.doubts(params, writer.block_length):
        print(line, file=sys.stderr)
    started = (
        templates(writer, tokenizer, texts, params, way)
        if infill
        else answers(writer, tokenizer, texts, params, usage=None if raw else usage, pins=pin, compiled=way)
    )
    follow(*started, tokenizer, live=visualize)
    if way != "off":
        print(loaded.engine.spent(), file=sys.stderr)
    for text, trace in zip(texts, started[0], strict=True):
        tokens = trace.frames[-1].tokens.tolist()
        answer = tokenizer.decode(tokens) if infill else tokenizer.answer_text(tokens)
        record = {"prompt": text, "answer": answer, "forwards": trace.frames[-1].forwards, "tokens": tokens}
        print(line_of(record).rstrip("\n") if as_json else readable(answer))


@with_model_options
def chat(
    system: Annotated[str, typer.Option(help="what the model is told before the conversation")] = "",
    *,
    options: ModelOptions,
) -> None:
    """Talk to a model in the terminal and watch it write; /help inside lists the commands, Ctrl-C stops an answer."""
    from tasks.project import Project
    from tasks.record.model_usage import usage_of

    name = name_or_champion(options.model)
    folder = model_folder(name)
    usage = usage_of(Project.at(), name)
    params = settings(usage.sampling, options)

    with while_imported():
        from app.conversation import Conversation
        from app.models import Setting, opened
        from cli.terminal import TerminalChat

        spoken = opened(name, folder, usage, Setting.one(options.device, options.bits), max_context=None)
    TerminalChat(spoken, params, Conversation(system, bounded=False)).run()
