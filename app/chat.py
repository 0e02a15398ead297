"""The views Chat and Compare."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import gradio as gr

from app.canvas import readable
from app.conversation import ChatSession, Refused
from app.models import Desk, told
from app.panel import QUICK, Panel, Values, choices
from app.render import CLICKS, conversation, legend, notice, table
from llada_core.sampling.params import PRESETS, preset

Shown = tuple[Any, ...]


@dataclass(frozen=True)
class ChatView:
    """The components that the handlers read and write."""

    desk: Desk
    panel: Panel
    session: gr.State  # ChatSession, or None before the first question and after a long absence
    editing: gr.State  # the number of the turn that Send replaces, or None
    talk: gr.HTML
    box: gr.Textbox
    system: gr.Textbox

    def ask(self, values: Values) -> Shown:
        """Adds the message to the conversation; the answer is another event's work."""
        chat, text, turn = values[self.session] or ChatSession(), values[self.box] or "", values[self.editing]
        chat.system = values[self.system] or ""
        if turn is not None and not text.strip():
            return chat, talk_of(chat), "", None
        try:
            if turn is None:
                chat.ask(text)
            else:
                chat.edit(turn, text)
        except Refused as error:
            return chat, talk_of(chat, str(error), "bad"), text, turn
        return chat, talk_of(chat), "", None

    def reply(self, values: Values) -> Iterator[Shown]:
        """Writes the answer that is waited for, if one is."""
        chat: ChatSession | None = values[self.session]
        yield gr.skip(), gr.skip()  # a generator without a value would empty the conversation on the page
        if chat is not None and chat.waiting and not chat.writing:
            yield from told(lambda: self._frames(chat, values), lambda text: self._failed(chat, text))

    def _frames(self, chat: ChatSession, values: Values) -> Iterator[Shown]:
        engine, moved = yield from self.desk.bring(values[self.panel.model], lambda text: (chat, talk_of(chat, text)))
        if chat.writing or not chat.waiting:  # written by another event while the model was read
            return
        chat.last.by = engine.folder
        watch = bool(values[self.panel.guesses])
        frames = chat.reply(engine, self.panel.params(values), watch=watch, limit=self.desk.seconds)
        for picture in self.panel.live(engine, chat.last, frames, values):
            chat.picture = picture
            yield chat, talk_of(chat, chat.last.note or moved)
        yield chat, talk_of(chat, chat.last.note or moved)

    def _failed(self, chat: ChatSession, text: str) -> Shown:
        if chat.waiting:
            chat.turns[-1].answer = ""
        return chat, talk_of(chat, text, "bad")

    def acting(self, act: Callable[[ChatSession], str | None]) -> Callable[[ChatSession, str], Shown]:
        """A handler that changes the conversation; a text that `act` returns goes into the box."""

        def handle(chat: ChatSession | None, text: str) -> Shown:
            chat = chat or ChatSession()
            try:
                text = act(chat) or text
            except Refused as error:
                return chat, talk_of(chat, str(error), "bad"), text, None
            return chat, talk_of(chat), text, None

        return handle

    def edit(self, chat: ChatSession | None, event: gr.EventData) -> Shown:
        """Puts a question back into the box; Send then replaces it, or leaves it when the box is empty."""
        number = int(event.turn)
        if chat is None or number >= len(chat.turns):
            return gr.skip(), "", None
        said = f"Send replaces question {number + 1} and what follows it; sent empty, it stays as it was."
        return talk_of(chat, said), chat.turns[number].user, number


def talk_of(chat: ChatSession, note: str = "", kind: str = "info") -> str:
    """The conversation as HTML, the last canvas with its answer."""
    return conversation([(t.user, t.answer) for t in chat.turns], live=chat.picture, note=note, kind=kind)


def build_chat(desk: Desk, panel: Panel, session: gr.State) -> None:
    """Draws the view and wires it."""
    talk = gr.HTML(conversation([]), js_on_load=CLICKS, apply_default_css=False, elem_id="talk")
    with gr.Row():
        box = gr.Textbox(
            label="Message", show_label=False, container=False, lines=1, max_lines=6, scale=6, min_width=240,
            autofocus=True, placeholder="Ask something; Enter sends, Shift+Enter makes a new line", elem_id="message",
        )  # fmt: skip
        send = gr.Button("Send", variant="primary", scale=1, min_width=80, elem_id="send")
        stop = gr.Button("Stop", variant="stop", scale=1, min_width=80, elem_id="stop")
    with gr.Row():
        again = gr.Button("Write again", size="sm", min_width=80, elem_id="again")
        undo = gr.Button("Undo", size="sm", min_width=80, elem_id="undo")
        new = gr.Button("New conversation", size="sm", min_width=80, elem_id="new")
    line = gr.HTML(legend(), apply_default_css=False, elem_id="line")
    samples = [[text] for text in desk.catalogue.examples(desk.model)]
    examples = gr.Dataset(
        components=[box], samples=samples, label="Examples", elem_id="examples", visible=bool(samples)
    )
    with gr.Accordion("System prompt", open=False):
        system = gr.Textbox(show_label=False, label="System prompt", lines=2, elem_id="system")
    view = ChatView(desk, panel, session, gr.State(None), talk, box, system)
    shown = [session, talk, box, view.editing]
    slow = {"show_progress_on": line, **desk.queue()}
    written = [view.reply, {session, *panel.inputs}, [session, talk]]
    for event in (box.submit, send.click):
        event(view.ask, {session, box, system, view.editing}, shown, **QUICK).then(*written, **slow)
    again.click(view.acting(ChatSession.again), [session, box], shown, **QUICK).then(*written, **slow)
    undo.click(view.acting(ChatSession.undo), [session, box], shown, **QUICK)
    new.click(view.acting(ChatSession.clear), [session, box], shown, **QUICK)
    stop.click(lambda chat: chat.stop() if chat else None, [session], None, **QUICK)
    talk.edit(view.edit, [session], [talk, box, view.editing], **QUICK)
    examples.click(lambda sample: sample[0], examples, box, **QUICK)


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


def build_compare(desk: Desk, panel: Panel) -> list[gr.Dropdown]:
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
