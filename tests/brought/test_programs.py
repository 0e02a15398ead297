"""Programs as models write them, and tests as data sets do: what ran to its end and held is right, nothing else is.

A line per program or test; one from a bug report is a line more. What one process cannot tell apart is an object that
says that it is equal to everything: nothing here claims to.
"""

import sys

import pytest

from llada_core.evaluation.definitions.scoring import humaneval_results, mbpp_results
from llada_core.verifiers import code
from llada_core.verifiers.answers import verify
from llada_core.verifiers.code import cases, fenced, passed_share
from llada_core.verifiers.sandbox import Limits

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="programs of strangers are run on Linux only")

ADD = "def add(a, b):\n    return a + b\n"
ZERO = "def add(a, b):\n    return 0\n"
TESTS = """import math
from solution import add

def test_sum():
    assert math.isclose(add(1, 2), 3)

def test_zero():
    assert set([add(0, 1)]) == set([1])
"""

# What a program may do instead of being right.
TRICKS = {
    "exit": "import sys\nsys.exit(0)",
    "exit at the end": ADD + "exit()",
    "quit in the function": "def add(a, b):\n    quit()",
    "SystemExit in the function": "def add(a, b):\n    raise SystemExit(0)",
    "os._exit": "import os\nos._exit(0)",
    "os._exit in the function": "import os\ndef add(a, b):\n    os._exit(0)",
    "the thread ends": "import _thread\ndef add(a, b):\n    _thread.exit()",
    "the main thread is interrupted": "import _thread\ndef add(a, b):\n    _thread.interrupt_main()\n    return 0",
    "atexit": ZERO + "import atexit, os\natexit.register(os._exit, 0)",
    "excepthook": ZERO + "import os, sys\nsys.excepthook = sys.unraisablehook = lambda *_: os._exit(0)",
    "at fork": ZERO + "import os\nos.register_at_fork(after_in_child=lambda: os._exit(0))",
    "another program": "import os, sys\nos.execv(sys.executable, [sys.executable, '-c', 'print(1)'])",
    "a child that ends well": ZERO + "import os\nif os.fork() == 0:\n    os._exit(0)",
    "a thread that prints": ZERO
    + "import threading\ndef say():\n    while True:\n        print('passed', flush=True)\nthreading.Thread(target=say).start()",
    "standard input": ZERO
    + "import os, sys\nword = sys.stdin.read()\nprint(word)\nfor n in range(1, 32):\n    try: os.write(n, word.encode())\n"
    "    except OSError: pass",
    "standard input from its start": "import os\nos.lseek(0, 0, 0)\nword = os.read(0, 9999)\nos.write(3, word)\nos._exit(0)",
    "files beside it": ZERO
    + "import os\nfor name in ('/stdin', 'stdin', '/dev/stdin', '/proc/self/fd/0'):\n    try: os.write(3, open(name, 'rb').read())\n"
    "    except OSError: pass",
    "what was said already": "import os\ndef add(a, b):\n    for n in range(3, 32):\n        try:\n"
    "            os.lseek(n, 0, 0)\n            said = os.read(n, 999)\n            os.write(n, said)\n        except OSError: pass\n"
    "    return 3 if (a, b) == (1, 2) else 0",
    "frames of threads": ZERO
    + "import os, sys\nfor frame in sys._current_frames().values():\n    while frame:\n        for value in frame.f_locals.values():\n"
    "            if isinstance(value, list): os.write(3, repr(value).encode())\n        frame = frame.f_back",
    "frames of the test": "import sys\ndef add(a, b):\n    frame = sys._getframe(1)\n"
    "    frame.f_globals['math'] = type('', (), {'isclose': staticmethod(lambda *_: True)})\n"
    "    frame.f_globals['set'] = len\n    return 0",
    "frames of a traceback": "def add(a, b):\n    try: 1 / 0\n    except ZeroDivisionError as error:\n"
    "        frame = error.__traceback__.tb_frame.f_back\n        frame.f_globals['set'] = len\n    return 0",
    "the collector": ZERO + "import gc, os\nfor one in gc.get_objects():\n    if isinstance(one, list): os.write(3, repr(one).encode())",
    "tracing": ZERO + "import sys\nsys.settrace(lambda *_: None)",
    "memory": ZERO + "import ctypes",
    "the judge": ZERO + "import __main__\n__main__.unchanged = __main__.ran = lambda *_: True",
    "a helper": ZERO + "import math\nmath.isclose = lambda *_: True",
    "a helper in the function": "def add(a, b):\n    import math\n    math.isclose = lambda *_: True\n    return 0",
    "a module": ZERO + "import sys\nclass Fake:\n    isclose = staticmethod(lambda *_: True)\nsys.modules['math'] = Fake",
    "builtins": ZERO + "import builtins\nbuiltins.set = lambda *_: 1\nbuiltins.AssertionError = Warning",
    "what the judge calls": ZERO + "import builtins\nbuiltins.exec = builtins.vars = lambda *_: {}\nbuiltins.all = lambda *_: True",
    "import": ZERO + "import builtins\nclass Fake:\n    isclose = staticmethod(lambda *_: True)\nbuiltins.__import__ = lambda *_: Fake",
    "a name that the test uses": "def add(a, b):\n    return 3\ndef set(x):\n    return 1",
    "megabytes": ZERO + "print('x' * 40_000_000)",
}  # fmt: skip

# What right programs do.
RIGHT = {
    "plain": ADD,
    "megabytes": "import sys\n" + ADD.replace("return", "print('x' * 30_000_000); sys.stderr.write('y' * 10**6); return"),
    "lambda": "add = lambda a, b: a + b",
    "main guard that asks": ADD + "if __name__ == '__main__':\n    print(add(int(input()), 1))",
    "asks, and takes no for an answer": ADD + "try:\n    n = input()\nexcept EOFError:\n    n = 0",
    "closes its output": ADD + "import sys\nsys.stdout.close()",
    "ends badly later": ADD + "import atexit\natexit.register(lambda: 1 / 0)",
    "never ends": ADD + "import threading, time\nthreading.Thread(target=time.sleep, args=(600,)).start()",
    "another name": ADD.replace("add", "plus"),
    "annotations": "from __future__ import annotations\n" + ADD.replace("(a,", "(a: Nowhere,"),
    "CRLF and a byte order mark": "\ufeff" + ADD.replace("\n", "\r\n"),
    "state of its own": "seen = []\ndef add(a, b):\n    seen.append(1)\n    return (a + b) * len(seen)",
    "classes": "from collections import namedtuple\nfrom dataclasses import dataclass\nfrom enum import Enum\n"
    "P = namedtuple('P', 'a b')\nE = Enum('E', 'A B')\n@dataclass\nclass Sum:\n    p: P\n    def total(self): return sum(self.p)\n"
    "def add(a, b):\n    return Sum(P(a, b)).total()",
    "deep recursion": "import sys\nsys.setrecursionlimit(10**6)\ndef down(n):\n    return n and down(n - 1)\n"
    + ADD.replace("return", "return down(30_000) +"),
    "threads": "from concurrent.futures import ThreadPoolExecutor\ndef add(a, b):\n    with ThreadPoolExecutor(8) as pool:\n"
    "        return sum(pool.map(int, [a, b]))",
    "processes": "from multiprocessing import get_context\ndef add(a, b):\n    with get_context('fork').Pool(2) as pool:\n"
    "        return sum(pool.map(abs, [a, b]))",
    "asyncio": "import asyncio\nasync def total(a, b):\n    return a + b\ndef add(a, b):\n    return asyncio.run(total(a, b))",
    "logs and tracebacks": "import logging, traceback, warnings\ndef add(a, b):\n    logging.warning('a'); warnings.warn('b')\n"
    "    try: 1 / 0\n    except ZeroDivisionError: traceback.print_exc()\n    return a + b",
    "prints into a string": "import contextlib, io\ndef add(a, b):\n    with contextlib.redirect_stdout(io.StringIO()) as said:\n"
    "        print(a + b)\n    return int(said.getvalue())",
}  # fmt: skip


@pytest.mark.parametrize("program", TRICKS.values(), ids=TRICKS)
def test_a_trick_earns_nothing(program):
    assert verify("code", f"```python\n{program}\n```", {"tests": TESTS}) is False


@pytest.mark.parametrize("program", RIGHT.values(), ids=RIGHT)
def test_a_right_program_is_right(program):
    assert code.passes(program, cases(TESTS), rename=True) == [True, True]


def test_an_endless_loop_fails_its_own_test_alone():
    program = "def add(a, b):\n    while a == 0: pass\n    return a + b"
    assert code.passes(program, cases(TESTS), Limits(seconds=60, cpu_seconds=1, processes=32)) == [True, False]


# Tests as data sets write them, with a right and a wrong program.
FORMS = {
    "asserts": ("assert add(1, 2) == 3\nassert add(0, 0) == 0", ADD, ZERO),
    "a call in a call": ("assert set(add((1,), (2,))) == set((2, 1))", ADD, "def add(a, b): return a"),
    "a distance": ("assert abs(add(0.1, 0.2) - 0.3) < 1e-9", ADD, ZERO),
    "not": ("assert not add(0, 0)\nassert add(0, 1)", ADD, ZERO),
    "a name of Python's": ("assert sum(10, 15) == 25", "def sum(a, b): return a + b", "def sum(a, b): return 0"),
    "over several lines": ("assert add([1],\n    [2]) == [\n    1,\n    2,\n]", ADD, ZERO),
    "statements between": ("x = add(1, 2)\nassert x == 3\nx = add(x, x)\nassert x == 6, f'{x} it is'", ADD, ZERO),
    "a loop": ("for a, b in [(1, 2), (0, 0)]:\n    assert add(a, b) == a + b", ADD, ZERO),
    "a class of the program": (
        "p = Pair(1, 2)\nassert add(p.a, p.b) == 3",
        ADD + "class Pair:\n    def __init__(self, a, b):\n        self.a, self.b = a, b",
        ADD,
    ),
    "one function, locals and a loop": (
        "from solution import add\ndef test_add():\n    pairs = [(1, 2)]\n    for a, b in pairs:\n        assert add(a, b) == a + b",
        ADD,
        ZERO,
    ),
    "one function with a message": ("from solution import add\ndef test_add():\n    'Adds.'\n    assert add(1, 2) == 3, 'no'", ADD, ZERO),
    "check, as HumanEval": ("def check(candidate):\n    assert candidate(1, 2) == 3\n\ncheck(add)", ADD, ZERO),
    "the module": ("import solution\ndef test_add():\n    assert solution.add(1, 2) == 3", ADD, ZERO),
    "all names": ("from solution import *\ndef test_add():\n    assert add(1, 2) == 3", ADD, ZERO),
    "a helper": (
        "from solution import add\ndef right(a, b):\n    return a + b\ndef test_add():\n    assert add(1, 2) == right(1, 2)",
        ADD,
        ZERO,
    ),
    "a class": ("from solution import C\ndef test_c():\n    c = C()\n    c.add()\n    assert c.add() == 2",
                "class C:\n    n = 0\n    def add(self):\n        self.n += 1\n        return self.n", "class C: pass"),
    "its main guard": (
        "import unittest\nfrom solution import add\ndef test_add():\n    assert add(1, 2) == 3\nif __name__ == '__main__':\n    unittest.main()",
        ADD,
        ZERO,
    ),
    "an exception caught": (
        "from solution import half\ndef test_odd():\n    try:\n        half(3)\n    except ValueError:\n        return\n    assert False",
        "def half(a):\n    if a % 2: raise ValueError\n    return a // 2",
        "def half(a): return a // 2",
    ),
    "pytest.raises": (
        "import pytest\nfrom solution import half\ndef test_odd():\n    with pytest.raises(ValueError, match='odd'):\n        half(3)",
        "def half(a):\n    if a % 2: raise ValueError('odd')\n    return a // 2",
        "def half(a): return a // 2",
    ),
    "pytest.approx": (
        "from pytest import approx\nfrom solution import third\ndef test_a():\n    assert third(1) == approx(0.333333, abs=1e-5)",
        "def third(a): return a / 3",
        "import builtins\nbuiltins.abs = lambda x: 0\nimport pytest\npytest.approx = lambda x, **_: 0\ndef third(a): return 0",
    ),
    "parametrize": (
        "import pytest\nfrom solution import add\n@pytest.mark.parametrize('a, total', [(1, 2), (2, 4)])\ndef test_add(a, total):\n"
        "    assert add(a, a) == total",
        ADD,
        "import pytest\ndef add(a, b):\n    pytest.skip()",
    ),
    "fixtures": (
        "import pytest\nfrom solution import show\ndef test_show(capsys):\n    show(3)\n    assert capsys.readouterr().out == '3\\n'",
        "show = print",
        "def show(a): pass",
    ),
    "a class of tests": (
        "from solution import add\nclass TestAdd:\n    def setup_method(self):\n        self.a = 1\n    def test_a(self):\n"
        "        assert add(self.a, 2) == 3",
        ADD,
        ZERO,
    ),
    "unittest": (
        "import unittest\nfrom solution import add\nclass Adds(unittest.TestCase):\n    def test_a(self):\n"
        "        self.assertEqual(add(1, 2), 3)",
        ADD,
        "import unittest\nunittest.TestCase.assertEqual = lambda *_: None\n" + ZERO,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("tests", "right", "wrong"), FORMS.values(), ids=FORMS)
def test_forms_of_tests(tests, right, wrong):
    assert passed_share(right, tests) == 1.0
    assert passed_share(wrong, tests) < 1.0


def test_the_share_counts_each_test():
    assert passed_share("def add(a, b): return 3", TESTS) == 0.5
    assert (
        passed_share("def add(a, b): return 3", "def test_add():\n    assert add(1, 2) == 3\n    assert add(0, 0) == 0")
        == 0.5
    )
    assert (
        passed_share(ADD, "assert True") == passed_share(ADD, "def test_(: no Python") == passed_share(ADD, "") == 0.0
    )


FENCES = {
    "python": "```python\n{}```",
    "py": "```py\n{}```",
    "Python": "```Python\n{}\n```",
    "python3": "``` python3\n{}```",
    "in braces": "```{{.python}}\n{}```",
    "a space behind": "```python \n{}```",
    "with a title": "```python title=\"add.py\"\n{}```",
    "without a name": "```\n{}```",
    "CRLF": "Here:\r\n```python\r\n{}```\r\nDone.",
    "not closed": "```python\n{}",
    "glued to the end": "```python\n{}    # done```\nDone.",
    "glued to the start": "Here: ```python\n{}```",
    "tildes": "~~~python\n{}~~~",
    "in answer tags": "<reasoning>\nA.\n</reasoning>\n<answer>\n```python\n{}```\n</answer>\n",
    "the one in the tags": "```python\ndef add(a, b): return 0\n```\n<answer>```python\n{}```</answer>",
    "after another language": "```bash\npip install add\n```\n```python\n{}```",
    "after an example": "```python\nadd(1, 2)\n```\n```python\n{}```",
    "before an example": "```python\n{}```\nUse it:\n```python\nadd(1, 2)\n```",
    "a lambda after an import": "```python\nimport math\n```\n```python\nadd = lambda a, b: a + b\n```",
    "in a list": "1. So:\n   ```python\n   def add(a, b):\n       return a + b\n   ```",
    "with a fence in its docstring": "```python\ndef add(a, b):\n    '''\n    ```\n    add(1, 2)\n    ```\n    '''\n    return a + b\n```",
    "none at all": "{}",
    "none, in answer tags": "<answer>{}</answer>",
}  # fmt: skip


@pytest.mark.parametrize("reply", FENCES.values(), ids=FENCES)
def test_fences(reply):
    assert verify("code", reply.format(ADD), {"tests": "assert add(1, 2) == 3"}) is True


def test_text_is_no_program():
    assert fenced("no program") is None
    assert verify("code", "I would add them.", {"tests": "assert add(1, 2) == 3"}) is False
    assert verify("code", "```python\nx = '\ud83d'\n```", {"tests": "assert add(1, 2) == 3"}) is False


def test_benchmarks_ask_the_same_judge():
    humaneval = {"test": "def check(candidate):\n    assert candidate(1, 2) == 3\n", "entry_point": "add"}
    mbpp = {"test_list": ["assert add(*pair) == 3"], "test_setup_code": "pair = (1, 2)"}
    for program, right in ((ADD, 1.0), (ZERO, 0.0), ("import sys\nsys.exit(0)", 0.0), (TRICKS["atexit"], 0.0)):
        assert humaneval_results(humaneval, [[program]]) == {"pass@1": right}
        assert mbpp_results(mbpp, [[program]]) == {"pass_at_1": right}
    assert mbpp_results(mbpp, [[ADD.replace("add", "plus")]]) == {"pass_at_1": 0.0}  # the prompt names the function
