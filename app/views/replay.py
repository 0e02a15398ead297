"""Replay: the last answer of the chat as a slider with heat maps, shown and saved as one file."""

from typing import Any

import gradio as gr

from app import replay
from app.desk import Desk, sentence
from app.engine import Refused
from app.render import notice
from app.session import ChatSession
from app.views.panel import QUICK
from llada_core.sampling.trace import find_runners_up

AT_ONCE = 5.0  # seconds: an answer written in less is looked at again without being asked


def build(desk: Desk, session: gr.State, model: gr.Dropdown, tab: gr.Tab) -> None:
    """Draws the view; it is made anew whenever its tab is opened."""
    runners = gr.Button("Look up the runners-up of every position", size="sm", elem_id="runners")
    shown = gr.HTML(replay.empty(), apply_default_css=False, elem_id="replay")
    dark = gr.Checkbox(visible=False)  # told by the browser, which a State would not be

    def show(chat: ChatSession | None, is_dark: bool, _: str) -> str:
        if chat is None or not chat.last.trace.frames:
            return replay.empty()
        asked = chat.turns[-1].user if chat.turns else ""
        return replay.frame(replay.document(chat.last.trace, prompt=asked, dark=is_dark))

    def quick_look(chat: ChatSession | None, is_dark: bool, name: str) -> Any:
        last = None if chat is None else chat.last
        if last is None or last.counts is None or last.counts.seconds > AT_ONCE or last.trace.runners:
            return gr.skip()
        return look(chat, is_dark, name, unasked=True)

    def look(chat: ChatSession | None, is_dark: bool, name: str, unasked: bool = False) -> Any:
        try:
            if chat is not None and chat.last.trace.frames:
                engine, _ = desk.engine(name)
                if engine.folder != chat.last.by:
                    raise Refused("Another model wrote this answer; choose it in the sidebar to look up runners-up.")
                with engine.turn:
                    find_runners_up(chat.last.trace, engine.model)
                chat.last.trace.spell(engine.decode)
            return show(chat, is_dark, name)
        except Exception as error:  # noqa: BLE001 - shown to the person, the page lives on
            return gr.skip() if unasked else notice(sentence(error), "bad") + show(chat, is_dark, name)

    with_theme = "(chat, _, name) => [chat, document.body.classList.contains('dark'), name]"
    inputs = [session, dark, model]
    opened = tab.select(show, inputs, shown, js=with_theme, **QUICK)
    opened.then(quick_look, inputs, shown, js=with_theme, **desk.queue())
    runners.click(look, inputs, shown, js=with_theme, **desk.queue())
