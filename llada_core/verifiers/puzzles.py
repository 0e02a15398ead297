"""The generated puzzles: 4x4 sudoku, countdown, seats. Malformed text is wrong."""

import ast
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from llada_core.verifiers.notation import final_answer

_UNITS = tuple(
    [tuple(range(4 * i, 4 * i + 4)) for i in range(4)]
    + [tuple(range(i, 16, 4)) for i in range(4)]
    + [(i, i + 1, i + 4, i + 5) for i in (0, 2, 8, 10)]
)
_LONGEST = 200


def sudoku(text: str, answer: Mapping[str, Any]) -> bool:
    """Whether all 16 cells are given, the givens kept, and rows, columns and boxes hold 1 to 4.

    `answer["puzzle"]`: 16 digits, 0 for an empty cell. White space in the reply is ignored; nothing else is.
    """
    grid = re.sub(r"\s", "", final_answer(text))
    if re.fullmatch("[1-4]{16}", grid) is None:
        return False
    keeps = all(given in ("0", digit) for given, digit in zip(answer["puzzle"], grid, strict=True))
    return keeps and all(len({grid[i] for i in unit}) == 4 for unit in _UNITS)


def seats(text: str, answer: Mapping[str, Any]) -> bool:
    """Whether the same people sit in a new order in which nobody has kept a seat.

    `answer`: `order` (one digit per person); the reply is the new order, spaces aside.
    """
    before, after = answer["order"], re.sub(r"\s", "", final_answer(text))
    return sorted(after) == sorted(before) and all(a != b for a, b in zip(before, after, strict=True))


def countdown(text: str, answer: Mapping[str, Any]) -> bool:
    """Whether the expression uses every number exactly once and its exact value is the target.

    `answer`: `numbers` (list of int) and `target` (int). An equals sign and what follows it are not accepted.
    """
    expression = final_answer(text)
    if sorted(map(int, re.findall(r"[0-9]+", expression[:_LONGEST]))) != sorted(answer["numbers"]):
        return False
    return value(expression) == answer["target"]


def value(expression: str) -> Fraction | None:
    """The exact value of whole numbers joined by + - * / and brackets; None for anything else, powers included."""
    if len(expression) > _LONGEST or re.fullmatch(r"[0-9+\-*/() ]+", expression) is None:
        return None
    try:
        return _value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr) -> Fraction | None:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        operand = _value(node.operand)
        return None if operand is None else -operand
    if not isinstance(node, ast.BinOp):
        return None
    left, right = _value(node.left), _value(node.right)
    if left is None or right is None:
        return None
    match node.op:
        case ast.Add():
            return left + right
        case ast.Sub():
            return left - right
        case ast.Mult():
            return left * right
        case ast.Div():
            return left / right
    return None
