"""Is an answer right? One function a task, and the one door to them.

Mathematics compares the last boxed expressions: the same text after normalising its notation, the same number, or equal
for math-verify, which reads algebra, roots, intervals, sets and matrices. It is not asked about words, numerals of other
bases or clock times, which it would take for products, nor about expressions whose value would take long: a reply cannot
make the comparison run long. `math_hendrycks` is the MATH benchmark's own comparison (Hendrycks et al.,
arXiv:2103.03874) of texts alone, plus commas between thousands; d1's and dllm's rewards use it.
GSM8K compares the reply's final number by value; the published reward, which wants equal strings, is `gsm8k_exact`.
"""

import ast
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import Any

from llada_core.data.puzzles import is_solved
from llada_core.settings import nearest
from llada_core.verifiers import code
from llada_core.verifiers.notation import box_kind, final_answer, notation, number, readable, single, tagged

_PRECISION = 12  # digits to which decimals must agree


def verify_math(text: str, answer: Mapping[str, Any]) -> bool:
    """`answer["answer"]`: the right expression, or a text whose last box holds it."""
    wanted, given = last_boxed(str(answer["answer"])), last_boxed(text)
    if wanted is None and "\\boxed" not in str(answer["answer"]):
        wanted = str(answer["answer"])
    return wanted is not None and given is not None and same(wanted, given)


def verify_math_hendrycks(text: str, answer: Mapping[str, Any]) -> bool:
    """The published rule: the boxes hold the same text after `normalised`."""
    wanted, given = last_boxed(str(answer["answer"])), last_boxed(text)
    return wanted is not None and given is not None and normalised(wanted) == normalised(given)


def verify_text(text: str, answer: Mapping[str, Any]) -> bool:
    """The same words as `answer["answer"]`; white space aside."""
    return text.split() == str(answer["answer"]).split()


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


# A line behind four hashes answers if it is a number or says that it is the answer: "Step 2: add" is a heading.
_MARKED = re.compile(
    r"####[ \t*:]*(?:(?:the|final|answer|total|is|equals?|:|=)[ \t*:]*)*(?P<line>[^\w\n]*(?:[A-Z]{2,3}\W?)?\d[^\n]*)",
    re.IGNORECASE,
)
_REASON = re.compile(r"(.*?\d.*?)(?:[,;.]\s+(?!\W*\d)|\(|\b(?:as|because|since|so)\b)")


def verify_gsm8k(text: str, answer: Mapping[str, Any]) -> bool:
    """`answer["answer"]`: the number as text. The reply's is in the last answer tags, else behind ####, else last.

    A right answer that is no number (12:30) must be given as it is written.
    """
    wanted, given = final(str(answer["answer"])), final(text)
    if _letters(wanted) and _letters(wanted) == _letters(given):
        return True
    value = number(wanted)
    return value is not None and value == number(given)


def verify_gsm8k_exact(text: str, answer: Mapping[str, Any]) -> bool:
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


_LONGEST_EXPRESSION = 200


def verify_sudoku(text: str, answer: Mapping[str, Any]) -> bool:
    """Whether all 16 cells are given, the givens kept, and rows, columns and boxes hold 1 to 4.

    `answer["puzzle"]`: 16 digits, 0 for an empty cell. White space in the reply is ignored; nothing else is.
    """
    grid = re.sub(r"\s", "", final_answer(text))
    if re.fullmatch("[1-4]{16}", grid) is None:
        return False
    keeps = all(given in ("0", digit) for given, digit in zip(answer["puzzle"], grid, strict=True))
    return keeps and is_solved(grid)


def verify_seats(text: str, answer: Mapping[str, Any]) -> bool:
    """Whether the same people sit in a new order in which nobody has kept a seat.

    `answer`: `order` (one digit per person); the reply is the new order, spaces aside.
    """
    before, after = answer["order"], re.sub(r"\s", "", final_answer(text))
    return sorted(after) == sorted(before) and all(a != b for a, b in zip(before, after, strict=True))


def verify_countdown(text: str, answer: Mapping[str, Any]) -> bool:
    """Whether the expression uses every number exactly once and its exact value is the target.

    `answer`: `numbers` (list of int) and `target` (int). An equals sign and what follows it are not accepted.
    """
    expression = final_answer(text)
    if sorted(map(int, re.findall(r"[0-9]+", expression[:_LONGEST_EXPRESSION]))) != sorted(answer["numbers"]):
        return False
    return value(expression) == answer["target"]


def value(expression: str) -> Fraction | None:
    """The exact value of whole numbers joined by + - * / and brackets; None for anything else, powers included."""
    if len(expression) > _LONGEST_EXPRESSION or re.fullmatch(r"[0-9+\-*/() ]+", expression) is None:
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


ReferenceAnswer = Mapping[str, Any]


_VERIFIERS: dict[str, Callable[[str, ReferenceAnswer], bool]] = {
    "sudoku": verify_sudoku,
    "countdown": verify_countdown,
    "seats": verify_seats,
    "gsm8k": verify_gsm8k,
    "gsm8k_exact": verify_gsm8k_exact,
    "math": verify_math,
    "math_hendrycks": verify_math_hendrycks,
    "code": code.verify,
    "text": verify_text,
}


# What a verifier reads of a reference answer: a field, which values it may have, and in words.
_ANSWER = ("answer", lambda x: isinstance(x, str | int | float), "a text or a number")
_READS: dict[str, list[tuple[str, Callable[[Any], bool], str]]] = {
    "sudoku": [("puzzle", lambda x: isinstance(x, str) and bool(re.fullmatch("[0-4]{16}", x)), "16 digits of 0 to 4")],
    "countdown": [
        ("numbers", lambda x: isinstance(x, list) and all(isinstance(n, int) for n in x), "a list of whole numbers"),
        ("target", lambda x: isinstance(x, int | float), "a number"),
    ],
    "seats": [("order", lambda x: isinstance(x, str), "a text, a letter or digit for each person")],
    "code": [("tests", lambda x: isinstance(x, str), "Python source")],
}


def unfit(task: str, answer: ReferenceAnswer) -> str | None:
    """What the verifier of a task would stop at in a reference answer, in words; None where it can judge by it."""
    for field, allowed, words in _READS.get(task, [_ANSWER]):
        if field not in answer or not allowed(answer[field]):
            found = f"is {answer[field]!r}" if field in answer else "is not there"
            return f"the verifier of {task!r} needs {field!r}, {words}, which {found}"
    return None


def verifiable(task: str) -> bool:
    """Whether a task has a verifier; one without is judged by a reward of one's own."""
    return task in _VERIFIERS


def verify(task: str, text: str, answer: ReferenceAnswer) -> bool:
    """Whether `text`, what a model replied, is a right answer; `answer` holds what the task's verifier needs.

    Malformed text is wrong, never an error. Raises ValueError for an unknown task and KeyError for a field that
    `answer` lacks.
    """
    if task not in _VERIFIERS:
        raise ValueError(f"task {task!r} has no verifier{nearest(task, list(_VERIFIERS))}")
    return _VERIFIERS[task](text, answer)


def verify_each(cases: Sequence[tuple[str, str, ReferenceAnswer]]) -> list[bool | None]:
    """`verify` of each (task, text, answer), once; None where a task has no verifier.

    Programs, whose tests run in processes of their own, are judged side by side. Raises what `verify` raises, but for an
    unknown task.
    """
    found = [None if not verifiable(task) or task == "code" else verify(task, text, a) for task, text, a in cases]
    programs = [n for n, (task, _, _) in enumerate(cases) if task == "code"]
    with ThreadPoolExecutor(max_workers=_processors()) as pool:
        for n, right in zip(programs, pool.map(lambda n: verify(*cases[n]), programs), strict=True):
            found[n] = right
    return found


def _processors() -> int:
    """CPUs for this process, at least one: its share of the node's, where torchrun has started several."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, here // int(os.environ.get("LOCAL_WORLD_SIZE") or "1"))
