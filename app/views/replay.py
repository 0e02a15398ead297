"""Replay: the last answer of the chat as a slider with heat maps, shown and saved as one file."""

from typing import Any

import gradio as gr

from app import replay
from app.desk import Desk, sentence
from app.render import notice
from app.session import ChatSession
from llada_core.sampling.trace import find_runners_up


def build(desk: Desk, session: gr.State, model: gr.Dropdown, tab: gr.Tab) -> None:
    """Draws the view; it is made anew whenever its tab is opened."""
    runners = gr.Button("Look up the runners-up of every position", size="sm", elem_id="runners")
    shown = gr.HTML(replay.empty(), apply_default_css=False, elem_id="replay")
    dark = gr.State(False)

    def show(chat: ChatSession | None, is_dark: bool) -> str:
        if chat is None or not chat.last.trace.frames:
            return replay.empty()
        asked = chat.turns[-1].user if chat.turns else ""
        return replay.frame(replay.document(chat.last.trace, prompt=asked, dark=is_dark))

    def look(chat: ChatSession | None, is_dark: bool, name: str) -> str:
        try:
            if chat is not None and chat.last.trace.frames:
                engine, _ = desk.engine(name)
                with engine.turn:
                    find_runners_up(chat.last.trace, engine.model)
                chat.last.trace.spell(engine.decode)
            return show(chat, is_dark)
        except Exception as error:  # noqa: BLE001 - shown to the person, the page lives on
            return notice(sentence(error), "bad")

    quick: dict[str, Any] = {"show_progress": "minimal", "api_visibility": "private"}
    is_dark = "(chat, _) => [chat, document.body.classList.contains('dark')]"
    tab.select(show, [session, dark], shown, js=is_dark, queue=False, **quick)
    runners.click(
        look,
        [session, dark, model],
        shown,
        js=is_dark.replace("_)", "_, name)").replace("]", ", name]"),
        **desk.queue(),
        **quick,
    )
