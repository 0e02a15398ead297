"""A canvas in a terminal: one box of fixed width per position, so that nothing moves while the model writes.

Knows cells and rich; does not know models.
"""

from collections.abc import Sequence

from rich.text import Text

from llada_core.sampling.trace import Cell

BOX = 6  # columns of one position, a space included
SHADES = ("dim", "", "cyan", "bold cyan", "bold bright_white")  # unsure to sure
MASK, MASK_IN_BLOCK = "░" * (BOX - 1), "▒" * (BOX - 1)


def picture(cells: Sequence[Cell], width: int) -> Text:
    """The canvas in lines of `width` columns: masked hatched (closer in the present block), given underlined, fresh in reverse, others by confidence."""
    text, per_line = Text(), max(1, width // BOX)
    for number, cell in enumerate(cells):
        text.append(shown(cell), style_of(cell))
        text.append("\n" if number % per_line == per_line - 1 else " ")
    return text


def shown(cell: Cell) -> str:
    """The text of a position, cut or padded to its box."""
    if cell.state == "open" and not cell.text:
        return MASK_IN_BLOCK if cell.in_block else MASK
    return cell.text.ljust(BOX - 1) if len(cell.text) < BOX else cell.text[: BOX - 2] + "…"


def style_of(cell: Cell) -> str:
    """How a position looks; no meaning hangs on colour alone."""
    if cell.state == "open":
        return "italic yellow" if cell.text else ("bright_black" if cell.in_block else "dim bright_black")
    if cell.state == "given":
        return "underline"
    if cell.state == "fresh":
        return "reverse bold"
    sure = 0.5 if cell.confidence is None else cell.confidence
    return SHADES[min(len(SHADES) - 1, int(max(0.0, sure) * len(SHADES)))]
