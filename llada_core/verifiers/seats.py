"""Seats: right if the same people sit in a new order in which nobody has kept a seat."""

import re
from collections.abc import Mapping
from typing import Any

from llada_core.verifiers.text import final_answer


def verify(text: str, answer: Mapping[str, Any]) -> bool:
    """`answer`: `order` (one digit per person); the reply is the new order, spaces aside."""
    before, after = answer["order"], re.sub(r"\s", "", final_answer(text))
    return sorted(after) == sorted(before) and all(a != b for a, b in zip(before, after, strict=True))
