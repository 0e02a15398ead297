"""Is an answer right? One function for every task; used by rewards, by validation and by benchmarks alike.

Knows nothing about models, prompts or scores between right and wrong (those are rewards).
"""

from collections.abc import Callable, Mapping
from typing import Any

from llada_core.config.base import nearest
from llada_core.verifiers import code, gsm8k, math, puzzles

Answer = Mapping[str, Any]
_VERIFIERS: dict[str, Callable[[str, Answer], bool]] = {
    "sudoku": puzzles.sudoku,
    "countdown": puzzles.countdown,
    "seats": puzzles.seats,
    "gsm8k": gsm8k.verify,
    "math": math.verify,
    "code": code.verify,
}


def verify(task: str, text: str, answer: Answer) -> bool:
    """Whether `text`, what a model replied, is a right answer; `answer` holds what the task's verifier needs.

    Malformed text is wrong, never an error. Raises ValueError for an unknown task and KeyError for a field that
    `answer` lacks.
    """
    if task not in _VERIFIERS:
        raise ValueError(f"task {task!r} has no verifier{nearest(task, list(_VERIFIERS))}")
    return _VERIFIERS[task](text, answer)
