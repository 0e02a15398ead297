"""Model: what answers, where it comes from, how it scores; loaded here on request, before the first question."""

from collections.abc import Iterator

import gradio as gr

from app.desk import Desk, told
from app.render import notice, table
from app.views.panel import QUICK, Panel


def build(desk: Desk, panel: Panel, tab: gr.Tab) -> None:
    """Draws the view and wires it; it is made anew whenever its tab is opened."""
    load = gr.Button("Load the model chosen in the sidebar", size="sm", elem_id="load")
    state = gr.HTML(notice(""), apply_default_css=False, elem_id="loaded")
    gr.Markdown("### Its scores")
    scores = gr.HTML("", apply_default_css=False, elem_id="scores")
    gr.Markdown("### Where it comes from")
    facts = gr.HTML("", apply_default_css=False, elem_id="facts")

    def show(name: str) -> tuple[str, str]:
        name = name or desk.model
        known = desk.catalogue.scores(name)
        nothing = notice("The registry holds no scores for it: llada eval measures them.")
        return table(desk.catalogue.facts(name)), table(known) if known else nothing

    def bring(name: str) -> Iterator[str]:
        yield from told(lambda: _loaded(desk, name), lambda text: notice(text, "bad"))

    seen = [show, panel.model, [facts, scores]]
    load.click(bring, panel.model, state, **desk.queue()).then(*seen, **QUICK)
    gr.on([tab.select, panel.model.change], *seen, **QUICK)


def _loaded(desk: Desk, name: str) -> Iterator[str]:
    engine, moved = yield from desk.bring(name, notice)
    count = sum(p.numel() for p in engine.model.parameters())
    size = f"{count / 1e6:.1f} M parameters on {engine.model.device}, {engine.context} tokens long"
    yield notice(f"{engine.name} is loaded: {size}. {moved}", "good")
