"""Sudoku: a grid to fill in, solved before one's eyes; a cell that breaks a rule is marked."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import gradio as gr

from app import sudoku
from app.canvas import Trace
from app.conversation import Writing
from app.models import Desk, told
from app.panel import QUICK, Panel, Values
from app.render import notice
from llada_core.data import puzzles

Shown = tuple[str, str]


@dataclass(frozen=True)
class SudokuView:
    """The components that the handlers read."""

    desk: Desk
    panel: Panel
    cells: list[gr.Textbox]
    keep: gr.Checkbox

    def solve(self, values: Values) -> Iterator[Shown]:
        """Asks the model for the solution of the typed grid."""
        yield from told(lambda: self._solve(values), lambda text: (gr.skip(), notice(text, "bad")))

    def _solve(self, values: Values) -> Iterator[Shown]:
        puzzle = sudoku.typed([values[cell] for cell in self.cells])
        engine, _ = self.desk.engine(values[self.panel.model])
        prompt = engine.chat_ids([{"role": "user", "content": puzzles.sudoku_prompt(puzzle, random.Random(0))}])
        digits = [engine.encode(digit) for digit in puzzle]
        one_each = all(len(ids) == 1 for ids in digits)
        pins = {i: digits[i][0] for i, d in enumerate(puzzle) if d != "0"} if values[self.keep] and one_each else None
        writing = Writing(Trace(prompt))
        steps = engine.write(prompt, self.panel.params(values), pinned=pins, watch=bool(values[self.panel.guesses]))
        frames = writing.run(steps, engine.decode, limit=self.desk.seconds)
        board = sudoku.blank(puzzle)
        for board in self.panel.live(engine, writing, frames, values, partial(sudoku.grid, puzzle)):
            yield board, notice("")
        yield board, verdict(puzzle, "".join(engine.text(writing.tokens()).split()))

    def check(self, *typed: str) -> Shown:
        """Shows the typed grid, marking what breaks a rule."""
        digits = "".join(t.strip() if t and t.strip() in {"1", "2", "3", "4"} else "0" for t in typed)
        broken = sudoku.conflicts(digits)
        word = "Two equal digits meet in a row, column or box." if broken else ""
        return sudoku.blank(digits), notice(word, "bad" if broken else "info")

    def draw(self) -> list[Any]:
        """A puzzle that training never saw."""
        seed = str(random.SystemRandom().random())
        puzzle = next(puzzles.draw(puzzles.sudoku, part="evaluate", count=1, seed=seed)).key
        return [*["" if d == "0" else d for d in puzzle], sudoku.blank(puzzle), notice("")]


def verdict(puzzle: str, answer: str) -> str:
    """Whether the answer solves the puzzle, as a sentence."""
    changed = [i for i, d in enumerate(puzzle) if d != "0" and answer[i : i + 1] != d]
    if sudoku.solved(answer) and not changed:
        return notice("Solved: every row, column and box holds 1 to 4, and the givens are kept.", "good")
    if not sudoku.solved(answer):
        return notice(f"Not solved: the model wrote {answer[:40] or 'nothing'}. Marked cells break a rule.", "bad")
    return notice("A valid grid, but the model changed a given digit.", "bad")


def build(desk: Desk, panel: Panel) -> None:
    """Draws the view and wires it."""
    gr.Markdown("Type the digits that are given (1 to 4), leave the others empty, and watch the model solve the grid.")
    with gr.Row():
        with gr.Column(min_width=280, scale=1):
            cells = []
            for row in range(sudoku.SIDE):
                with gr.Row(elem_classes="cells"):
                    for column in range(sudoku.SIDE):
                        cell = gr.Textbox(
                            label=f"row {row + 1} column {column + 1}", show_label=False, container=False,
                            max_length=1, min_width=48, elem_id=f"cell-{row}-{column}",
                        )  # fmt: skip
                        cells.append(cell)
            with gr.Row():
                new = gr.Button("Another puzzle", size="sm", min_width=100, elem_id="draw")
                clear = gr.Button("Clear", size="sm", min_width=60)
            keep = gr.Checkbox(False, label="Pin the givens", info="write them into the answer beforehand")
            with gr.Row():
                solve = gr.Button("Solve", variant="primary", min_width=100, elem_id="solve")
                stop = gr.Button("Stop", variant="stop", min_width=60)
        with gr.Column(scale=2):
            board = gr.HTML(sudoku.blank("0" * sudoku.CELLS), apply_default_css=False, elem_id="board")
            word = gr.HTML(notice(""), apply_default_css=False, elem_id="verdict")
    view = SudokuView(desk, panel, cells, keep)
    event = solve.click(view.solve, {*cells, keep, *panel.inputs}, [board, word], **desk.queue())
    stop.click(None, cancels=[event], **QUICK)
    new.click(view.draw, None, [*cells, board, word], **QUICK)
    clear.click(lambda: [""] * sudoku.CELLS, None, cells, **QUICK).then(view.check, cells, [board, word], **QUICK)
    gr.on([cell.input for cell in cells], view.check, cells, [board, word], trigger_mode="multiple", **QUICK)
