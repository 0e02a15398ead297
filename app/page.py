"""The page: its sidebar, its tabs, the small views, the interface for programs."""

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from app import render
from app.canvas import find_runners_up
from app.card import as_html, describe
from app.chat import build_chat, build_compare
from app.conversation import Conversation
from app.fill import build_infill, build_sudoku, knows_sudoku
from app.models import AppState, UserError, as_user_error, errors_as_text, sentence
from app.panel import QUICK, Panel, build_panel, choices
from app.panel import params as params_of
from app.render import notice
from llada_core.sampling.params import preset as made_by


def build_api(state: AppState) -> None:
    """Adds the endpoint."""

    def chat(
        message: str, preset: str = "recommended", max_new_tokens: int = 0
    ) -> Generator[dict[str, Any], None, None]:
        yield from errors_as_text(lambda: _answer(state, message, preset, max_new_tokens), lambda text: {"error": text})

    gr.api(chat, api_name="chat", **state.line())


def _answer(state: AppState, message: str, preset: str, length: int) -> Generator[dict[str, Any], None, None]:
    loaded, _ = state.loaded(None)
    params = state.index.usage(state.model).sampling
    if length > 0:
        params = params_of(vars(params.at_length(length)))
    if preset != "recommended":
        with as_user_error():
            params = made_by(preset, params)
    session = Conversation()
    session.ask(message)
    for frame in session.reply(loaded, params, limit=state.seconds):
        yield {"written": frame.written, "of": params.max_new_tokens}
    counts = session.last.counts
    yield {
        "answer": session.last.text,
        "note": session.last.note,
        "steps": counts.steps if counts else 0,
        "forwards": counts.forwards if counts else 0,
        "seconds": counts.seconds if counts else 0.0,
    }


def build_model(state: AppState, panel: Panel, tab: gr.Tab) -> None:
    """Draws the view and wires it; it is made anew whenever its tab is opened."""
    load = gr.Button("Load the model chosen in the sidebar", size="sm", elem_id="load")
    word = gr.HTML(notice(""), apply_default_css=False, elem_id="loaded")
    facts = gr.HTML("", apply_default_css=False, elem_id="facts")

    def show(name: str) -> str:
        try:
            name = state.allowed(name)
        except UserError as error:
            return notice(str(error), "bad")
        measured = "" if state.index.scores(name) else notice("No scores are kept with it: llada eval measures them.")
        return measured + as_html(describe(state.index, name))

    def bring(name: str) -> Iterator[str]:
        yield from errors_as_text(lambda: _loaded(state, name), lambda text: notice(text, "bad"))

    seen = [show, panel.model, facts]
    load.click(bring, panel.model, word, **state.queue()).then(*seen, **QUICK)
    gr.on([tab.select, panel.model.change], *seen, **QUICK)


def _loaded(state: AppState, name: str) -> Iterator[str]:
    loaded, moved = yield from state.bring(name, notice)
    count = sum(p.numel() for p in loaded.model.parameters())
    size = f"{count / 1e6:.1f} M parameters on {loaded.model.device}, {loaded.context} tokens long"
    yield notice(f"{loaded.name} is loaded: {size}. {moved}", "good")


def build_replay(state: AppState, session: gr.State, model: gr.Dropdown, tab: gr.Tab) -> None:
    """Draws the view; it is made anew whenever its tab is opened."""
    runners = gr.Button("Look up the runners-up of every position", size="sm", elem_id="runners")
    shown = gr.HTML(render.empty(), apply_default_css=False, elem_id="replay")
    dark = gr.Checkbox(visible=False)  # told by the browser, which a State would not be

    def show(chat: Conversation | None, is_dark: bool, _: str) -> str:
        if chat is None or not chat.last.trace.frames:
            return render.empty()
        asked = chat.turns[-1].user if chat.turns else ""
        return render.frame(render.document(chat.last.trace, prompt=asked, dark=is_dark))

    def look(chat: Conversation | None, is_dark: bool, name: str) -> str:
        try:
            if chat is not None and chat.last.trace.frames:
                loaded, _ = state.loaded(name)
                if loaded.folder != chat.last.by:
                    raise UserError("Another model wrote this answer; choose it in the sidebar to look up runners-up.")
                with loaded.turn:
                    find_runners_up(chat.last.trace, loaded.model, loaded.decode)
            return show(chat, is_dark, name)
        except Exception as error:  # noqa: BLE001 - shown to the person, the page lives on
            return notice(sentence(error), "bad") + show(chat, is_dark, name)

    with_theme = "(chat, _, name) => [chat, document.body.classList.contains('dark'), name]"
    inputs = [session, dark, model]
    tab.select(show, inputs, shown, js=with_theme, **QUICK)
    runners.click(look, inputs, shown, js=with_theme, **state.queue())


CSS = Path(__file__).parent / "page.css"
FONTS = ["ui-sans-serif", "system-ui", "sans-serif"]  # whatever the machine has; nothing is fetched
NARROW = "() => { if (innerWidth < 800) document.querySelector('.sidebar .toggle-button')?.click(); }"


def theme() -> gr.themes.Base:
    """Gradio's plain theme in the machine's own fonts."""
    return gr.themes.Default(
        font=FONTS, font_mono=["ui-monospace", "monospace"], primary_hue="blue", neutral_hue="slate"
    )


def build_page(state: AppState) -> gr.Blocks:
    """The page around a state."""
    with gr.Blocks(title="lladaflow", analytics_enabled=False, fill_width=True) as page:
        session = gr.State(None)
        with gr.Sidebar(width=340):
            gr.Markdown("## lladaflow\nA language model that writes by unmasking.")
            side = build_panel(state)
        with gr.Tab("Chat"):
            build_chat(state, side, session)
        with gr.Tab("Sudoku", visible=knows_sudoku(state.index.usage(state.model))):
            build_sudoku(state, side)
        with gr.Tab("Infill"):
            build_infill(state, side)
        with gr.Tab("Compare"):
            models = [side.model, *build_compare(state, side)]
        with gr.Tab("Replay") as tab:
            build_replay(state, session, side.model, tab)
        with gr.Tab("Model") as tab:
            build_model(state, side, tab)
        build_api(state)
        page.load(lambda: [gr.update(choices=choices(state))] * len(models), None, models, **QUICK)
        page.load(None, js=NARROW)
    return page.queue(max_size=64)


def absent(name: str, reason: str) -> gr.Blocks:
    """The page when there is no model: what to run."""
    with gr.Blocks(title="lladaflow", analytics_enabled=False) as page:
        gr.Markdown(
            f"# No model yet\n\nThe page wants to load `{name}` and cannot; below stands why.\n\n"
            "1. If none is registered: `make run` trains, evaluates and registers one (about a quarter of an hour on two "
            "cores). If it finds no room: `--device` and `--bits` put it elsewhere, or make it smaller.\n"
            "2. Then start the page again with `make app`.\n\n"
            "Any model folder will do as well: `python -m app --model path/to/folder`."
        )
        gr.Textbox(reason, label="Why", interactive=False)
    return page
