"""How OpenCompass reads answers, for recipes whose figures it measured: ML-GSAI/LLaDA@b7e6c35, opencompass/.

Source of the rules: opencompass/utils/text_postprocessors.py and opencompass/datasets/{gsm8k,math,mbpp,gpqa}.py there.
"""

import base64
import random
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset
from lm_eval.api.filter import Filter
from lm_eval.api.registry import register_filter

Document = Mapping[str, Any]

# -- one option of several ------------------------------------------------------------------------------------------

# In this order; one that names no option gives way to the next. Patterns that need a Chinese sentence are left out, as
# the questions that it asked are English. The odd ones are theirs: after "1" and any character, whatever is named first by letter.
_LEADS = (
    *(r"The answer is:?\s+\(?(%s)\)?", r"The answer is:?\s+\(?\*?\*?(%s)\*?\*?\)?"),
    r"The answer is option:?\s+\(?(%s)\)?",
    *(r"The correct answer is:?\s+\(?(%s)\)?", r"The correct answer is option:?\s+\(?(%s)\)?"),
    *(r"The correct answer is:?.*?boxed{(%s)}", r"The correct option is:?.*?boxed{(%s)}"),
    r"The correct answer option is:?.*?boxed{(%s)}",
    r"The answer to the question is:?\s+\(?(%s)\)?",
)
_OPTION = (
    *(r"[\s，：:,](%s)[。，,\.]?$", r"(?i:ANSWER\s*:\s*(%s))"),
    *(lead.replace("The", "[Tt]he", 1) for lead in _LEADS),
    *(r"\A(%s)[\s。，,：:\.$]", r"1.\s?(.*?)$", r"1.\s?(%s)[.。$]?$", r"(%s):", r"(%s)"),
)

# Ours for all of its patterns that say "the answer is" in Chinese, asked before the others.
_CHINESE = r"答案(?:选项)?(?:应该?)?[是为选]?\s*[：:]?\s*[(（*]*([%s])"


def first_option(reply: str, options: str) -> str:
    """The letter of `options` that a reply chooses, by the first pattern that finds one; empty without any."""
    text = reply.strip()
    for pattern in _OPTION:
        found = re.search(pattern.replace("%s", f"[{options}]"), text, re.DOTALL)
        said = (found.group(1) or found.group(0)) if found else ""
        if letter := next((option for option in options if option in said), ""):
            return letter
    return ""


def last_number(reply: str) -> str:
    """The last number before the next question, an integer without its decimals; NULL without any."""
    numbers = re.findall(r"-?\d+\.\d+|-?\d+", reply.split("Question:")[0])
    if not numbers:
        return "NULL"
    value = float(numbers[-1])
    return str(round(value)) if abs(value - round(value)) < 1e-6 else str(numbers[-1])


class _Each(Filter):
    """A filter that reads every reply by itself."""

    def read(self, reply: str) -> str:
        raise NotImplementedError

    def apply(self, resps: Sequence[Sequence[str]], docs: Sequence[Document]) -> list[list[str]]:
        return [[self.read(reply) for reply in replies] for replies in resps]


@register_filter("opencompass_option")
class FirstOption(_Each):
    """`first_option` under a name that a recipe can give."""

    def __init__(self, options: str = "ABCD", chinese: bool = False) -> None:
        self.options, self.chinese = options, chinese

    def read(self, reply: str) -> str:
        said = re.search(_CHINESE % self.options, reply) if self.chinese else None
        return said.group(1) if said else first_option(reply, self.options)


@register_filter("opencompass_number")
class LastNumber(_Each):
    """`last_number` under a name that a recipe can give."""

    def read(self, reply: str) -> str:
        return last_number(reply)


# -- mathematics ----------------------------------------------------------------------------------------------------

_UNITS = (
    *("square", "ways", "integers", "dollars", "mph", "inches", "ft", "hours", "km", "units", "\\ldots", "sue"),
    *("points", "feet", "minutes", "digits", "cents", "degrees", "cm", "gm", "pounds", "meters", "meals", "edges"),
    *("students", "childrentickets", "multiples", "\\text{s}", "\\text{.}", "\\text{\ns}", "\\text{}^2", "\\text{}^3"),
    *("\\text{\n}", "\\text{}", "\\mathrm{th}", "^\\circ", "^{\\circ}", "\\;", ",\\!", "{,}", '"', "\\dots"),
    *("\n", "\r", "\f"),
)
_SHORT = (
    *(("an ", ""), ("a ", ""), (".$", "$"), ("\\$", ""), ("\\ ", ""), (" ", ""), ("mbox", "text")),
    *((",\\text{and}", ","), ("\\text{and}", ","), ("\\text{m}", "\\text{}"), ("\\le", "<")),
    *((unit, "") for unit in _UNITS),
)
_UNWRAPPED = (
    r"\\text\{\((.*?)\)\}",
    r"\\text\{(.*?)\}",
    r"\\textbf\{(.*?)\}",
    r"\\overline\{(.*?)\}",
    r"\\boxed\{(.*)\}",
)
_LAST = (r"finalansweris(.*)", r"answer?is:?(.*)", r"oxed\{(.*?)\}", r"\$(.*?)\$")
_PLAIN_FIRST = (
    *(("\\!", ""), ("\\ ", ""), ("\\\\", "\\"), ("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac")),
    *(("\\left", ""), ("\\right", "")),
)
_PLAIN_THEN = (
    *(("^{\\circ}", ""), ("^\\circ", "")),
    *(("\\$", ""), ("$", ""), ("\\text", ""), ("x\\in", ""), ("\\%", ""), ("%", ""), (" .", " 0."), ("{.", "{0.")),
    *(("\\cdot", ""), ("infinity", "\\infty")),
)


def same_answer(reply: str, solution: str) -> bool:
    """Whether what a reply puts into its last box (or says after "answer is") is what the solution's box holds."""
    said, reference = _said(reply), boxed(solution)
    if reference is None:
        return False
    pairs = [(said, reference), (final(said), final(reference))]
    try:
        one, other = plain(said), plain(reference)
    except ValueError:  # "x/2": theirs compares such answers without this step
        return any(first == second for first, second in pairs)
    pairs += [(one, other), (final(one), final(other))]
    return any(first == second for first, second in pairs)


def _said(reply: str) -> str:
    answer = boxed(reply)
    if answer is not None:
        inner = re.match(r"^\{(.*)\}$", answer)
        answer = inner.group(1) if inner else answer
    if answer:
        return answer
    sentences = reply.split(".")
    return final(next((s for s in sentences if re.search("final answer|answer is", s.lower())), sentences[0]))


def boxed(text: str) -> str | None:
    r"""What the last `\boxed{...}` holds; None where the last box has no braces or no end."""
    start, depth = text.rfind("\\boxed"), 0
    if start < 0 or not text.startswith("\\boxed{", start):
        return None
    for at in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0 and text[at] == "}":
            return text[start + len("\\boxed{") : at]
    return None


def final(answer: str) -> str:
    """An answer without units, spacing, wrapping and shorthand TeX."""
    answer = _replaced(answer, _SHORT)
    for pattern in _UNWRAPPED:
        answer = re.sub(pattern, r"\1", answer)
    for pattern in _LAST:
        answer = (re.findall(pattern, answer) or [answer])[-1]
    answer = answer.strip()
    if "rac" in answer and "\\frac" not in answer:
        answer = answer.replace("rac", "\\frac")
    answer = re.sub(r"(frac)([^{])(.)", r"frac{\2}{\3}", answer)
    answer = re.sub(r"(sqrt)([^{])", r"sqrt{\2}", answer).replace("$", "")
    bare = answer.replace(",", "")
    return bare if bare.isdigit() else answer


def plain(answer: str) -> str:
    """An answer without layout, units at its end, signs for money and percent, and "x ="; ValueError for "x/2"."""
    answer = _replaced(answer.strip().replace("\n", "").rstrip("."), _PLAIN_FIRST)
    answer = re.sub(r"\\text{.*?}$", "", answer).strip() or answer
    answer = _replaced(answer, _PLAIN_THEN)
    if "\\infty" not in answer:
        answer = answer.replace("inf", "\\infty")
    answer = re.sub(r"\\mbox{.*?}", "", answer.replace("and", "").replace("\\mathbf", ""))
    if "j" in answer and "i" not in answer:
        answer = answer.replace("j", "i")
    answer = re.sub(r"(\d+)\.0+$", r"\1", re.sub(r"(\d+)\.0+([^\d])", r"\1\2", answer))
    answer = f"0{answer}" if answer.startswith(".") else answer
    if answer.count("=") == 1 and len(answer.split("=")[0]) <= 2:
        answer = answer.split("=")[1]
    answer = _braced_fractions(re.sub(r"\\sqrt(\w+)", r"\\sqrt{\1}", answer).replace(" ", ""))
    if answer.count("/") != 1:
        return answer
    above, below = map(int, answer.split("/"))
    return f"\\frac{{{above}}}{{{below}}}" if answer == f"{above}/{below}" else answer


def _braced_fractions(text: str) -> str:
    r"""`\frac12` as `\frac{1}{2}`; the text as it is where a fraction lacks a part."""
    head, *parts = text.split("\\frac")
    if any(len(part) < 2 and not part.startswith("{") for part in parts):
        return text

    def braced(part: str) -> str:
        if part.startswith("{"):
            return part
        return f"{{{part[0]}}}" + (part[1:] if part[1] == "{" else f"{{{part[1]}}}{part[2:]}")

    return head + "".join(f"\\frac{braced(part)}" for part in parts)


def _replaced(text: str, pairs: Sequence[tuple[str, str]]) -> str:
    for before, after in pairs:
        text = text.replace(before, after)
    return text


# -- programs -------------------------------------------------------------------------------------------------------

_MARKED = (
    *(rf"{b}\s*{body}{d}" for body in (r"'(.*)'\s*", r"'(.*)\s*", r"(.*)\s*") for d, b in (
        (r"\[DONE\]", r"\[BEGIN\]"), (r"\[DONE\]", "BEGIN"), ("DONE", r"\[BEGIN\]"), ("DONE", "BEGIN"),
    )),
    *(r"```python\s*(.*)\s*```", r"```\s*(.*)\s*```", r"```python\s*(.*)\s*$", r"```\s*(.*)\s*$", r"(.*)\s*```.*"),
    *(r"\[BEGIN\]\s*'(.*)", r"\[BEGIN\](.*)", r"'(.*)'\s*\[DONE\]"),
)  # fmt: skip


def marked_program(reply: str) -> str:
    """MBPP's program: what stands between its marks, or in a fence, without the quotes around it."""
    found = next((m for pattern in _MARKED if (m := re.search(pattern, reply, re.DOTALL))), None)
    text = (found.group(1) if found else reply).split("```")[0]
    text = re.split(r"'?\s*\[?DONE\]?", text)[0].replace("\\_", "_").strip()
    return text.removeprefix("'").removesuffix("'")


def marked_programs(replies: list[list[str]], documents: list[Document]) -> list[list[str]]:
    """`marked_program` of each reply."""
    return [[marked_program(text) for text in each] for each in replies]


def after_prompt_in_fence(replies: list[list[str]], documents: list[Document]) -> list[list[str]]:
    """HumanEval: the first closed fence of a reply, else all of it, runs behind the prompt."""

    def program(reply: str) -> str:
        fences = re.findall(r"```\w*\n(.*?)```", reply, re.DOTALL)
        return str(fences[0] if fences else reply).lstrip()

    return [[d["prompt"] + program(text) for text in each] for each, d in zip(replies, documents, strict=True)]


# -- questions ------------------------------------------------------------------------------------------------------


def with_four_choices(documents: Dataset) -> Dataset:
    """ARC's questions that have four choices, with `A` to `D` and the right letter as `letter`."""
    four = documents.filter(lambda document: len(document["choices"]["text"]) == 4)

    def lettered(document: Document) -> dict[str, str]:
        place = document["choices"]["label"].index(document["answerKey"])
        return {**dict(zip("ABCD", document["choices"]["text"], strict=True)), "letter": "ABCD"[place]}

    return four.map(lettered)


def with_shuffled_choices(documents: Dataset) -> Dataset:
    """GPQA's questions, their choices in the order that one generator with seed 0 gives them, row after row."""
    return Dataset.from_list(list(_shuffled(documents)))


def _shuffled(documents: Dataset) -> Iterator[dict[str, str]]:
    generator = random.Random(0)
    for document in documents:
        names = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
        choices = [document[name] for name in names]
        right = choices[0]
        generator.shuffle(choices)
        letters = dict(zip("ABCD", choices, strict=True))
        yield {"question": document["Question"], **letters, "answer": "ABCD"[choices.index(right)]}


def gpqa_prompt(document: Document) -> str:
    """Five worked examples, the question and its choices in one message."""
    choices = "\n".join(f"{letter}. {document[letter]}" for letter in "ABCD")
    return (
        f"{_gpqa_examples()}\nQuestion:\n{document['question']}\nChoices:\n{choices}\nWhen you're ready to answer, "
        "please use the format 'The correct answer is (X)' where X is the correct letter choice from 'ABCD'."
    )


@cache
def _gpqa_examples() -> str:
    """Kept packed: the authors of GPQA ask that its questions not stand in plain text."""
    file = Path(__file__).parent / "_gpqa_examples.yaml"
    packed = yaml.safe_load(file.read_text(encoding="utf-8"))["packed"]
    return zlib.decompress(base64.b64decode(packed)).decode("utf-8")
