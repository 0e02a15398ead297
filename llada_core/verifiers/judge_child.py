"""Runs a program and then each of its tests, and says which ran to their end. Run in the sandbox, never imported.

The task comes as JSON on standard input, which is empty from then on: `program`; `tests`, each with its `source`, `node`
(its name for pytest, where pytest must run it) and `word`, said on success; `imports` of the tests; `wanted`, the name
that they call, and `rename`, whether the program's first function takes that name if it has none of it.

Program and tests share a process (each test a copy of it, so that none sees another), so the program must not be able
to say a word itself, nor to make a test easier:
- the words lie in a frame of the main thread; program and tests run in other threads, begun by C, from where no frame
  leads there;
- what looks into other threads' frames, traces them or reaches into memory is refused (`guard`);
- this file and the tests see builtins that were copied before the program began, and what the tests import must be the
  same functions before a test and after it (`pristine`);
- what is printed goes nowhere, and a process ends at once, so that nothing registered for its end runs.
What cannot be told here is an object that lies about being equal. Everything is the standard library's.
"""

import builtins
import functools
import json
import os
import site
import sys
import types
from _thread import LockType, allocate_lock, get_ident, stack_size, start_new_thread
from collections.abc import Callable, Iterator
from typing import Any

BUILTINS = dict(vars(builtins))
globals()["__builtins__"] = BUILTINS  # the functions below keep these, whatever the program does to the others

REFUSED = {
    *("sys.settrace", "sys.setprofile", "sys.monitoring.register_callback"),
    *("sys._current_frames", "sys._current_exceptions", "gc.get_objects", "gc.get_referrers", "gc.get_referents"),
}
FRAMES = {"tb_frame", "gi_frame", "cr_frame", "ag_frame"}
FREE = {"print", "input", "open", "exit", "quit", "breakpoint"}  # a program may replace these for itself
Call = Callable[[], Any]
ASKING: set[int] = set()  # threads in the midst of `guard`
HEAP_TYPE = 1 << 9  # classes of Python code; the others cannot be changed


def main() -> None:
    """Never returns: ends the process when all tests were tried."""
    with open(0, "rb", closefd=False) as given:
        task = json.load(given)
    out, write, leave, fork, wait = os.dup(1), os.write, os._exit, os.fork, os.waitpid
    words = [test.pop("word").encode() + b"\n" for test in task["tests"]]
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "packages"))
    site.setquit()
    before = pristine([builtins, *imported(task["imports"])])
    program = types.ModuleType("solution")
    sys.modules["solution"], sys.modules["__main__"] = program, types.ModuleType("__main__")
    names = {"__name__": "test_solution", "__builtins__": dict(BUILTINS)}
    load = functools.partial(exec, compiled(task["program"], "<solution>"), vars(program))
    tests = [runnable(test["source"], test["node"], names) for test in task["tests"]]
    sys.addaudithook(guard)
    if not (ran(load) and unchanged(before)):
        leave(0)
    share(program, names, task["wanted"], task["rename"])
    for word, test in zip(words, tests, strict=True):
        child = fork()
        if child == 0:
            if ran(test) and unchanged(before):
                write(out, word)
            leave(0)
        wait(child, 0)
    leave(0)


def runnable(source: str, node: str, names: dict[str, Any]) -> Call:
    """What runs one test, made before the program can change how."""
    if node:
        return functools.partial(by_pytest, source, node)
    return functools.partial(exec, compiled(source, "<tests>"), names)


def compiled(source: str, name: str) -> types.CodeType:
    """Code that keeps its asserts."""
    return compile(source.removeprefix("\ufeff"), name, "exec", dont_inherit=True, optimize=0)


def imported(names: list[str]) -> list[types.ModuleType]:
    """The modules that a test imports, and what they brought along."""
    known = set(sys.modules)
    for name in names:
        try:
            __import__(name)
        except ImportError:  # the test will say so
            continue
    return [module for name, module in list(sys.modules.items()) if name in names or name not in known]


def pristine(modules: list[types.ModuleType]) -> list[tuple[Any, str, Any, Any]]:
    """(owner, name, value, code) of all functions of modules and of their classes, and of the modules' own names."""
    found: list[tuple[Any, str, Any, Any]] = []
    classes: set[type] = set()
    for module in modules:
        if sys.modules.get(module.__name__) is module:
            found.append((sys, module.__name__, module, None))
        for name, value in list(vars(module).items()):
            if module is sys or not callable(value) or (module is builtins and name in FREE):
                continue
            found.append((module, name, value, code_of(value)))
            if isinstance(value, type) and value.__flags__ & HEAP_TYPE:
                classes.add(value)
    for owner in classes:
        for name, value in vars(owner).items():
            if callable(value) or isinstance(value, (property, classmethod, staticmethod, int, float)):
                found.append((owner, name, value, code_of(value)))
    return found


def unchanged(before: list[tuple[Any, str, Any, Any]]) -> bool:
    """Whether all of them are what they were."""
    return all(
        (sys.modules if owner is sys else vars(owner)).get(name) is value and code_of(value) == code
        for owner, name, value, code in before
    )


def code_of(value: Any) -> tuple[int, int, int] | None:
    """What a function of Python code does, None for other objects."""
    if not isinstance(value, types.FunctionType):
        return None
    return id(value.__code__), id(value.__defaults__), id(value.__kwdefaults__)


def share(program: types.ModuleType, names: dict[str, Any], wanted: str, rename: bool) -> None:
    """The program's names for the test: not those that hide a builtin, unless it is the very one that is tested."""
    own = vars(program)
    if rename and wanted and wanted not in own:
        kinds = (types.FunctionType, type)
        defined = [v for kind in kinds for v in own.values() if type(v) is kind and v.__module__ == "solution"]
        if defined:
            own[wanted] = defined[0]
    hidden = names["__builtins__"]
    names.update({k: v for k, v in own.items() if not k.startswith("__") and (k == wanted or k not in hidden)})


def ran(work: Call) -> bool:
    """Whether `work` came to its end, in a thread that has no frame of ours but `steps`."""
    ended: list[bool] = []
    over = allocate_lock()
    over.acquire()
    stack_size(64 << 20)
    start_new_thread(ended.extend, (steps(work, over),))
    stack_size(0)
    over.acquire()
    return ended == [True]


def steps(work: Call, over: LockType) -> Iterator[bool]:
    """Yields only if `work` neither raised nor left; a list takes what is yielded, out of the program's reach."""
    try:
        work()
        yield True
    finally:
        over.release()


def by_pytest(source: str, node: str) -> None:
    """Has pytest run the tests called `node`; raises unless all of them passed, and none was skipped."""
    import pytest

    class Count:
        passed = 0
        other = 0

        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.outcome != "passed":
                self.other += 1
            elif report.when == "call":
                self.passed += 1

    with open("test_solution.py", "w", encoding="utf-8") as file:
        file.write(source)
    count, plugins = Count(), ("cacheprovider", "faulthandler", "threadexception", "unraisableexception")
    options = ["--noconftest", "--no-header", "--assert=plain", *(f"-pno:{name}" for name in plugins)]
    code = pytest.main([*options, f"test_solution.py::{node}"], plugins=[count])
    if code or count.other or not count.passed:
        raise AssertionError(node)


def guard(event: str, arguments: tuple) -> None:
    """An audit hook, which cannot be taken off: refuses what leads to the frames of others, or changes code.

    What the standard library needs for itself it may do: `namedtuple` asks for a frame, `types.coroutine` changes code.
    """
    if event in REFUSED or event.startswith("ctypes."):
        raise RuntimeError(f"{event} is not for programs that are judged")
    reads = event == "sys._getframe" or (event == "object.__getattr__" and arguments[1] in FRAMES)
    if reads or (event == "object.__setattr__" and arguments[1] == "__code__"):
        if get_ident() in ASKING:  # the question just below
            return
        ASKING.add(get_ident())
        try:
            asker = sys._getframe(1).f_code.co_filename
        finally:
            ASKING.discard(get_ident())
        if asker.endswith("/inspect.py") or (asker[0] == "<" and not asker.startswith("<frozen ")):
            raise ValueError(f"{event} is not for programs that are judged")


if __name__ == "__main__":
    main()
