"""Infill: text with gaps, or an answer with words pinned at positions; the model writes the rest."""

import dataclasses
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from app.desk import Desk, paced, told
from app.engine import Engine
from app.render import canvas, notice
from app.session import fits
from app.views.panel import Panel, Values
from app.writing import Writing, refusing
from llada_core.config.sampling import SamplingParams
from llada_core.sampling.gaps import pinned, with_gaps
from llada_core.sampling.step import Step
from llada_core.sampling.trace import Cell, Trace, readable

GAPS = ("2+[[1]]=5", "Once upon a time there was [[12]] who liked to read.", "The sea is [[8]]")
PUZZLES = ("The sudoku 1030340020030001 has the solution [[16]].", "From 438597612 everyone moves to [[9]].")
HELP = """Write a text and mark each gap: `[[5]]` is room for five tokens. At its end the model continues.
Or write a question and pin words of its answer: `0:Once, 12:end`."""
Shown = tuple[Any, Any]


@dataclass(frozen=True)
class InfillView:
    """The components that the handlers read."""

    desk: Desk
    panel: Panel
    text: gr.Textbox
    pins: gr.Textbox

    def fill(self, values: Values) -> Iterator[Shown]:
        """Writes into the gaps of the text."""
        yield from told(lambda: self._fill(values), _failed)

    def answer(self, values: Values) -> Iterator[Shown]:
        """Answers the text around the pinned words."""
        yield from told(lambda: self._answer(values), _failed)

    def _fill(self, values: Values) -> Iterator[Shown]:
        engine, _ = self.desk.engine(values[self.panel.model])
        with refusing():
            template = with_gaps(values[self.text] or "", engine.encode, engine.mask_id, engine.context)
        params = for_template(self.panel.params(values), template.count(engine.mask_id), len(template))
        steps = engine.fill(template, params, watch=bool(values[self.panel.guesses]))
        yield from self._show(engine, Writing(), steps, values)

    def _answer(self, values: Values) -> Iterator[Shown]:
        engine, _ = self.desk.engine(values[self.panel.model])
        params = self.panel.params(values)
        prompt = engine.chat_ids([{"role": "user", "content": readable(values[self.text] or "")}])
        fits(engine, len(prompt), params)
        with refusing():
            pins = pinned(params.max_new_tokens, values[self.pins] or "", engine.encode)
        steps = engine.write(prompt, params, pinned=pins, watch=bool(values[self.panel.guesses]))
        yield from self._show(engine, Writing(Trace(prompt)), steps, values)

    def _show(
        self, engine: Engine, writing: Writing, steps: Generator[Step, None, None], values: Values
    ) -> Iterator[Shown]:
        cells: list[Cell] = []
        frames = writing.run(steps, engine.decode, limit=self.desk.seconds)
        for frame in paced(frames, values[self.panel.pace] or 0):
            cells = writing.trace.cells(frame, engine.decode, guesses=bool(values[self.panel.guesses]))
            yield canvas(cells, f"step {len(writing.trace.frames)}"), gr.skip()
        tokens = writing.tokens()
        text = engine.text(tokens) if writing.trace.prompt else engine.tokenizer.decode(tokens)
        caption = f"{writing.counts.sentence() if writing.counts else ''} {writing.note}"
        if writing.trace.frames:
            cells = writing.trace.cells(writing.trace.frames[-1], engine.decode, settled=True)
        yield canvas(cells, caption), readable(text)


def for_template(params: SamplingParams, masks: int, length: int) -> SamplingParams:
    """The settings for a template: one block, at most as many steps as masks."""
    return dataclasses.replace(
        params, max_new_tokens=masks, block_length=length, steps=min(params.steps, masks), stop_at_eos=False
    )


def _failed(text: str) -> Shown:
    return notice(text, "bad"), gr.skip()


def build(desk: Desk, panel: Panel) -> None:
    """Draws the view and wires it."""
    gr.Markdown(HELP)
    gaps = PUZZLES if desk.catalogue.knows_sudoku(desk.model) else GAPS
    with gr.Row():
        text = gr.Textbox(label="Text with gaps, or a question", lines=3, value=gaps[0], elem_id="gaps", scale=3)
        pins = gr.Textbox(
            label="Pinned words of the answer", placeholder="0:Once, 12:end", lines=3, elem_id="pins", scale=2
        )
    with gr.Row():
        fill = gr.Button("Fill the gaps", variant="primary", elem_id="fill")
        answer = gr.Button("Answer with pins", elem_id="answer")
        stop = gr.Button("Stop", variant="stop", elem_id="stop-infill")
    examples = gr.Dataset(components=[text], samples=[[gap] for gap in gaps], label="Examples")
    shown = gr.HTML(notice("The canvas will appear here."), apply_default_css=False, elem_id="infilled")
    plain = gr.Textbox(label="Plain text", interactive=False, buttons=["copy"], lines=2, elem_id="infilled-text")
    view = InfillView(desk, panel, text, pins)
    private: dict[str, Any] = {"show_progress": "minimal", "api_visibility": "private"}
    inputs = {text, pins, *panel.inputs}
    events = [
        fill.click(view.fill, inputs, [shown, plain], **private, **desk.queue()),
        answer.click(view.answer, inputs, [shown, plain], **private, **desk.queue()),
    ]
    stop.click(None, cancels=events, queue=False, api_visibility="private")
    examples.click(lambda sample: sample[0], examples, text, queue=False, api_visibility="private")
