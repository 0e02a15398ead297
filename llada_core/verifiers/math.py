"""Mathematics with the answer in a box: right if the last boxed expression is equal after normalising its notation.

The rules are those of the MATH benchmark's own comparison (Hendrycks et al., arXiv:2103.03874), plus commas between
thousands. Expressions are compared as text, never evaluated: a reply cannot make the comparison run long.
"""

import re
from collections.abc import Mapping
from typing import Any


def verify(text: str, answer: Mapping[str, Any]) -> bool:
    """`answer["answer"]`: a text whose last box holds the right expression."""
    wanted, given = last_boxed(str(answer["answer"])), last_boxed(text)
    return wanted is not None and given is not None and normalised(wanted) == normalised(given)


def last_boxed(text: str) -> str | None:
    r"""What the last `\boxed{...}` holds (`\fbox` too); None without one, or when it is not closed."""
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if start < 0:
        return None
    start = text.index("{", start) + 1
    depth = 1
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start:end]
    return None


def normalised(expression: str) -> str:
    """The expression without what does not change its value: spaces, units, sizes of brackets and fractions."""
    text = expression.replace("\n", "").replace("\\!", "").replace("\\\\", "\\")
    text = re.sub(r"\\[td]frac", r"\\frac", text)
    text = re.sub(r"\\left|\\right|\^\{?\\circ\}?|\\\$|\\?%", "", text)
    text = text.split("\\text{ ")[0]
    text = re.sub(r"(^|[ {])\.", r"\g<1>0.", text)
    left, equals, right = text.partition("=")
    if equals and "=" not in right and len(left.strip()) <= 2:
        text = right
    text = re.sub(r"\\sqrt([^{\s])", r"\\sqrt{\1}", text).replace(" ", "")
    text = re.sub(r"\\frac([^{\\])([^{\\])", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac([^{\\])\{", r"\\frac{\1}{", text)
    text = re.sub(r"(\\frac\{[^{}]*\})([^{\\])", r"\1{\2}", text)
    if re.fullmatch(r"-?\d{1,3}(,\d{3})+(\.\d+)?", text):
        text = text.replace(",", "")
    if text == "0.5":
        return "\\frac{1}{2}"
    return re.sub(r"^(-?\d+)/(-?\d+)$", r"\\frac{\1}{\2}", text)
