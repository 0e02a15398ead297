"""TODO"""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from llada_core.settings import nearest
from llada_core.verifiers import code, gsm8k, math, puzzles

Answer = Mapping[str, Any]


_VERIFIERS: dict[str, Callable[[str, Answer], bool]] = {
    "sudoku": puzzles.sudoku,
    "countdown": puzzles.countdown,
    "seats": puzzles.seats,
    "gsm8k": gsm8k.verify,
    "gsm8k_exact": gsm8k.exact,
    "math": math.verify,
    "math_hendrycks": math.hendrycks,
    "code": code.verify,
}


def verifiable(task: str) -> bool:
    """Whether a task has a verifier; one without is judged by a reward of one's own."""
    return task in _VERIFIERS


def verify(task: str, text: str, answer: Answer) -> bool:
    """Whether `text`, what a model replied, is a right answer; `answer` holds what the task's verifier needs.

    Malformed text is wrong, never an error. Raises ValueError for an unknown task and KeyError for a field that
    `answer` lacks.
    """
    if task not in _VERIFIERS:
        raise ValueError(f"task {task!r} has no verifier{nearest(task, list(_VERIFIERS))}")
    return _VERIFIERS[task](text, answer)


def verify_each(cases: Sequence[tuple[str, str, Answer]]) -> list[bool | None]:
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
