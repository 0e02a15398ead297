"""Word problems whose answer is one number: right if the reply's final number has that value.

How a number may be spelled stands in numbers.py. The published reward, which wants equal strings, is `gsm8k_exact`.
"""

import re
from collections.abc import Mapping
from typing import Any

from llada_core.verifiers.math import last_boxed
from llada_core.verifiers.notation import number, tagged

# A line behind four hashes answers if it is a number or says that it is the answer: "Step 2: add" is a heading.
_MARKED = re.compile(
    r"####[ \t*:]*(?:(?:the|final|answer|total|is|equals?|:|=)[ \t*:]*)*(?P<line>[^\w\n]*(?:[A-Z]{2,3}\W?)?\d[^\n]*)",
    re.IGNORECASE,
)
_REASON = re.compile(r"(.*?\d.*?)(?:[,;.]\s+(?!\W*\d)|\(|\b(?:as|because|since|so)\b)")


def verify(text: str, answer: Mapping[str, Any]) -> bool:
    """`answer["answer"]`: the number as text. The reply's is in the last answer tags, else behind ####, else last.

    A right answer that is no number (12:30) must be given as it is written.
    """
    wanted, given = final(str(answer["answer"])), final(text)
    if _letters(wanted) and _letters(wanted) == _letters(given):
        return True
    value = number(wanted)
    return value is not None and value == number(given)


def exact(text: str, answer: Mapping[str, Any]) -> bool:
    """d1's and dllm's rule: what the last answer tags hold is the answer's text, but for commas between thousands."""
    reply = text.split("<answer>")[-1].split("</answer>")[0].strip()
    return without_commas(reply) == without_commas(str(answer["answer"]))


def final(text: str) -> str:
    """The part of a reply that says its answer: tagged, else behind #### on that line, else boxed, else all of it."""
    reply = tagged(text)
    if reply is None and (marked := list(_MARKED.finditer(text))):
        line = marked[-1]["line"]
        reason = _REASON.match(line)
        reply = reason[1] if reason else line
    whole = text if reply is None else reply
    boxed = last_boxed(whole)
    if boxed is not None:
        return boxed
    without = re.sub(r"\([^()]*\)", " ", whole)  # "8 apples (5 red and 3 green)"
    return without if reply is not None and re.search(r"\d", without) else whole


def without_commas(text: str) -> str:
    """The text with no comma between thousands."""
    return re.sub(r"(?<=\d),(?=\d{3}(\D|$))", "", text)


def _letters(text: str) -> str:
    return re.sub(r"\s", "", text).casefold()
