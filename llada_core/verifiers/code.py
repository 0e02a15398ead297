"""Programs: right if every unit test passes, each run by itself in the sandbox.

The reply's first Python fence is the program; if it defines its function under another name than the tests call, it is
renamed. Knows tests as KodCode and d1 write them: functions without arguments, or lines that begin with `assert`.
"""

import re
import secrets
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

from llada_core.sandbox import Limits, run_python

SIDE_BY_SIDE = 2
"""Tests of one program that run at a time."""

_FENCE = re.compile(r"```python\n(.*?)```", re.DOTALL)


def verify(text: str, answer: Mapping[str, Any]) -> bool:
    """`answer["tests"]`: Python source. Raises `SandboxError` where no program can be shut in."""
    program = fenced(text)
    return program is not None and passed_share(program, answer["tests"]) == 1.0


def fenced(text: str) -> str | None:
    """The program in the first Python fence of a reply."""
    found = _FENCE.search(text)
    return found.group(1) if found else None


@lru_cache(maxsize=4096)  # a reward and the verifier ask about the same program, one after the other
def passed_share(program: str, tests: str, limits: Limits | None = None) -> float:
    """The share of tests that pass, 0.0 when the tests name no function or the program defines none.

    What was found is remembered: the same program with the same tests runs once.
    """
    wanted = re.search(r"from solution import (\w+)", tests) or re.search(r"assert\s+(\w+)\s*\(", tests)
    defined = re.search(r"^def (\w+)\(", program, re.MULTILINE)
    if wanted is None or defined is None:
        return 0.0
    if f"def {wanted[1]}(" not in program:
        program = re.sub(rf"\b{defined[1]}\b", wanted[1], program)
    setup, cases = _cases(re.sub(r"from solution import [^\n]*", "", tests))
    with ThreadPoolExecutor(max_workers=SIDE_BY_SIDE) as pool:
        passed = list(pool.map(lambda case: _passes(f"{program}\n\n{setup}", case, limits or Limits()), cases))
    return sum(passed) / len(passed) if passed else 0.0


def _cases(tests: str) -> tuple[str, list[str]]:
    """What all tests share, and a piece of code for each test."""
    functions = re.findall(r"^def (test\w*)\(\):", tests, re.MULTILINE)
    if len(functions) > 1:
        return tests, [f"{name}()" for name in functions]
    asserts = [line.strip() for line in tests.splitlines() if line.strip().startswith("assert")]
    imports = [line for line in tests.splitlines() if re.match(r"(import|from) ", line)]
    return "\n".join(imports), asserts


def _passes(program: str, case: str, limits: Limits) -> bool:
    # A program that ends by itself before the test is over must not count, so success is a word it cannot know.
    word = secrets.token_hex(16)
    ending = f"import sys as _sys\n_word = _sys.stdin.readline()\n{case}\n_sys.stdout.write('\\n' + _word)\n"
    outcome = run_python(f"{program}\n\n{ending}", stdin=word, limits=limits)
    return outcome.status == "ok" and outcome.stdout.endswith(f"\n{word}")
