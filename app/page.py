"""The page: a sidebar and six views over one session per person. Knows where things stand, not what they do."""

from pathlib import Path

import gradio as gr

from app.desk import Desk
from app.views import chat, compare, infill, model, panel, remote, replay, sudoku

CSS = Path(__file__).parent / "page.css"
FONTS = ["ui-sans-serif", "system-ui", "sans-serif"]  # whatever the machine has; nothing is fetched
NARROW = "() => { if (innerWidth < 800) document.querySelector('.sidebar .toggle-button')?.click(); }"


def theme() -> gr.themes.Base:
    """Gradio's plain theme in the machine's own fonts."""
    return gr.themes.Default(
        font=FONTS, font_mono=["ui-monospace", "monospace"], primary_hue="blue", neutral_hue="slate"
    )


def build(desk: Desk) -> gr.Blocks:
    """The page around a desk."""
    with gr.Blocks(title="lladaflow", analytics_enabled=False, fill_width=True) as page:
        session = gr.State(None)
        with gr.Sidebar(width=340):
            gr.Markdown("## lladaflow\nA language model that writes by unmasking.")
            side = panel.build(desk)
        with gr.Tab("Chat"):
            chat.build(desk, side, session)
        with gr.Tab("Sudoku", visible=desk.catalogue.knows_sudoku(desk.model)):
            sudoku.build(desk, side)
        with gr.Tab("Infill"):
            infill.build(desk, side)
        with gr.Tab("Compare"):
            models = [side.model, *compare.build(desk, side)]
        with gr.Tab("Replay") as tab:
            replay.build(desk, session, side.model, tab)
        with gr.Tab("Model") as tab:
            model.build(desk, side, tab)
        remote.build(desk)
        page.load(lambda: [gr.update(choices=panel.choices(desk))] * len(models), None, models, **panel.QUICK)
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
