"""4x4 sudoku: right if all 16 cells are given, the givens are kept and rows, columns and boxes hold 1 to 4."""

import re
from collections.abc import Mapping
from typing import Any

from llada_core.verifiers.text import final_answer

_UNITS = tuple(
    [tuple(range(4 * i, 4 * i + 4)) for i in range(4)]
    + [tuple(range(i, 16, 4)) for i in range(4)]
    + [(i, i + 1, i + 4, i + 5) for i in (0, 2, 8, 10)]
)


def verify(text: str, answer: Mapping[str, Any]) -> bool:
    """`answer["puzzle"]`: 16 digits, 0 for an empty cell. White space in the reply is ignored; nothing else is."""
    grid = re.sub(r"\s", "", final_answer(text))
    if re.fullmatch("[1-4]{16}", grid) is None:
        return False
    keeps = all(given in ("0", digit) for given, digit in zip(answer["puzzle"], grid, strict=True))
    return keeps and all(len({grid[i] for i in unit}) == 4 for unit in _UNITS)
