"""4x4 sudoku as a grid: what a person typed, which cells break a rule, how a canvas of digits is shown as a grid.

Knows the rules of the puzzle; does not know models.
"""

from collections.abc import Sequence

from app.canvas import Cell
from app.models import Refused
from app.render import STATE_CLASS, escape, level

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
