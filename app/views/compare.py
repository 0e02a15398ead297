"""Compare: one question, two models or two settings, written side by side and in step."""

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import gradio as gr

from app.desk import Desk, paced, told
from app.engine import Engine
from app.render import canvas, notice, table
from app.session import ChatSession
from app.views.panel import Panel, Values, choices
from llada_core.config.sampling import SamplingParams
from llada_core.config.sampling_help import PRESETS, preset
from llada_core.sampling.trace import Frame

AS_SET = "as in the sidebar"
Pictures = tuple[Any, ...]


@dataclass(frozen=True)
class Side:
    """One of the two columns."""

    model: gr.Dropdown
    preset: gr.Dropdown
    canvas: gr.HTML
    answer: gr.Textbox
    facts: gr.HTML


@dataclass(frozen=True)
class CompareView:
    """The components that the handler reads."""

    desk: Desk
    panel: Panel
    question: gr.Textbox
    sides: tuple[Side, Side]

    def run(self, values: Values) -> Iterator[Pictures]:
        """Answers the question twice, a step each in turn."""
        yield from told(lambda: self._run(values), lambda text: (notice(text, "bad"), *[gr.skip()] * 5))

    def _run(self, values: Values) -> Iterator[Pictures]:
        pairs = [self._prepare(side, values) for side in self.sides]
        watch = bool(values[self.panel.guesses])
        runs = [_run_of(chat, engine, params, watch, self.desk.seconds) for chat, engine, params in pairs]
        facts = [table(self.desk.catalogue.scores(values[side.model] or self.desk.model)) for side in self.sides]
        pictures = ["", ""]
        try:
            for both in paced(zip_longest(*runs), values[self.panel.pace] or 0):
                pictures = [new or old for new, old in zip(both, pictures, strict=True)]
                yield pictures[0], gr.skip(), facts[0], pictures[1], gr.skip(), facts[1]
        finally:
            for run in runs:
                run.close()
        answers = [chat.turns[-1].answer or "" for chat, _, _ in pairs]
        yield pictures[0], answers[0], facts[0], pictures[1], answers[1], facts[1]

    def _prepare(self, side: Side, values: Values) -> tuple[ChatSession, Engine, SamplingParams]:
        name = values[side.model] or values[self.panel.model]
        engine, _ = self.desk.engine(name)
        params, chosen = self.panel.params(values), values[side.preset]
        if chosen == "recommended":
            params = self.desk.catalogue.recommended(name)
        elif chosen in PRESETS:
            params = preset(chosen, params)
        chat = ChatSession()
        chat.ask(values[self.question] or "")
        return chat, engine, params


def _run_of(
    chat: ChatSession, engine: Engine, params: SamplingParams, watch: bool, limit: float
) -> Generator[str, None, None]:
    frame: Frame | None = None
    frames = chat.reply(engine, params, watch=watch, limit=limit)
    try:
        for frame in frames:
            caption = f"step {len(chat.last.trace.frames)} · {frame.forwards} forwards"
            yield canvas(chat.last.trace.cells(frame, engine.decode, guesses=watch), caption)
    finally:
        frames.close()
    if frame is not None and chat.last.counts:
        cells = chat.last.trace.cells(frame, engine.decode, settled=True)
        yield canvas(cells, f"{chat.last.counts.sentence()} {chat.last.note}")


def build(desk: Desk, panel: Panel) -> list[gr.Dropdown]:
    """Draws the view and wires it; returns the two choices of a model."""
    with gr.Row():
        first = (desk.catalogue.examples(desk.model) or [""])[0]
        question = gr.Textbox(label="Question for both", value=first, scale=5, elem_id="question")
        run = gr.Button("Compare", variant="primary", scale=1, min_width=100, elem_id="compare")
        stop = gr.Button("Stop", variant="stop", scale=1, min_width=80)
    with gr.Row():
        sides = (_side(desk, "left", "exact"), _side(desk, "right", "fast"))
    view = CompareView(desk, panel, question, sides)
    chosen = {component for side in sides for component in (side.model, side.preset)}
    outputs = [component for side in sides for component in (side.canvas, side.answer, side.facts)]
    wiring: dict[str, Any] = {"show_progress": "minimal", "api_visibility": "private", **desk.queue()}
    event = run.click(view.run, {question, *chosen, *panel.inputs}, outputs, **wiring)
    stop.click(None, cancels=[event], queue=False, api_visibility="private")
    return [side.model for side in sides]


def _side(desk: Desk, name: str, first: str) -> Side:
    with gr.Column(min_width=320):
        with gr.Row():
            model = gr.Dropdown(
                choices(desk),
                value=desk.model,
                label="Model",
                allow_custom_value=True,
                elem_id=f"{name}-model",
                scale=3,
                min_width=220,
            )
            ways = [AS_SET, "recommended", *PRESETS]
            choice = gr.Dropdown(ways, value=first, label="Settings", elem_id=f"{name}-preset", scale=2, min_width=120)
        picture = gr.HTML(notice(""), apply_default_css=False, elem_id=f"{name}-canvas")
        answer = gr.Textbox(label="Answer", interactive=False, buttons=["copy"], lines=2, elem_id=f"{name}-answer")
        facts = gr.HTML(table(desk.catalogue.scores(desk.model)), apply_default_css=False, elem_id=f"{name}-scores")
    return Side(model, choice, picture, answer, facts)
