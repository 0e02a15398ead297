"""A stranger's program cannot fill the machine, look around, call out, outlive its time, or leave anything behind."""

import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llada_core.verifiers import sandbox
from llada_core.verifiers.sandbox import Limits, SandboxError, run_python

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="programs of strangers are run on Linux only")
QUICK = Limits(seconds=2)


def run(program, **changes):
    return run_python(program, limits=Limits(**{"seconds": 5, **changes}))


def test_output_input_and_exit_codes():
    outcome = run_python("import sys; print(sys.stdin.read()); print('e', file=sys.stderr); sys.exit(3)", stdin="héllo")
    assert (outcome.status, outcome.code, outcome.stdout, outcome.stderr) == ("failed", 3, "héllo\n", "e\n")
    assert run("import json, math; print(json.dumps(math.pi))").status == "ok"
    assert run("syntax error").stderr.endswith("SyntaxError: invalid syntax\n")


def test_it_is_shut_in_on_this_machine():
    isolation = run("").isolation
    assert {"namespaces", "no-network", "own-files"} <= set(isolation) or "filtered-calls" in isolation
    assert os.geteuid() != 0 or "not-root" in isolation


def test_fork_bomb():
    outcome = run("import os\nwhile True:\n    os.fork()")
    assert outcome.status != "ok"
    assert "Resource temporarily unavailable" in outcome.stderr
    assert not left_over()


def test_what_it_started_ends_with_it():
    started = "import os, time\nif os.fork() == 0:\n    try: os.setsid()\n    except OSError: pass\n    time.sleep(60)"
    assert run(started).status == "ok"
    assert not left_over()


def test_memory():
    outcome = run("x = bytearray(10 * 2**30)")
    assert outcome.status == "failed"
    assert "MemoryError" in outcome.stderr
    assert run("x = bytearray(100 * 2**20)").status == "ok"


def test_endless_loop_and_sleep():
    assert run_python("while True: pass", limits=QUICK).status == "timeout"
    assert run_python("import time\nprint('begun', flush=True)\ntime.sleep(60)", limits=QUICK).status == "timeout"
    assert not left_over()


def test_the_home_folder_and_this_project_cannot_be_read():
    places = [Path.home(), Path(__file__), Path("/etc/passwd"), Path("/root/.bashrc"), Path("/proc/1/environ")]
    program = f"""
import os
for place in {[str(place) for place in places]!r}:
    try:
        print(place, os.listdir(place) if os.path.isdir(place) else open(place).read())
    except OSError:
        pass
"""
    outcome = run(program)
    assert outcome.status == "ok"
    shown = [name for name in os.listdir(Path.home()) if f"'{name}'" in outcome.stdout]
    assert set(shown) <= {Path(sys.base_prefix).relative_to(Path.home()).parts[0]} if shown else True
    assert "cannot be read" not in outcome.stdout
    assert "/etc/passwd" not in outcome.stdout


def test_no_socket():
    for family in ("AF_INET", "AF_UNIX"):
        outcome = run(f"import socket\nsocket.socket(socket.{family})")
        assert outcome.status == "failed"
        assert "PermissionError" in outcome.stderr


def test_files_are_few_small_and_gone():
    assert run("import os; assert os.listdir('.') == []; open('x', 'w').write('y')").status == "ok"
    assert run("import os; assert os.listdir('.') == []").status == "ok"
    outcome = run("f = open('big', 'wb')\nfor _ in range(100): f.write(bytes(1 << 20)); f.flush()")
    assert outcome.status != "ok"
    assert run("for _ in range(1000): print('x' * 100_000)").status != "ok"
    assert run("import sys; open(sys.executable, 'ab')").status == "failed"
    assert run("open('/dev/null', 'w').write('x')").status == "ok"


def test_environment_is_empty(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "x")
    assert "SECRET" not in run("import os; print(os.environ)").stdout


def test_many_at_once_do_not_share_a_limit():
    with ThreadPoolExecutor(4) as pool:
        program = "import os\npid = os.fork()\nif pid: os.waitpid(pid, 0)\nprint('ok')"
        outcomes = list(pool.map(lambda _: run(program, processes=2), range(8)))
    assert [outcome.status for outcome in outcomes] == ["ok"] * 8


@pytest.fixture
def without_namespaces(monkeypatch, tmp_path):
    """The child as it is on a machine that allows no namespaces."""
    source = Path(sandbox.__file__).with_name("sandbox_child.py").read_text()
    child = tmp_path / "child.py"
    child.write_text(source.replace("    if LIBC.unshare(", "    if True or LIBC.unshare("))
    monkeypatch.setattr(sandbox, "_CHILD", child)


@pytest.mark.skipif(os.geteuid() != 0, reason="without namespaces only root can shut a program in")
def test_root_without_namespaces_still_shuts_in(without_namespaces, monkeypatch):
    if shutil.which("/usr/bin/python3") is None:
        pytest.skip("no interpreter that a stranger could read")
    monkeypatch.setattr(sys, "_base_executable", "/usr/bin/python3")
    assert run("print(1)").isolation == ("not-root", "filtered-calls")
    assert "PermissionError" in run("import socket; socket.socket()").stderr
    assert "Resource temporarily unavailable" in run("import os\nwhile True: os.fork()").stderr
    assert "PermissionError" in run("import os; os.listdir('/root')").stderr
    assert "PermissionError" in run("import os; os.setsid() if os.fork() == 0 else os.wait()").stderr
    assert run_python("import os, time\nos.fork()\ntime.sleep(60)", limits=QUICK).status == "timeout"
    assert not left_over()


def test_a_machine_that_cannot_shut_in_runs_nothing(without_namespaces, monkeypatch, tmp_path):
    child = tmp_path / "child.py"
    child.write_text(child.read_text().replace("root = os.geteuid() == 0", "root = False"))
    with pytest.raises(SandboxError, match="user namespaces are not allowed"):
        run("print(1)")


def left_over(seconds: float = 20.0) -> set[str]:
    """Programs of a sandbox that are there now and stay; those of a test beside this one end before."""
    found, deadline = programs(), time.monotonic() + seconds
    while found and time.monotonic() < deadline:
        found &= programs()
        time.sleep(0.02)
    return found


def programs() -> set[str]:
    """The processes of all sandboxes on this machine."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if any(word.endswith(b"program.py") for word in words):
            found.add(process.name)
    return found
