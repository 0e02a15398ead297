"""Splitting a number: right if the sum has as many different terms as asked for, none too small, and the total."""

import re
from collections.abc import Mapping
from typing import Any

from llada_core.verifiers.text import final_answer


def verify(text: str, answer: Mapping[str, Any]) -> bool:
    """`answer`: `total`, `parts` and `least` (all int); the reply is whole numbers joined by plus signs."""
    expression = re.sub(r"\s", "", final_answer(text))
    if re.fullmatch(r"[0-9]{1,9}(\+[0-9]{1,9})*", expression) is None:
        return False
    terms = [int(term) for term in expression.split("+")]
    return (
        len(terms) == len(set(terms)) == answer["parts"]
        and min(terms) >= answer["least"]
        and sum(terms) == answer["total"]
    )
