"""Competition mathematics scored without antlr 4.11: Minerva's answer extraction, math-verify for equivalence.

`exact_match`: what follows "The final answer is" equals the reference, as normalised text or as an expression.
`math_verify`: math-verify finds an equivalent answer in the reply. Sources: Lewkowycz et al. 2022 (arXiv:2206.14858),
appendix D, for the normalisation; lm-eval's minerva_math 3.1 for prompts and the two scores.
"""

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset
from math_verify import parse, verify

_FINAL = re.compile(r"Final Answer: The final answer is(.*?). I hope it is correct.")
_REPLACED = (
    ("an ", ""),
    ("a ", ""),
    (".$", "$"),
    ("\\$", ""),
    ("\\ ", ""),
    (" ", ""),
    ("mbox", "text"),
    (",\\text{and}", ","),
    ("\\text{and}", ","),
    ("\\text{m}", "\\text{}"),
)
_UNITS = (
    *("square", "ways", "integers", "dollars", "mph", "inches", "ft", "hours", "km", "units", "sue", "points", "feet"),
    *("minutes", "digits", "cents", "degrees", "cm", "gm", "pounds", "meters", "meals", "edges", "students"),
    *("childrentickets", "multiples"),
)
_DROPPED = (
    *("\\ldots", "\\text{s}", "\\text{.}", "\\text{\ns}", "\\text{}^2", "\\text{}^3", "\\text{\n}", "\\text{}"),
    *("\\mathrm{th}", "^\\circ", "^{\\circ}", "\\;", ",\\!", "{,}", '"', "\\dots"),
)
_REWRITTEN = (
    (re.compile(r"(.*?)(\$)(.*?)(\$)(.*)"), r"$\3$"),
    (re.compile(r"\\text\{(.*?)\}"), r"\1"),
    (re.compile(r"\\textbf\{(.*?)\}"), r"\1"),
    (re.compile(r"\\overline\{(.*?)\}"), r"\1"),
    (re.compile(r"\\boxed\{(.*)\}"), r"\1"),
    (re.compile(r"(frac)([^{])(.)"), r"frac{\2}{\3}"),
    (re.compile(r"(sqrt)(\[[^\]]*\])(\w)"), r"\1\2{\3}"),
    (re.compile(r"(sqrt)(?!\[)([^{])"), r"sqrt{\2}"),
)


def with_answers(documents: Dataset) -> Dataset:
    """Problems with `answer`, the normalised content of the last box of the solution."""
    return documents.map(lambda document: {"answer": normalised(last_boxed(document["solution"]))})


@cache
def shots() -> list[dict[str, str]]:
    """Minerva's four worked examples."""
    return yaml.safe_load((Path(__file__).parent / "_minerva_shots.yaml").read_text(encoding="utf-8"))["shots"]


def results(document: Mapping[str, Any], replies: list[str]) -> dict[str, float]:
    """Both scores of one reply."""
    found = _FINAL.search(replies[0] + "I hope it is correct.")
    exact = found is not None and _equal(normalised(found.group(1).strip()), document["answer"])
    return {"exact_match": float(exact), "math_verify": float(_verified(replies[0], document["solution"]))}


def _verified(reply: str, solution: str) -> bool:
    """math-verify's verdict; the same text in the last box also counts, for math-verify cannot read every reference."""
    boxed = normalised(last_boxed(reply))
    same = bool(boxed) and boxed == normalised(last_boxed(solution))
    return same or bool(verify(parse(solution), parse(reply)))


def last_boxed(text: str) -> str:
    r"""What the last `\boxed{...}`, `\fbox{...}` or `\boxed x` of a text holds; empty without one."""
    if "\\boxed " in text:
        return text.rsplit("\\boxed ", 1)[1].split("$")[0]
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    depth = 0
    for i in range(start, len(text)) if start >= 0 else ():
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0 and text[i] == "}":
            return text[text.index("{", start) + 1 : i]
    return ""


def normalised(answer: str) -> str:
    """A final answer without units, spacing and shorthand TeX, as Minerva compares them."""
    answer = answer.split("=")[-1]
    for unit in _UNITS:
        answer = re.sub(rf"(?<!\\)\b{unit}\b", "", answer)
    for before, after in _REPLACED:
        answer = answer.replace(before, after)
    for unit in _UNITS:  # glued to their number by now; TeX commands such as \left keep their letters
        pieces = re.split(r"(\\[a-zA-Z]+)", answer)
        answer = "".join(p if p.startswith("\\") else p.replace(unit, "") for p in pieces)
    for text in _DROPPED:
        answer = answer.replace(text, "")
    for pattern, replacement in _REWRITTEN:
        answer = pattern.sub(replacement, answer)
    answer = answer.replace("$", "")
    return answer.replace(",", "") if re.fullmatch(r"-?\d{1,3}(,\d{3})+", answer) else answer


def _equal(first: str, second: str) -> bool:
    return bool(first) and (first == second or bool(verify(parse(f"${second}$"), parse(f"${first}$"))))
