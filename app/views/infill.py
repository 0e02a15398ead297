"""Infill: text with gaps, or an answer with words pinned at positions; the model writes the rest."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from app.canvas import GAP, Trace, for_template, pinned, readable, with_gaps
from app.conversation import ChatSession, Writing, fits
from app.models import Desk, Refused, refusing, told
from app.panel import QUICK, Panel, Values
from app.render import notice

GAPS = (
    ("Once upon a time there was [[12]] who liked to read.", ""),
    ("2+[[1]]=5", ""),
    ("The sea is [[8]]", ""),
    ("Write a short poem about the sea.", "0:Once, 12:end"),
)
PUZZLES = (
    ("Solve the sudoku 1030340020030001", "0:1234, 12:4321"),
    ("Seat these people anew: 438597612", "0:7, 8:4"),
    ("Make 13 from 8, 3, 8", "0:8"),
)
HELP = """Ask something and pin words of its answer at positions: `0:Once, 12:end`. Or write a text with gaps: `[[5]]` is
room for five tokens, also at its end. Text with gaps is not a question: the model goes by what it read in pretraining."""
Shown = tuple[Any, Any]


@dataclass(frozen=True)
class InfillView:
    """The components that the handler reads."""

    desk: Desk
    panel: Panel
    text: gr.Textbox
    pins: gr.Textbox

    def fill(self, values: Values) -> Iterator[Shown]:
        """Writes into the gaps of the text, or without any answers it around the pinned words."""
        yield from told(lambda: self._fill(values), lambda text: (notice(text, "bad"), gr.skip()))

    def _fill(self, values: Values) -> Iterator[Shown]:
        text, pins, watch = values[self.text] or "", values[self.pins] or "", bool(values[self.panel.guesses])
        if pins.strip() and GAP.search(text):
            raise Refused("Pinned words belong to the answer to a question; take them away, or the gaps.")
        engine, _ = self.desk.engine(values[self.panel.model])
        params = self.panel.params(values)
        if GAP.search(text):
            with refusing():
                template = with_gaps(text, engine.encode, engine.mask_id, engine.context)
            writing, read = Writing(), engine.whole
            steps = engine.fill(template, for_template(params, [template], engine.mask_id), watch=watch)
        else:
            chat = ChatSession()
            chat.ask(text)
            prompt = engine.chat_ids(chat.messages())
            fits(engine, len(prompt), params)
            with refusing():
                fixed = pinned(params.max_new_tokens, pins, engine.encode)
            writing, read = Writing(Trace(prompt)), engine.text
            steps = engine.write(prompt, params, pinned=fixed, watch=watch)
        frames, picture = writing.run(steps, engine.decode, limit=self.desk.seconds), ""
        for picture in self.panel.live(engine, writing, frames, values):
            yield picture, gr.skip()
        yield picture + notice(writing.note), readable(read(writing.tokens()))


def build(desk: Desk, panel: Panel) -> None:
    """Draws the view and wires it."""
    gr.Markdown(HELP)
    samples = PUZZLES if desk.catalogue.knows_sudoku(desk.model) else GAPS
    with gr.Row():
        text = gr.Textbox(samples[0][0], label="A question, or a text with gaps", lines=3, scale=3, elem_id="gaps")
        pins = gr.Textbox(
            samples[0][1],
            label="Pinned words of the answer",
            placeholder="0:Once, 12:end",
            lines=3,
            scale=2,
            elem_id="pins",
        )
    with gr.Row():
        fill = gr.Button("Fill in", variant="primary", elem_id="fill")
        stop = gr.Button("Stop", variant="stop", elem_id="stop-infill")
    examples = gr.Dataset(components=[text, pins], samples=[list(each) for each in samples], label="Examples")
    shown = gr.HTML(notice("The canvas will appear here."), apply_default_css=False, elem_id="infilled")
    plain = gr.Textbox(label="Plain text", interactive=False, buttons=["copy"], lines=2, elem_id="infilled-text")
    view = InfillView(desk, panel, text, pins)
    event = fill.click(view.fill, {text, pins, *panel.inputs}, [shown, plain], **desk.queue())
    stop.click(None, cancels=[event], **QUICK)
    examples.click(lambda sample: sample, examples, [text, pins], **QUICK)
