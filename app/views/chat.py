"""Chat: several turns, the denoising of each answer live, Stop, again, undo, edit. Wires a ChatSession up."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from app.conversation import ChatSession
from app.models import Desk, Refused, told
from app.panel import QUICK, Panel, Values
from app.render import CLICKS, conversation, legend

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


def build(desk: Desk, panel: Panel, session: gr.State) -> None:
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
