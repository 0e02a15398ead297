"""Programs in replies, unit tests taken apart into cases, and which of them pass."""

import ast
import builtins
import json
import re
import secrets
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from llada_core.verifiers.notation import tagged
from llada_core.verifiers.sandbox import Limits, pytest_folder, run_python

# What a test may be: lines and blocks with asserts, functions called test..., classes, whatever pytest alone can run.

_SOLUTION = "solution"
_BUILTINS = frozenset(dir(builtins))
_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True)
class Case:
    """A test that passes or fails as a whole: its source, or where pytest must run it, the file and `node` in it.

    wanted: the name of the program that it calls; imports: the modules that it reads, the program aside.
    """

    source: str
    node: str = ""
    wanted: str = ""
    imports: tuple[str, ...] = ()


def whole(tests: str, wanted: str = "") -> Case:
    """All tests as one case, as benchmarks count them."""
    return Case(tests, wanted=wanted or _wanted(ast.parse(tests)), imports=_imports(ast.parse(tests)))


@lru_cache(maxsize=1024)
def cases(tests: str) -> tuple[Case, ...]:
    """One case per test; none when the tests are no Python, assert nothing or name nothing of the program.

    A test is a statement that asserts, after those before it that do not; or a function called test..., or a class of
    those. A lone function of nothing but asserts is taken as its asserts, as d1's reward counts them.
    """
    try:
        tree = ast.parse(tests)
    except (SyntaxError, ValueError, RecursionError):
        return ()
    wanted, imports = _wanted(tree), _imports(tree)
    if not wanted:
        return ()
    return tuple(Case(source, node, wanted, _with_pytest(imports, node)) for source, node in _parts(tree, tests))


def _parts(tree: ast.Module, tests: str) -> Iterator[tuple[str, str]]:
    """Source and node of each test."""
    named = [s for s in tree.body if isinstance(s, _Definition) and _is_test(s)]
    helpers = {s.name for s in tree.body if isinstance(s, ast.FunctionDef)}
    body = [s for s in tree.body if not (_calls(s) in helpers and _calls(s).startswith("test"))]
    around = [s for s in body if not _checks(s, helpers)]
    if len(named) == 1 and isinstance(named[0], ast.FunctionDef) and _only_asserts(named[0]):
        before = [s for s in around if s is not named[0]]
        yield from ((_source([*before, s]), "") for s in named[0].body if isinstance(s, ast.Assert))
        named = []
    for test in named:
        if isinstance(test, ast.FunctionDef) and not _needs_pytest(test):
            yield _source(around) + f"\n{test.name}()\n", ""
        else:
            yield tests, test.name
    before = []
    for statement in body:
        if _checks(statement, helpers):
            yield _source([*before, statement]), ""
        else:
            before.append(statement)


def _source(statements: list[ast.stmt]) -> str:
    return ast.unparse(ast.Module(statements, []))


def _is_test(statement: _Definition) -> bool:
    if isinstance(statement, ast.ClassDef):
        bases = {ast.unparse(base).split(".")[-1] for base in statement.bases}
        return statement.name.startswith("Test") or bool(bases & {"TestCase", "IsolatedAsyncioTestCase"})
    return statement.name.startswith("test")


def _needs_pytest(test: ast.FunctionDef) -> bool:
    return bool(test.decorator_list or ast.unparse(test.args))


def _with_pytest(imports: tuple[str, ...], node: str) -> tuple[str, ...]:
    return (*imports, "pytest") if node and "pytest" not in imports else imports


def _only_asserts(test: ast.FunctionDef) -> bool:
    body = test.body[1:] if ast.get_docstring(test) is not None else test.body
    return not _needs_pytest(test) and all(isinstance(s, ast.Assert) for s in body)


def _checks(statement: ast.AST, helpers: set[str]) -> bool:
    """Whether a statement tests something when it runs: definitions only do when they are called."""
    if isinstance(statement, _Definition) or _is_main_guard(statement):
        return False
    if isinstance(statement, ast.Assert | ast.Raise) or _calls(statement) in helpers:
        return True
    if isinstance(statement, ast.With) and any("raises" in ast.unparse(item) for item in statement.items):
        return True
    inner = (n for n in ast.iter_child_nodes(statement) if isinstance(n, ast.stmt | ast.ExceptHandler | ast.match_case))
    return any(_checks(n, helpers) for n in inner)


def _calls(statement: ast.AST) -> str:
    """The function that a statement is a call of."""
    call = statement.value if isinstance(statement, ast.Expr) else None
    return call.func.id if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) else ""


def _is_main_guard(statement: ast.AST) -> bool:
    return isinstance(statement, ast.If) and "__name__" in ast.unparse(statement.test)


def _imports(tree: ast.Module) -> tuple[str, ...]:
    names: dict[str, None] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= dict.fromkeys(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names[node.module] = None
    return tuple(name for name in names if name != _SOLUTION)


def _wanted(tree: ast.Module) -> str:
    """What is tested: imported from the program, or its attribute, or the first name called that nothing defines."""
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == _SOLUTION and node.names[0].name != "*":
            return node.names[0].name
        if isinstance(node, ast.Import):
            modules |= {alias.asname or alias.name for alias in node.names if alias.name == _SOLUTION}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            return node.attr
    free = _free(tree)
    return next((name for name in free if name not in _BUILTINS), next(iter(free), ""))


def _free(tree: ast.Module) -> list[str]:
    """Names that the tests read and nothing in them defines: the called ones first, from the outside in."""
    defined: set[str] = set()
    called, read = [], []
    for node in ast.walk(tree):
        if isinstance(node, _Definition):
            defined.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            defined |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.arg):
            defined.add(node.arg)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            defined.add(node.name)
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            defined.add(node.id)
        elif isinstance(node, ast.Name):
            read.append(node.id)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            called.append(node.func.id)
    return [name for name in dict.fromkeys(called + [n for n in read if n not in _BUILTINS]) if name not in defined]


# A test counts as passed only when it ran to its end, which is told by a word that the program does not know; how,
# and what cannot be told within one process, stands in judge_child.py.

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


# The reply's first Python fence is the program, else all of it if it is one; a program without the function that the
# tests call lends its first one for it.

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
def passed_share(program: str, tests: str, limits: Limits = LIMITS) -> float:
    """The share of tests that pass, 0.0 when the tests name nothing of the program or it does not define it.

    What was found is remembered: the same program with the same tests runs once.
    """
    passed = passes(program, cases(tests), limits, rename=True)
    return sum(passed) / len(passed) if passed else 0.0
