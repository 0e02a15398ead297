"""A stranger's program shut in, with the packages it is lent."""

import contextlib
import importlib.util
import json
import math
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, Literal

# The program gets a process of its own with limits on CPU, memory, files and processes, no network, an empty folder
# and a wall clock; where the kernel lets us, also namespaces of its own and a file system that holds nothing but the
# Python interpreter. When run by root it loses root first, because root is above process limits. Only the standard
# library is there, and the packages that the caller lends.
# How the isolation is built is in sandbox_child.py, which runs inside the new process.

Status = Literal["ok", "failed", "timeout", "killed"]
_CHILD = Path(__file__).with_name("sandbox_child.py")
_SYSTEM = ("/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache")
_ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": "/", "PYTHONDONTWRITEBYTECODE": "1"}
_SET_UP = 30.0  # seconds that building the isolation may take


class SandboxError(RuntimeError):
    """The program was not run, because this machine cannot shut it in."""


@dataclass(frozen=True)
class Limits:
    """What one program may use: wall clock, CPU (None: as much), bytes of memory and of a file, and counts.

    A verdict that must not depend on how busy the machine is limits `cpu_seconds`, and leaves the wall clock wide.
    """

    seconds: float = 5.0
    cpu_seconds: float | None = None
    memory: int = 1 << 30
    file_bytes: int = 16 << 20
    processes: int = 4
    open_files: int = 64


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    ok: exit code 0; failed: another exit code; timeout: out of wall clock or CPU; killed: by a signal. `stdout` and
    `stderr` are cut to the limit asked for. `isolation` names what was in force.
    """

    status: Status
    code: int
    stdout: str
    stderr: str
    isolation: tuple[str, ...]


def run_python(
    program: str,
    *,
    stdin: str = "",
    limits: Limits | None = None,
    output_bytes: int = 1 << 16,
    packages: Path | None = None,
) -> Outcome:
    """The outcome of running `program` (Python source) shut in; raises `SandboxError` if that cannot be done here.

    packages: a folder of Python modules, which lies as `packages` beside the program's file.
    """
    limits = limits or Limits()
    if os.name != "posix" or sys.platform != "linux":
        raise SandboxError(f"programs of strangers are run on Linux only, not on {sys.platform}")
    with tempfile.TemporaryDirectory(prefix="sandbox-") as folder:
        task = {
            "folder": folder,
            "python": os.path.realpath(sys._base_executable),  # type: ignore[attr-defined]
            "readable": _readable(),
            "packages": str(packages) if packages else None,
            "program": program,
            "stdin": stdin,
            "cpu": math.ceil(limits.cpu_seconds or limits.seconds),
            **asdict(limits),
        }
        return _run(task, limits.seconds, output_bytes)


def _run(task: dict[str, object], seconds: float, output_bytes: int) -> Outcome:
    ready, report = os.pipe()
    with (
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as err,
        tempfile.TemporaryFile() as given,
        os.fdopen(ready, "rb", buffering=0) as ready_file,
    ):
        given.write(json.dumps(task).encode())
        given.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_CHILD), str(report)],
            stdin=given,
            stdout=out,
            stderr=err,
            pass_fds=(report,),
            env=_ENVIRONMENT,
            start_new_session=True,
        )
        try:
            os.close(report)
            words = _first_line(ready_file)
            late = False
            if words.startswith("ready"):
                try:
                    process.wait(seconds)
                except subprocess.TimeoutExpired:
                    late = True
        finally:
            # The whole session: what the program started dies with it (a process namespace sees to the rest).
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
        texts = []
        for stream in (out, err):
            stream.seek(0)
            texts.append(stream.read(output_bytes).decode(errors="replace"))
    if not words.startswith("ready"):
        raise SandboxError(
            f"cannot shut in a program on this machine: {words or texts[1].strip() or 'no reason given'}"
        )
    return Outcome(_status(code, late), code, texts[0], texts[1], tuple(words.split()[1:]))


def _first_line(pipe: BinaryIO) -> str:
    """What the child says once it is shut in, just before it becomes the program."""
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        return pipe.read(4096).decode(errors="replace") if selector.select(_SET_UP) else "it took too long"


def _status(code: int, late: bool) -> Status:
    # A program in a process namespace is seen through its parent, which exits with 128 + the signal's number.
    number = -code if code < 0 else code - 128
    if late or number == signal.SIGXCPU:
        return "timeout"
    if number in (signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGXFSZ):
        return "killed"
    return "ok" if code == 0 else "failed"


def _readable() -> list[str]:
    """What the interpreter itself needs to be able to read."""
    return [path for path in (*_SYSTEM, sys.base_prefix) if os.path.exists(path)]


# The folder of packages is made once per process, with its bytecode, as reading its source takes longer than most tests.

MODULES = ("pytest", "_pytest", "pluggy", "iniconfig", "packaging", "pygments", "py")
"""pytest and what it imports."""

_WARM = "import sys; sys.path.append(sys.argv[1]); import pytest; pytest.main(['--no-header', '-pno:cacheprovider', sys.argv[2]])"
_MADE: list[tempfile.TemporaryDirectory[str]] = []  # gone when this process ends
_LOCK = threading.Lock()


def pytest_folder() -> Path:
    """A folder from which `import pytest` works; raises `SandboxError` where it is not installed."""
    with _LOCK:
        if not _MADE:
            folder = tempfile.TemporaryDirectory(prefix="pytest-lent-")
            _fill(Path(folder.name))
            _MADE.append(folder)
        return Path(_MADE[0].name)


def _fill(folder: Path) -> None:
    folder.chmod(0o755)
    for name in MODULES:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations:
            shutil.copytree(
                spec.submodule_search_locations[0], folder / name, ignore=shutil.ignore_patterns("__pycache__")
            )
        elif spec is not None and spec.origin:
            shutil.copy(spec.origin, folder)
        elif name == "pytest":
            raise SandboxError("these tests need pytest, which is not installed: pip install 'lladaflow[train]'")
    with tempfile.TemporaryDirectory() as empty:
        command = [sys._base_executable, "-I", "-S", "-c", _WARM, str(folder), empty]  # type: ignore[attr-defined]
        subprocess.run(command, cwd=empty, capture_output=True, check=False)
