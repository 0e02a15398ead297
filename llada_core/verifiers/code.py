"""Programs: right if every unit test passes, each run by itself in the sandbox.

The reply's first Python fence is the program, else all of it if it is one; a program without the function that the tests
call lends its first one for it. Knows where programs stand in replies; what a test is stands in cases.py, what passing
is in judge.py.
"""

import re
import textwrap
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from llada_core.sandbox import Limits
from llada_core.verifiers import judge
from llada_core.verifiers.cases import cases
from llada_core.verifiers.notation import tagged

_OPENING = re.compile(r"(^[ \t]*|(?<!`))(`{3,}|~{3,})[ \t]*\{?\.?([\w+#.-]*)[^`\n]*\n", re.MULTILINE)
_PYTHON = re.compile(r"(|py|python|py3|python3|python-?3?\.\d+|pycon|ipython3?)", re.IGNORECASE)
_DEFINES = re.compile(r"^[ \t]*(async[ \t]+def|def|class)\b|^\w+[^=\n]*=[ \t]*lambda\b", re.MULTILINE)


def verify(text: str, answer: Mapping[str, Any]) -> bool:
    """`answer["tests"]`: Python source. Raises `SandboxError` where no program can be shut in."""
    program = fenced(text)
    if program is None:
        program = bare(text)
    return program is not None and passed_share(program, answer["tests"]) == 1.0


def fenced(text: str) -> str | None:
    """The program in a reply's first Python fence that defines something, else in the first; None without any.

    A fence is marked as Python in any spelling, or not at all; it may end with the reply, and what stands in the answer
    tags goes before the rest.
    """
    for part in (tagged(text), text):
        found = list(_fences(part.replace("\r\n", "\n"))) if part is not None else []
        if found:
            return next((program for program in found if _DEFINES.search(program)), found[0])
    return None


def bare(text: str) -> str | None:
    """A reply that is a program without a fence; None for one that defines nothing."""
    reply = tagged(text)
    reply = text if reply is None else reply
    return reply if _DEFINES.search(reply) else None


def _fences(text: str) -> Iterator[str]:
    place = 0
    while opening := _OPENING.search(text, place):
        indent, marks, language = opening.groups()
        # It closes as CommonMark says, which leaves those in a docstring alone, or glued to the last line.
        mark = re.escape(marks)
        closing = re.compile(rf"^[ ]{{0,{len(indent) + 3}}}{mark}|(?<=\S){mark}(?=[ \t]*(?:$|</))", re.MULTILINE)
        end = closing.search(text, opening.end())
        inside = text[opening.end() : end.start() if end else len(text)]
        if _PYTHON.fullmatch(language):
            yield textwrap.dedent(inside) if indent else inside
        place = end.end() if end else len(text)


@lru_cache(maxsize=4096)  # a reward and the verifier ask about the same program, one after the other
def passed_share(program: str, tests: str, limits: Limits = judge.LIMITS) -> float:
    """The share of tests that pass, 0.0 when the tests name nothing of the program or it does not define it.

    What was found is remembered: the same program with the same tests runs once.
    """
    passed = judge.passes(program, cases(tests), limits, rename=True)
    return sum(passed) / len(passed) if passed else 0.0
