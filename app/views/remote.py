"""The page's interface for programs: one question, its answer as it is written, and the counts (`/chat`)."""

from collections.abc import Generator
from typing import Any

import gradio as gr

from app import settings
from app.desk import Desk, told
from app.engine import refusing
from app.session import ChatSession
from llada_core.sampling.params import preset as made_by


def build(desk: Desk) -> None:
    """Adds the endpoint."""

    def chat(
        message: str, preset: str = "recommended", max_new_tokens: int = 0
    ) -> Generator[dict[str, Any], None, None]:
        yield from told(lambda: _answer(desk, message, preset, max_new_tokens), lambda text: {"error": text})

    gr.api(chat, api_name="chat", **desk.line())


def _answer(desk: Desk, message: str, preset: str, length: int) -> Generator[dict[str, Any], None, None]:
    engine, _ = desk.engine(None)
    params = desk.catalogue.recommended(desk.model)
    if length > 0:
        params = settings.params({**vars(params), "max_new_tokens": length, "steps": length, "block_length": length})
    if preset != "recommended":
        with refusing():
            params = made_by(preset, params)
    session = ChatSession()
    session.ask(message)
    for frame in session.reply(engine, params, limit=desk.seconds):
        yield {"written": frame.written, "of": params.max_new_tokens}
    counts = session.last.counts
    yield {
        "answer": session.turns[-1].answer,
        "note": session.last.note,
        "steps": counts.steps if counts else 0,
        "forwards": counts.forwards if counts else 0,
        "seconds": counts.seconds if counts else 0.0,
    }
