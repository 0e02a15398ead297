"""Countdown: right if the expression uses every number exactly once and its exact value is the target."""

import ast
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from llada_core.verifiers.text import final_answer

_LONGEST = 200


def verify(text: str, answer: Mapping[str, Any]) -> bool:
    """`answer`: `numbers` (list of int) and `target` (int). An equals sign and what follows it are not accepted."""
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
