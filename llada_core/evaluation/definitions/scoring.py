"""What the YAML definitions of tasks call: prompts, answers, scores."""

import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset
from math_verify import parse, verify

from llada_core.evaluation.definitions.opencompass import same_answer
from llada_core.verifiers.code import Case, passes, whole


def lettered_endings(documents: Dataset) -> Dataset:
    """HellaSwag's questions with `context` and the endings as `A` to `D`, cleaned as lm-eval's likelihood task does.

    `labelled` is the context behind the activity's label, as dllm asks; OpenCompass, whose prompt this is, leaves it out.
    """

    def add(document: Mapping[str, Any]) -> dict[str, str]:
        context = document["ctx_a"] + " " + document["ctx_b"].capitalize()
        endings = dict(zip("ABCD", map(_clean, document["endings"]), strict=True))
        labelled = _clean(f"{document['activity_label']}: {context}")
        return {"context": _clean(context), "labelled": labelled, **endings}

    return documents.map(add)


def next_line(documents: Dataset) -> Dataset:
    """Couplets whose second line is asked for."""
    return documents.map(lambda document: {"target": document["second"]})


def previous_line(documents: Dataset) -> Dataset:
    """Couplets whose first line is asked for."""
    return documents.map(lambda document: {"target": document["first"]})


def contains_target(document: Mapping[str, Any], replies: list[str]) -> dict[str, float]:
    """Right if the reference line stands anywhere in the reply (LLaDA's reversal test)."""
    return {"contains": float(document["target"] in replies[0])}


def _clean(text: str) -> str:
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


# `exact_match`: what follows "The final answer is" equals the reference, as normalised text or as an expression.
# `math_verify`: math-verify finds an equivalent answer in the reply. `boxed`: OpenCompass's rule. Sources: Lewkowycz et al. 2022
# (arXiv:2206.14858), appendix D, for the normalisation; lm-eval's minerva_math 3.1 for prompts and the two scores.

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
    """The three scores of one reply."""
    found = _FINAL.search(replies[0] + "I hope it is correct.")
    exact = found is not None and _equal(normalised(found.group(1).strip()), document["answer"])
    verified, boxed = _verified(replies[0], document["solution"]), same_answer(replies[0], document["solution"])
    return {"exact_match": float(exact), "math_verify": float(verified), "boxed": float(boxed)}


def boxed_number(document: Mapping[str, Any], replies: list[str]) -> dict[str, float]:
    """OpenCompass's rule for a question whose answer stands by itself, as AIME's and CMATH's do."""
    answer = next(str(value) for key, value in document.items() if key.lower() in ("answer", "golden"))
    return {"boxed": float(same_answer(replies[0], f"\\boxed{{{answer}}}"))}


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


# Programs run only in `llada_core.verifiers.sandbox`, and only when the evaluation was started with the opt-in (lm-eval's
# `unsafe_code`).

Document = Mapping[str, Any]
_FENCE = re.compile(r"```[a-zA-Z0-9_+-]*[ \t]*\n?(.*?)(?:```|\Z)", re.DOTALL)


def after_prompt(replies: list[list[str]], documents: list[Document]) -> list[list[str]]:
    """HumanEval: the reply continues the prompt."""
    return [[d["prompt"] + text for text in each] for each, d in zip(replies, documents, strict=True)]


def between(replies: list[list[str]], documents: list[Document]) -> list[list[str]]:
    """Infilling: the reply stands between prompt and suffix."""
    return [[d["prompt"] + text + d["suffix"] for text in each] for each, d in zip(replies, documents, strict=True)]


def first_block(replies: list[list[str]], documents: list[Document]) -> list[list[str]]:
    """The first fenced block of a reply (open at its end or not), else the whole reply."""
    return [[_fenced(text).lstrip() for text in each] for each in replies]


def marked_code(replies: list[list[str]], documents: list[Document]) -> list[list[str]]:
    """The program between [BEGIN] and [DONE], with or without quotes or a fence around it."""
    return [[_marked(text) for text in each] for each in replies]


def humaneval_results(document: Document, replies: list[list[str]]) -> dict[str, float]:
    """Share of the candidate programs that pass the problem's tests."""
    test = f"{document['test']}\ncheck({document['entry_point']})"
    return {"pass@1": _share(replies[0], whole(test, document["entry_point"]))}


def mbpp_results(document: Document, replies: list[str] | list[list[str]]) -> dict[str, float]:
    """Whether the program passes the three tests that its prompt shows, after what they need (two problems' trees)."""
    candidates = [replies[0]] if isinstance(replies[0], str) else replies[0]
    tests = [document.get("test_setup_code") or "", *document["test_list"][:3]]
    return {"pass_at_1": _share(candidates, whole("\n".join(tests)))}


def mbpp_shots(documents: Dataset) -> list[dict[str, Any]]:
    """Tasks 2, 3 and 4, MBPP's customary examples."""
    return [{**d, "is_fewshot": True} for d in documents if d["task_id"] in (2, 3, 4)]


def single_lines(documents: Dataset) -> Dataset:
    """Infilling problems as published; HumanEval's own files are turned into them, one per line of each solution."""
    if "suffix" in documents.column_names:
        return documents
    return Dataset.from_list([line for document in documents for line in _lines(document)])


def _lines(document: Document) -> Iterator[dict[str, str]]:
    lines = document["canonical_solution"].splitlines(keepends=True)
    for i, line in enumerate(lines):
        if line.strip():
            parts = {
                "prompt": document["prompt"] + "".join(lines[:i]),
                "canonical_solution": line.rstrip("\n"),
                "suffix": "\n" * line.endswith("\n") + "".join(lines[i + 1 :]),
            }
            yield {**parts, "test": document["test"], "entry_point": document["entry_point"]}


def _fenced(text: str) -> str:
    found = _FENCE.search(text)
    return found.group(1) if found else text


def _marked(text: str) -> str:
    text = _fenced(text.split("[BEGIN]", 1)[-1].split("[DONE]", 1)[0]).strip()
    return text.removeprefix("'").removesuffix("'").strip()


def _share(programs: list[str], tests: Case) -> float:
    return sum(passes(program, [tests])[0] for program in programs) / len(programs)
