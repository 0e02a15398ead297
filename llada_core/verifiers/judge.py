"""Whether a program passes a test: the one judge of rewards, of validation and of benchmarks.

A test counts as passed only when it ran to its end, which is told by a word that the program does not know; how, and
what cannot be told within one process, stands in judge_child.py. Knows neither replies nor data sets.
"""

import json
import secrets
from collections.abc import Sequence
from pathlib import Path

from llada_core.sandbox import Limits, run_python
from llada_core.verifiers.borrowed import pytest_folder
from llada_core.verifiers.cases import Case

LIMITS = Limits(seconds=60.0, cpu_seconds=5.0, processes=32)  # a busy machine must not change a verdict

_CHILD = Path(__file__).with_name("judge_child.py")


def passes(program: str, cases: Sequence[Case], limits: Limits = LIMITS, *, rename: bool = False) -> list[bool]:
    """Which cases ran to their end after the program, each in a process of its own; what any prints does not matter.

    rename: a program without the name that the cases call lends it its first function. Raises `SandboxError` where no
    program can be shut in.
    """
    if not cases:
        return []
    words = [secrets.token_hex(16) for _ in cases]
    imports = sorted({name for case in cases for name in case.imports})
    task = {
        "program": program,
        "tests": [
            {"source": case.source, "node": case.node, "word": word} for case, word in zip(cases, words, strict=True)
        ],
        "imports": imports,
        "wanted": cases[0].wanted,
        "rename": rename,
    }
    outcome = run_python(
        _CHILD.read_text(encoding="utf-8"),
        stdin=json.dumps(task),
        limits=limits,
        packages=pytest_folder() if "pytest" in imports else None,
    )
    said = set(outcome.stdout.split("\n"))
    return [word in said for word in words]
