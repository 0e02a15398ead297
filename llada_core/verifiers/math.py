"""Mathematics with the answer in a box: right if the last boxed expression means the same as the right one.

The same text after normalising its notation, the same number, or equal for math-verify, which reads algebra, roots,
intervals, sets and matrices. It is not asked about words, numerals of other bases or clock times, which it would take
for products, nor about expressions whose value would take long: a reply cannot make the comparison run long.

`math_hendrycks` is the MATH benchmark's own comparison (Hendrycks et al., arXiv:2103.03874) of texts alone, plus commas
between thousands; d1's and dllm's rewards use it.
"""

import logging
import re
from collections.abc import Mapping
from typing import Any

from llada_core.verifiers.notation import box_kind, notation, readable, single

_PRECISION = 12  # digits to which decimals must agree


def verify(text: str, answer: Mapping[str, Any]) -> bool:
    """`answer["answer"]`: the right expression, or a text whose last box holds it."""
    wanted, given = last_boxed(str(answer["answer"])), last_boxed(text)
    if wanted is None and "\\boxed" not in str(answer["answer"]):
        wanted = str(answer["answer"])
    return wanted is not None and given is not None and same(wanted, given)


def hendrycks(text: str, answer: Mapping[str, Any]) -> bool:
    """The published rule: the boxes hold the same text after `normalised`."""
    wanted, given = last_boxed(str(answer["answer"])), last_boxed(text)
    return wanted is not None and given is not None and normalised(wanted) == normalised(given)


def same(wanted: str, given: str) -> bool:
    """Whether two expressions mean the same; an empty one means nothing."""
    wanted, given = notation(wanted), notation(given)
    if not wanted or not given:
        return False
    if wanted == given or normalised(wanted) == normalised(given):
        return True
    numbers = single(wanted), single(given)
    if None not in numbers:
        return numbers[0] == numbers[1]
    return readable(wanted) and readable(given) and box_kind(wanted) == box_kind(given) and _equal(wanted, given)


def _equal(wanted: str, given: str) -> bool:
    """math-verify's verdict. Its own clock is off, for it needs the main thread; `readable` keeps it short instead."""
    from math_verify import parse, verify  # brings sympy: seconds that only these answers need

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of the clock that is off
    parsed = [parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in (wanted, given)]
    return bool(verify(*parsed, float_rounding=_PRECISION, timeout_seconds=None))


def last_boxed(text: str) -> str | None:
    r"""What the last `\boxed{...}` holds (`\fbox`, `\boxed x` too, boxes in it opened); None without one or its end."""
    found = list(re.finditer(r"\\f?box(?:ed)?(?![A-Za-z])\s*", text))
    if not found:
        return None
    start = found[-1].end()
    if text[start : start + 1] != "{":
        bare = re.match(r"[^\s$,;]+", text[start:])
        return bare[0].rstrip(".") if bare else None
    depth = 0
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start + 1 : end]
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
