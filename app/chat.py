"""The views Chat and Compare."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import gradio as gr

from app.canvas import Trace, readable
from app.conversation import Conversation, LiveAnswer, prompt_ids, question
from app.models import AppState, UserError, errors_as_text
from app.panel import QUICK, Panel, Values, choices
from app.render import CLICKS, conversation, legend, notice, table
from llada_core.sampling.params import PRESETS, preset

Shown = tuple[Any, ...]


@dataclass(frozen=True)
class ChatView:
    """The components that the handlers read and write."""

    state: AppState
    panel: Panel
    session: gr.State  # Conversation, or None before the first question and after a long absence
    editing: gr.State  # the number of the turn that Send replaces, or None
    talk: gr.HTML
    box: gr.Textbox
    system: gr.Textbox

    def ask(self, values: Values) -> Shown:
        """Adds the message to the conversation; the answer is another event's work."""
        chat, text, turn = values[self.session] or Conversation(), values[self.box] or "", values[self.editing]
        chat.system = values[self.system] or ""
        if turn is not None and not text.strip():
            return chat, talk_of(chat), "", None
        try:
            if turn is None:
                chat.ask(text)
            else:
                chat.edit(turn, text)
        except UserError as error:
            return chat, talk_of(chat, str(error), "bad"), text, turn
        return chat, talk_of(chat), "", None

    def reply(self, values: Values) -> Iterator[Shown]:
        """Writes the answer that is waited for, if one is."""
        chat: Conversation | None = values[self.session]
        yield gr.skip(), gr.skip()  # a generator without a value would empty the conversation on the page
        if chat is not None and chat.waiting and not chat.writing:
            yield from errors_as_text(lambda: self._frames(chat, values), lambda text: self._failed(chat, text))

    def _frames(self, chat: Conversation, values: Values) -> Iterator[Shown]:
        loaded, moved = yield from self.state.bring(values[self.panel.model], lambda text: (chat, talk_of(chat, text)))
        if chat.writing or not chat.waiting:  # written by another event while the model was read
            return
        watch = bool(values[self.panel.guesses])
        frames = chat.reply(loaded, self.panel.params(values), look_ahead=watch, limit=self.state.seconds)
        for picture in self.panel.live(loaded, chat.last, frames, values):
            chat.picture = picture
            yield chat, talk_of(chat, chat.last.note or moved)
        yield chat, talk_of(chat, chat.last.note or moved)

    def _failed(self, chat: Conversation, text: str) -> Shown:
        chat.give_up()
        return chat, talk_of(chat, text, "bad")

    def acting(self, act: Callable[[Conversation], str | None]) -> Callable[[Conversation, str], Shown]:
        """A handler that changes the conversation; a text that `act` returns goes into the box."""

        def handle(chat: Conversation | None, text: str) -> Shown:
            chat = chat or Conversation()
            try:
                text = act(chat) or text
            except UserError as error:
                return chat, talk_of(chat, str(error), "bad"), text, None
            return chat, talk_of(chat), text, None

        return handle

    def edit(self, chat: Conversation | None, event: gr.EventData) -> Shown:
        """Puts a question back into the box; Send then replaces it, or leaves it when the box is empty."""
        number = int(event.turn)
        if chat is None or number >= len(chat.turns):
            return gr.skip(), "", None
        said = f"Send replaces question {number + 1} and what follows it; sent empty, it stays as it was."
        return talk_of(chat, said), chat.turns[number].user, number


def talk_of(chat: Conversation, note: str = "", kind: str = "info") -> str:
    """The conversation as HTML, the last canvas with its answer."""
    return conversation([(t.user, t.answer) for t in chat.turns], live=chat.picture, note=note, kind=kind)


def build_chat(state: AppState, panel: Panel, session: gr.State) -> None:
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
    usage = state.index.usage(state.model)
    samples = [[text] for text in usage.examples]
    examples = gr.Dataset(
        components=[box], samples=samples, label="Examples", elem_id="examples", visible=bool(samples)
    )
    with gr.Accordion("System prompt", open=False):
        own = usage.system or "What the model is told before the conversation"
        system = gr.Textbox(show_label=False, label="System prompt", lines=2, elem_id="system", placeholder=own)
    view = ChatView(state, panel, session, gr.State(None), talk, box, system)
    shown = [session, talk, box, view.editing]
    slow = {"show_progress_on": line, **state.queue()}
    written = [view.reply, {session, *panel.inputs}, [session, talk]]
    for event in (box.submit, send.click):
        event(view.ask, {session, box, system, view.editing}, shown, **QUICK).then(*written, **slow)
    again.click(view.acting(Conversation.again), [session, box], shown, **QUICK).then(*written, **slow)
    undo.click(view.acting(Conversation.undo), [session, box], shown, **QUICK)
    new.click(view.acting(Conversation.clear), [session, box], shown, **QUICK)
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

    state: AppState
    panel: Panel
    question: gr.Textbox
    sides: tuple[Side, Side]

    def run(self, values: Values) -> Iterator[Pictures]:
        """Answers the question twice, a step each in turn."""
        yield from errors_as_text(lambda: self._run(values), lambda text: (notice(text, "bad"), *[gr.skip()] * 5))

    def _run(self, values: Values) -> Iterator[Pictures]:
        runs = [self._side(side, values) for side in self.sides]
        facts = [table(self.state.index.scores(values[side.model] or self.state.model)) for side in self.sides]
        pictures = ["", ""]
        for both in zip_longest(*(frames for _, frames in runs)):
            pictures = [new or old for new, old in zip(both, pictures, strict=True)]
            yield pictures[0], gr.skip(), facts[0], pictures[1], gr.skip(), facts[1]
        left, right = (answer for answer, _ in runs)
        shown = pictures[0] + notice(left.note), pictures[1] + notice(right.note)
        yield shown[0], readable(left.text), facts[0], shown[1], readable(right.text), facts[1]

    def _side(self, side: Side, values: Values) -> tuple[LiveAnswer, Iterator[str]]:
        name = values[side.model] or values[self.panel.model]
        loaded, _ = self.state.loaded(name)
        params, chosen = self.panel.params(values), values[side.preset]
        if chosen == "recommended":
            params = self.state.index.usage(name).sampling
        elif chosen in PRESETS:
            params = preset(chosen, params)
        prompt = prompt_ids(loaded, [question(values[self.question] or "")], params)
        answer, steps = (
            LiveAnswer(Trace(prompt)),
            loaded.write(prompt, params, look_ahead=bool(values[self.panel.guesses])),
        )
        frames = answer.run(loaded, steps, limit=self.state.seconds)
        return answer, self.panel.live(loaded, answer, frames, values)


def build_compare(state: AppState, panel: Panel) -> list[gr.Dropdown]:
    """Draws the view and wires it; returns the two choices of a model."""
    with gr.Row():
        first = (state.index.usage(state.model).examples or [""])[0]
        question = gr.Textbox(label="Question for both", value=first, scale=5, elem_id="question")
        run = gr.Button("Compare", variant="primary", scale=1, min_width=100, elem_id="compare")
        stop = gr.Button("Stop", variant="stop", scale=1, min_width=80)
    with gr.Row():
        sides = (_side(state, "left", "exact"), _side(state, "right", "fast"))
    view = CompareView(state, panel, question, sides)
    chosen = {component for side in sides for component in (side.model, side.preset)}
    outputs = [component for side in sides for component in (side.canvas, side.answer, side.facts)]
    event = run.click(view.run, {question, *chosen, *panel.inputs}, outputs, **state.queue())
    stop.click(None, cancels=[event], **QUICK)
    return [side.model for side in sides]


def _side(state: AppState, name: str, first: str) -> Side:
    with gr.Column(min_width=320):
        with gr.Row():
            model = gr.Dropdown(
                choices(state), value=state.model, label="Model", allow_custom_value=True, scale=3, min_width=260,
                elem_id=f"{name}-model",
            )  # fmt: skip
            ways = [AS_SET, "recommended", *PRESETS]
            choice = gr.Dropdown(ways, value=first, label="Settings", elem_id=f"{name}-preset", scale=2, min_width=120)
        picture = gr.HTML(notice(""), apply_default_css=False, elem_id=f"{name}-canvas")
        answer = gr.Textbox(label="Answer", interactive=False, buttons=["copy"], lines=2, elem_id=f"{name}-answer")
        facts = gr.HTML(table(state.index.scores(state.model)), apply_default_css=False, elem_id=f"{name}-scores")
    return Side(model, choice, picture, answer, facts)
