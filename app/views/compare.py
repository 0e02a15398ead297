"""Compare: one question, two models or two settings, written side by side and in step."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import gradio as gr

from app.canvas import readable
from app.conversation import ChatSession
from app.models import Desk, told
from app.panel import QUICK, Panel, Values, choices
from app.render import notice, table
from llada_core.sampling.params import PRESETS, preset

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
        runs = [self._side(side, values) for side in self.sides]
        facts = [table(self.desk.catalogue.scores(values[side.model] or self.desk.model)) for side in self.sides]
        chats = [chat for chat, _ in runs]
        pictures = ["", ""]
        for both in zip_longest(*(frames for _, frames in runs)):
            pictures = [new or old for new, old in zip(both, pictures, strict=True)]
            yield pictures[0], gr.skip(), facts[0], pictures[1], gr.skip(), facts[1]
        shown = [picture + notice(chat.last.note) for picture, chat in zip(pictures, chats, strict=True)]
        answers = [readable(chat.turns[-1].answer or "") for chat in chats]
        yield shown[0], answers[0], facts[0], shown[1], answers[1], facts[1]

    def _side(self, side: Side, values: Values) -> tuple[ChatSession, Iterator[str]]:
        name = values[side.model] or values[self.panel.model]
        engine, _ = self.desk.engine(name)
        params, chosen = self.panel.params(values), values[side.preset]
        if chosen == "recommended":
            params = self.desk.catalogue.recommended(name)
        elif chosen in PRESETS:
            params = preset(chosen, params)
        chat = ChatSession()
        chat.ask(values[self.question] or "")
        frames = chat.reply(engine, params, watch=bool(values[self.panel.guesses]), limit=self.desk.seconds)
        return chat, self.panel.live(engine, chat.last, frames, values)


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
    event = run.click(view.run, {question, *chosen, *panel.inputs}, outputs, **desk.queue())
    stop.click(None, cancels=[event], **QUICK)
    return [side.model for side in sides]


def _side(desk: Desk, name: str, first: str) -> Side:
    with gr.Column(min_width=320):
        with gr.Row():
            model = gr.Dropdown(
                choices(desk), value=desk.model, label="Model", allow_custom_value=True, scale=3, min_width=260,
                elem_id=f"{name}-model",
            )  # fmt: skip
            ways = [AS_SET, "recommended", *PRESETS]
            choice = gr.Dropdown(ways, value=first, label="Settings", elem_id=f"{name}-preset", scale=2, min_width=120)
        picture = gr.HTML(notice(""), apply_default_css=False, elem_id=f"{name}-canvas")
        answer = gr.Textbox(label="Answer", interactive=False, buttons=["copy"], lines=2, elem_id=f"{name}-answer")
        facts = gr.HTML(table(desk.catalogue.scores(desk.model)), apply_default_css=False, elem_id=f"{name}-scores")
    return Side(model, choice, picture, answer, facts)
