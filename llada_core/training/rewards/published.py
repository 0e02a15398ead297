"""The rewards of d1 and dllm, task by task: tag formats, partial credit and correctness, summed with weight 1 if no other is given.

Equal to theirs on their own functions' outputs, except where those are mistaken:
- a reply that ends in `</answer>` without a newline: theirs subtracts its whole length, ours nothing;
- a number with commas is the number without;
- a power is no countdown operation, and is never evaluated;
- a sudoku of several solutions: ours takes the one that the reply comes closest to, and full marks need the givens;
- code runs in the sandbox instead of being searched for forbidden words.
What follows the reply's end token is never seen: the caller cuts it (theirs scores it).
"""

import re
from collections.abc import Mapping
from typing import Any

from llada_core.data.puzzles import solutions
from llada_core.settings import ConfigError
from llada_core.verifiers import answers, code
from llada_core.verifiers.notation import tagged

ReferenceAnswer = Mapping[str, Any]
_STRICT = re.compile(r"^<reasoning>\n.*?\n</reasoning>\n<answer>\n.*?\n</answer>\n$", re.DOTALL)
_SOFT = re.compile(r"<reasoning>.*?</reasoning>\s*<answer>.*?</answer>", re.DOTALL)


PARTS = (
    "correctness", "xmlcount", "soft_format", "strict_format", "int", "boxed_and_tags", "countdown", "sudoku", "tests",
)  # fmt: skip
"""The names of all rewards of all tasks."""


def reward(task: str, text: str, answer: ReferenceAnswer, weights: Mapping[str, float] | None = None) -> float:
    """The weighted sum of a task's rewards (weight 1 where none is given); raises `ConfigError` for a task without any."""
    return sum((weights or {}).get(name, 1.0) * value for name, value in parts(task, text, answer).items())


def parts(task: str, text: str, answer: ReferenceAnswer) -> dict[str, float]:
    """Each reward of a task by name; raises `ConfigError` for a task without any."""
    match task:
        case "gsm8k":
            return gsm8k(text, answer)
        case "math":
            return {
                "correctness": 2.0 * answers.verify_math_hendrycks(_boxed_or_whole(text), answer),
                "boxed_and_tags": boxed_and_tags(text),
            }
        case "countdown":
            return {"countdown": countdown_score(text, answer)}
        case "sudoku":
            return {"sudoku": sudoku_score(text, answer)}
        case "code":
            return {"tests": code_score(text, answer), "xmlcount": xmlcount(text)}
    raise ConfigError(f"task {task!r} has no published reward; use grpo.reward=correct or a function of your own")


def gsm8k(text: str, answer: ReferenceAnswer) -> dict[str, float]:
    """Five rewards, at most 4.0 together."""
    reply = answers.without_commas(text.split("<answer>")[-1].split("</answer>")[0].strip())
    return {
        "xmlcount": xmlcount(text),
        "soft_format": 0.5 * bool(_SOFT.match(text)),
        "strict_format": 0.5 * bool(_STRICT.match(text)),
        "int": 0.5 * reply.isdigit(),
        "correctness": 2.0 * answers.verify_gsm8k_exact(text, answer),
    }


def xmlcount(text: str) -> float:
    """0.125 for each of four tag forms that occurs once, less 0.002 for each character behind the end."""
    score = 0.125 * (text.count("<reasoning>\n") == 1) + 0.125 * (text.count("\n</reasoning>\n") == 1)
    behind = 0.001 * len(text.split("\n</answer>")[-1].removeprefix("\n")) if "\n</answer>" in text else 0.0
    if text.count("\n<answer>\n") == 1:
        score += 0.125 - behind
    if text.count("\n</answer>") == 1:
        score += 0.125 - behind
    return score


def countdown_score(text: str, answer: ReferenceAnswer) -> float:
    """1.0 if right, 0.1 for a tagged answer that is not, 0 without tags."""
    reply = tagged(text)
    if reply is None:
        return 0.0
    return 1.0 if answers.verify_countdown(text, answer) else 0.1


def sudoku_score(text: str, answer: ReferenceAnswer) -> float:
    """The share of empty cells that are right, of the first 16 digits in the last answer tags."""
    reply = tagged(text)
    digits = "".join(filter(str.isdigit, reply or ""))[:16]
    empty = [i for i, given in enumerate(answer["puzzle"]) if given == "0"]
    if not digits or not empty:
        return 0.0
    grid = digits.ljust(16, "0")
    if answers.verify_sudoku(grid, answer):
        return 1.0
    goals = solutions(answer["puzzle"])
    share = max((sum(grid[i] == goal[i] for i in empty) / len(empty) for goal in goals), default=0.0)
    return min(share, 1.0 - 1.0 / len(empty))


def boxed_and_tags(text: str) -> float:
    """0.5 for answer tags, and 0.5 for a box in them (anywhere without tags), else 0.25."""
    reply = tagged(text)
    boxed = "\\boxed" in (text if reply is None else reply)
    return 0.5 * (reply is not None) + (0.5 if boxed else 0.25)


def code_score(text: str, answer: ReferenceAnswer) -> float:
    """The share of unit tests that pass, and 0.5 for a program inside the answer tags."""
    program = code.fenced(text)
    if program is None:
        return 0.0
    inside = code.fenced(tagged(text) or "") == program
    return code.passed_share(program, answer["tests"]) + 0.5 * inside


def _boxed_or_whole(text: str) -> str:
    """Theirs compares the whole reply when nothing is boxed; an unclosed box is none."""
    return text if answers.last_boxed(text) is not None else f"\\boxed{{{text}}}"
