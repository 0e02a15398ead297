"""The views that fill gaps: Infill and the sudoku grid."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import gradio as gr

from app.canvas import GAP, Cell, Trace, for_template, pinned, readable, with_gaps
from app.conversation import ChatSession, Refused, Writing, fits, refusing
from app.models import Desk, told
from app.panel import QUICK, Panel, Values
from app.render import STATE_CLASS, escape, level, notice
from llada_core.data import puzzles

SIDE = 4
CELLS = SIDE * SIDE
UNITS = tuple(
    [tuple(range(SIDE * i, SIDE * i + SIDE)) for i in range(SIDE)]
    + [tuple(range(i, CELLS, SIDE)) for i in range(SIDE)]
    + [(i, i + 1, i + 4, i + 5) for i in (0, 2, 8, 10)]
)


def typed(values: Sequence[str | None]) -> str:
    """16 digits in row order, 0 for an empty cell; raises Refused for anything but 1 to 4, or an impossible puzzle."""
    digits = "".join((value or "").strip() or "0" for value in values)
    wrong = next((v for v in values if (v or "").strip() not in ("", "0", "1", "2", "3", "4")), None)
    if wrong is not None or len(digits) != CELLS:
        raise Refused(f"A cell holds one digit from 1 to 4, or nothing (got {(wrong or digits)[:20]!r}).")
    if broken := conflicts(digits):
        cells = ", ".join(f"row {i // SIDE + 1} column {i % SIDE + 1}" for i in sorted(broken))
        raise Refused(f"Two equal digits meet in a row, column or box: {cells}.")
    return digits


def conflicts(digits: str) -> set[int]:
    """Cells whose digit occurs twice in a row, column or box."""
    return {i for unit in UNITS for i in unit if digits[i] in "1234" and sum(digits[j] == digits[i] for j in unit) > 1}


def solved(digits: str) -> bool:
    """Whether all cells hold digits that break no rule."""
    return len(digits) == CELLS and set(digits) <= set("1234") and not conflicts(digits)


def grid(puzzle: str, cells: Sequence[Cell], caption: str) -> str:
    """The first 16 positions of an answer as a board; a broken rule and a changed given are marked."""
    cells = list(cells[:CELLS])
    now = "".join(c.text if c.text in {"1", "2", "3", "4"} and c.state != "open" else "0" for c in cells).ljust(
        CELLS, "0"
    )
    wrong = conflicts(now) | {i for i, given in enumerate(puzzle) if given != "0" and now[i] not in ("0", given)}
    tiles = []
    for i, cell in enumerate(cells):
        classes = STATE_CLASS[cell.state] + (f" c{level(cell.confidence)}" if cell.state in ("fresh", "done") else "")
        given = " k" if puzzle[i] != "0" else ""
        bad = " x" if i in wrong else ""
        what = "breaks a rule" if bad else "given" if given else cell.state
        tiles.append(f'<i class="{classes}{given}{bad}" title="{what}">{escape(cell.text)}</i>')
    count = f"{CELLS - now.count('0')} of {CELLS} cells written, {len(wrong)} wrong"
    board = f'<div class="board" role="img" aria-label="{count}">{"".join(tiles)}</div>'
    return f'<div class="lf"><p class="cap">{escape(caption) or "&nbsp;"}</p>{board}</div>'


def blank(puzzle: str) -> str:
    """The board before the model writes."""
    return grid(puzzle, [Cell("" if d == "0" else d, "open" if d == "0" else "given", None, False) for d in puzzle], "")


GAPS = (
    ("Once upon a time there was [[12]] who liked to read.", ""),
    ("2+[[1]]=5", ""),
    ("The sea is [[8]]", ""),
    ("Write a short poem about the sea.", "0:Once, 12:end"),
)
PUZZLES = (
    ("Solve the sudoku 1030340020030001", "0:1234, 12:4321"),
    ("Seat these people anew: 438597612", "0:7, 8:4"),
    ("Make 13 from 8, 3, 8", "0:8"),
)
HELP = """Ask something and pin words of its answer at positions: `0:Once, 12:end`. Or write a text with gaps: `[[5]]` is
room for five tokens, also at its end. Text with gaps is not a question: the model goes by what it read in pretraining."""
Shown = tuple[Any, Any]


@dataclass(frozen=True)
class InfillView:
    """The components that the handler reads."""

    desk: Desk
    panel: Panel
    text: gr.Textbox
    pins: gr.Textbox

    def fill(self, values: Values) -> Iterator[Shown]:
        """Writes into the gaps of the text, or without any answers it around the pinned words."""
        yield from told(lambda: self._fill(values), lambda text: (notice(text, "bad"), gr.skip()))

    def _fill(self, values: Values) -> Iterator[Shown]:
        text, pins, watch = values[self.text] or "", values[self.pins] or "", bool(values[self.panel.guesses])
        if pins.strip() and GAP.search(text):
            raise Refused("Pinned words belong to the answer to a question; take them away, or the gaps.")
        engine, _ = self.desk.engine(values[self.panel.model])
        params = self.panel.params(values)
        if GAP.search(text):
            with refusing():
                template = with_gaps(text, engine.encode, engine.mask_id, engine.context)
            writing, read = Writing(), engine.whole
            steps = engine.fill(template, for_template(params, [template], engine.mask_id), watch=watch)
        else:
            chat = ChatSession()
            chat.ask(text)
            prompt = engine.chat_ids(chat.messages())
            fits(engine, len(prompt), params)
            with refusing():
                fixed = pinned(params.max_new_tokens, pins, engine.encode)
            writing, read = Writing(Trace(prompt)), engine.text
            steps = engine.write(prompt, params, pinned=fixed, watch=watch)
        frames, picture = writing.run(steps, engine.decode, limit=self.desk.seconds), ""
        for picture in self.panel.live(engine, writing, frames, values):
            yield picture, gr.skip()
        yield picture + notice(writing.note), readable(read(writing.tokens()))


def build_infill(desk: Desk, panel: Panel) -> None:
    """Draws the view and wires it."""
    gr.Markdown(HELP)
    samples = PUZZLES if desk.catalogue.knows_sudoku(desk.model) else GAPS
    with gr.Row():
        text = gr.Textbox(samples[0][0], label="A question, or a text with gaps", lines=3, scale=3, elem_id="gaps")
        pins = gr.Textbox(
            samples[0][1],
            label="Pinned words of the answer",
            placeholder="0:Once, 12:end",
            lines=3,
            scale=2,
            elem_id="pins",
        )
    with gr.Row():
        fill = gr.Button("Fill in", variant="primary", elem_id="fill")
        stop = gr.Button("Stop", variant="stop", elem_id="stop-infill")
    examples = gr.Dataset(components=[text, pins], samples=[list(each) for each in samples], label="Examples")
    shown = gr.HTML(notice("The canvas will appear here."), apply_default_css=False, elem_id="infilled")
    plain = gr.Textbox(label="Plain text", interactive=False, buttons=["copy"], lines=2, elem_id="infilled-text")
    view = InfillView(desk, panel, text, pins)
    event = fill.click(view.fill, {text, pins, *panel.inputs}, [shown, plain], **desk.queue())
    stop.click(None, cancels=[event], **QUICK)
    examples.click(lambda sample: sample, examples, [text, pins], **QUICK)


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
        puzzle = typed([values[cell] for cell in self.cells])
        engine, _ = self.desk.engine(values[self.panel.model])
        prompt = engine.chat_ids([{"role": "user", "content": puzzles.sudoku_prompt(puzzle, random.Random(0))}])
        digits = [engine.encode(digit) for digit in puzzle]
        one_each = all(len(ids) == 1 for ids in digits)
        pins = {i: digits[i][0] for i, d in enumerate(puzzle) if d != "0"} if values[self.keep] and one_each else None
        writing = Writing(Trace(prompt))
        steps = engine.write(prompt, self.panel.params(values), pinned=pins, watch=bool(values[self.panel.guesses]))
        frames = writing.run(steps, engine.decode, limit=self.desk.seconds)
        board = blank(puzzle)
        for board in self.panel.live(engine, writing, frames, values, partial(grid, puzzle)):
            yield board, notice("")
        yield board, verdict(puzzle, "".join(engine.text(writing.tokens()).split()))

    def check(self, *typed: str) -> Shown:
        """Shows the typed grid, marking what breaks a rule."""
        digits = "".join(t.strip() if t and t.strip() in {"1", "2", "3", "4"} else "0" for t in typed)
        broken = conflicts(digits)
        word = "Two equal digits meet in a row, column or box." if broken else ""
        return blank(digits), notice(word, "bad" if broken else "info")

    def draw(self) -> list[Any]:
        """A puzzle that training never saw."""
        seed = str(random.SystemRandom().random())
        puzzle = next(puzzles.draw(puzzles.sudoku, part="evaluate", count=1, seed=seed)).key
        return [*["" if d == "0" else d for d in puzzle], blank(puzzle), notice("")]


def verdict(puzzle: str, answer: str) -> str:
    """Whether the answer solves the puzzle, as a sentence."""
    changed = [i for i, d in enumerate(puzzle) if d != "0" and answer[i : i + 1] != d]
    if solved(answer) and not changed:
        return notice("Solved: every row, column and box holds 1 to 4, and the givens are kept.", "good")
    if not solved(answer):
        return notice(f"Not solved: the model wrote {answer[:40] or 'nothing'}. Marked cells break a rule.", "bad")
    return notice("A valid grid, but the model changed a given digit.", "bad")


def build_sudoku(desk: Desk, panel: Panel) -> None:
    """Draws the view and wires it."""
    gr.Markdown("Type the digits that are given (1 to 4), leave the others empty, and watch the model solve the grid.")
    with gr.Row():
        with gr.Column(min_width=280, scale=1):
            cells = []
            for row in range(SIDE):
                with gr.Row(elem_classes="cells"):
                    for column in range(SIDE):
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
            board = gr.HTML(blank("0" * CELLS), apply_default_css=False, elem_id="board")
            word = gr.HTML(notice(""), apply_default_css=False, elem_id="verdict")
    view = SudokuView(desk, panel, cells, keep)
    event = solve.click(view.solve, {*cells, keep, *panel.inputs}, [board, word], **desk.queue())
    stop.click(None, cancels=[event], **QUICK)
    new.click(view.draw, None, [*cells, board, word], **QUICK)
    clear.click(lambda: [""] * CELLS, None, cells, **QUICK).then(view.check, cells, [board, word], **QUICK)
    gr.on([cell.input for cell in cells], view.check, cells, [board, word], trigger_mode="multiple", **QUICK)
