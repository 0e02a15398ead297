"""The views that fill gaps: Infill and the sudoku grid."""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import gradio as gr

from app.canvas import (
    GAP,
    GIVEN,
    OPEN,
    STATES,
    Frame,
    Trace,
    fixed_tokens,
    for_template,
    parse_template,
    readable,
    unwritten,
)
from app.conversation import LiveAnswer, prompt_ids, question
from app.guide import judged
from app.models import AppState, UserError, as_user_error, errors_as_text
from app.panel import QUICK, Panel, Values, speed_control
from app.render import canvas, classes, escape, notice, verdict
from llada_core.data import puzzles
from llada_core.usage import Usage
from llada_core.verifiers.answers import verify_sudoku

SIDE = 4
CELLS = SIDE * SIDE
DIGITS = ("1", "2", "3", "4")


def puzzle_of(values: Sequence[str | None]) -> str:
    """16 digits in row order, 0 for an empty cell; raises UserError for anything but 1 to 4, or an impossible puzzle."""
    digits = [(value or "").strip() or "0" for value in values]
    wrong = next((digit for digit in digits if digit not in ("0", *DIGITS)), None)
    if wrong is not None:
        raise UserError(f"A cell holds one digit from 1 to 4, or nothing (got {wrong[:20]!r}).")
    puzzle = "".join(digits)
    if broken := puzzles.conflicts(puzzle):
        cells = ", ".join(f"row {i // SIDE + 1} column {i % SIDE + 1}" for i in sorted(broken))
        raise UserError(f"Two equal digits meet in a row, column or box: {cells}.")
    return puzzle


def grid(puzzle: str, frame: Frame, texts: Sequence[str], caption: str) -> str:
    """The first 16 positions of an answer as a board; a broken rule and a changed given are marked."""
    texts = texts[:CELLS]
    written = [text if text in DIGITS and frame.state[at] != OPEN else "0" for at, text in enumerate(texts)]
    now = "".join(written).ljust(CELLS, "0")
    wrong = puzzles.conflicts(now) | {
        i for i, given in enumerate(puzzle) if given != "0" and now[i] not in ("0", given)
    }
    tiles = []
    for at, text in enumerate(texts):
        given = " k" if puzzle[at] != "0" else ""
        bad = " x" if at in wrong else ""
        what = "breaks a rule" if bad else "given" if given else STATES[frame.state[at]]
        tiles.append(f'<i class="{classes(frame, at)}{given}{bad}" title="{what}">{escape(text)}</i>')
    count = f"{CELLS - now.count('0')} of {CELLS} cells written, {len(wrong)} wrong"
    board = f'<div class="board" role="img" aria-label="{count}">{"".join(tiles)}</div>'
    return f'<div class="lf"><p class="cap">{escape(caption) or "&nbsp;"}</p>{board}</div>'


def blank(puzzle: str) -> str:
    """The board before the model writes."""
    before = unwritten([OPEN if digit == "0" else GIVEN for digit in puzzle])
    return grid(puzzle, before, ["" if digit == "0" else digit for digit in puzzle], "")


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

    state: AppState
    panel: Panel
    text: gr.Textbox
    pins: gr.Textbox
    speed: gr.Radio

    def fill(self, values: Values) -> Iterator[Shown]:
        """Writes into the gaps of the text, or without any answers it around the pinned words."""
        yield from errors_as_text(lambda: self._fill(values), lambda text: (notice(text, "bad"), ""))

    def _fill(self, values: Values) -> Iterator[Shown]:
        text, pins, watch = values[self.text] or "", values[self.pins] or "", bool(values[self.panel.guesses])
        if pins.strip() and GAP.search(text):
            raise UserError("Pinned words belong to the answer to a question; take them away, or the gaps.")
        loaded, _ = self.state.loaded(values[self.panel.model])
        params, tokenizer, gaps = self.panel.params(values), loaded.tokenizer, bool(GAP.search(text))
        doubts = loaded.doubts(params)
        read: Callable[[list[int]], str] = tokenizer.answer_text
        if gaps:
            with as_user_error():
                template = parse_template(text, tokenizer.encode, tokenizer.special.mask_id, loaded.context)
            params = for_template(params, [template], tokenizer.special.mask_id)
            answer, read = LiveAnswer(), tokenizer.decode  # nothing is cut off at an end token
            steps = loaded.fill(template, params, look_ahead=watch)
        else:
            prompt = prompt_ids(loaded, [question(text)], params)
            with as_user_error():
                fixed = fixed_tokens(params.max_new_tokens, pins, tokenizer.encode)
            answer = LiveAnswer(Trace(prompt))
            steps = loaded.write(prompt, params, fixed_tokens=fixed, look_ahead=watch)
        answer.shown_in = self.state.speeds[values[self.speed]]
        frames, picture = answer.run(loaded, steps, read=read, limit=self.state.seconds), ""
        for picture in self.panel.live(loaded, answer, frames, values, params, partial(canvas, ends=not gaps)):
            yield picture, ""
        said = "" if gaps else NO_GAP if not pins.strip() else ""
        checked = verdict(judged(text, answer.text, loaded.usage)) if answer.whole and not gaps else ""
        yield picture + checked + notice(" ".join([answer.note, said, doubts]).strip()), readable(answer.text)


NO_GAP = "There is no gap like [[5]] in the text, so it was asked as a question."


def knows_sudoku(usage: Usage) -> bool:
    """Whether the grid fits the model: one of its questions holds one."""
    return any(re.search(rf"\b[0-{SIDE}]{{{CELLS}}}\b", question) for question in usage.examples)


def build_infill(state: AppState, panel: Panel) -> None:
    """Draws the view and wires it."""
    gr.Markdown(HELP)
    samples = PUZZLES if knows_sudoku(state.index.usage(state.model)) else GAPS
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
        stop = gr.Button("Stop", elem_id="stop-infill")
        speed = speed_control(state, "infill-speed")
    examples = gr.Dataset(components=[text, pins], samples=[list(each) for each in samples], label="Examples")
    shown = gr.HTML(notice("The canvas will appear here."), apply_default_css=False, elem_id="infilled")
    plain = gr.Textbox(label="Plain text", interactive=False, buttons=["copy"], lines=2, elem_id="infilled-text")
    view = InfillView(state, panel, text, pins, speed)
    event = fill.click(view.fill, {text, pins, speed, *panel.inputs}, [shown, plain], **state.queue())
    stop.click(None, cancels=[event], **QUICK)
    examples.click(lambda sample: sample, examples, [text, pins], **QUICK)


@dataclass(frozen=True)
class SudokuView:
    """The components that the handlers read."""

    state: AppState
    panel: Panel
    cells: list[gr.Textbox]
    keep: gr.Checkbox
    speed: gr.Radio

    def solve(self, values: Values) -> Iterator[Shown]:
        """Asks the model for the solution of the typed grid."""
        typed = self.check(*(values[cell] for cell in self.cells))[0]  # an error leaves no older solution on the board
        yield from errors_as_text(lambda: self._solve(values), lambda text: (typed, notice(text, "bad")))

    def _solve(self, values: Values) -> Iterator[Shown]:
        puzzle = puzzle_of([values[cell] for cell in self.cells])
        loaded, _ = self.state.loaded(values[self.panel.model])
        params = self.panel.params(values)
        prompt = prompt_ids(loaded, [question(puzzles.sudoku_prompt(puzzle, random.Random(0)))], params)
        digits = [loaded.tokenizer.encode(digit) for digit in puzzle]
        one_each = all(len(ids) == 1 for ids in digits)
        pins = {i: digits[i][0] for i, d in enumerate(puzzle) if d != "0"} if values[self.keep] and one_each else None
        answer = LiveAnswer(Trace(prompt))
        steps = loaded.write(prompt, params, fixed_tokens=pins, look_ahead=bool(values[self.panel.guesses]))
        frames = answer.run(loaded, steps, limit=self.state.seconds)
        board = blank(puzzle)
        answer.shown_in = self.state.speeds[values[self.speed]]
        for board in self.panel.live(loaded, answer, frames, values, params, partial(grid, puzzle)):
            yield board, notice("")
        said = solved(puzzle, answer.text) if answer.whole else notice(answer.note)
        yield board, said + notice(loaded.doubts(params))

    def check(self, *values: str) -> Shown:
        """Shows the typed grid, marking what breaks a rule."""
        digits = "".join(value.strip() if value and value.strip() in DIGITS else "0" for value in values)
        word = "Two equal digits meet in a row, column or box." if puzzles.conflicts(digits) else ""
        return blank(digits), notice(word, "bad" if word else "info")

    def draw(self) -> list[Any]:
        """A puzzle that training never saw."""
        puzzle = next(
            puzzles.draw(puzzles.sudoku, split="evaluate", count=1, seed=str(random.SystemRandom().random()))
        ).key
        return [*["" if d == "0" else d for d in puzzle], blank(puzzle), notice("")]


FIRST = "1030340020030001"  # the puzzle that stands there at first


def solved(puzzle: str, answer: str) -> str:
    """Whether the answer solves the puzzle, as a sentence."""
    if verify_sudoku(answer, {"puzzle": puzzle}):
        return notice("Solved: every row, column and box holds 1 to 4, and the givens are kept.", "good")
    if verify_sudoku(answer, {"puzzle": "0" * CELLS}):
        return notice("A valid grid, but the model changed a given digit.", "bad")
    written = "".join(answer.split())[:40] or "nothing"
    return notice(f"Not solved: the model wrote {written}. Marked cells break a rule.", "bad")


def build_sudoku(state: AppState, panel: Panel) -> None:
    """Draws the view and wires it."""
    gr.Markdown("Type the digits that are given (1 to 4), leave the others empty, and watch the model solve the grid.")
    with gr.Row():
        with gr.Column(min_width=280, scale=1):
            cells = []
            for row in range(SIDE):
                with gr.Row(elem_classes="cells"):
                    for column in range(SIDE):
                        cell = gr.Textbox(
                            FIRST[SIDE * row + column].replace("0", ""),
                            label=f"row {row + 1} column {column + 1}", show_label=False, container=False,
                            max_length=1, min_width=48, elem_id=f"cell-{row}-{column}",
                        )  # fmt: skip
                        cells.append(cell)
            with gr.Row():
                new = gr.Button("Another puzzle", size="sm", min_width=100, elem_id="draw")
                clear = gr.Button("Clear", size="sm", min_width=60, elem_id="clear")
            keep = gr.Checkbox(False, label="Pin the givens", info="write them into the answer beforehand")
            with gr.Row():
                solve = gr.Button("Solve", variant="primary", min_width=100, elem_id="solve")
                stop = gr.Button("Stop", min_width=60)
            speed = speed_control(state, "sudoku-speed")
        with gr.Column(scale=2):
            board = gr.HTML(blank(FIRST), apply_default_css=False, elem_id="board")
            word = gr.HTML(notice(""), apply_default_css=False, elem_id="verdict")
    view = SudokuView(state, panel, cells, keep, speed)
    event = solve.click(view.solve, {*cells, keep, speed, *panel.inputs}, [board, word], **state.queue())
    stop.click(None, cancels=[event], **QUICK)
    new.click(view.draw, None, [*cells, board, word], **QUICK)
    clear.click(lambda: [""] * CELLS, None, cells, **QUICK).then(view.check, cells, [board, word], **QUICK)
    gr.on([cell.input for cell in cells], view.check, cells, [board, word], trigger_mode="multiple", **QUICK)
