"""Waiting for something to become true. A limit only ends a test that hangs: no machine is too slow for one."""

import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PATIENCE = 600.0  # seconds


def wait_for(what: str, condition: Callable[[], object]) -> None:
    """Poll until `condition` holds; AssertionError that names `what` when it never does."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"timed out waiting for {what}"
        time.sleep(0.05)


def says(process: subprocess.Popen[str], words: str) -> None:
    """Read what a process prints up to a line with `words`; AssertionError when it ends without."""
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if words in line:
            return
    raise AssertionError(f"it ended without {words!r}: {''.join(seen)}")


def processes(file: str) -> Iterator[tuple[int, list[bytes]]]:
    """Id and `environ` or `cmdline` of every process of this machine that is still there when it is looked at."""
    for path in Path("/proc").glob(f"[0-9]*/{file}"):
        try:
            yield int(path.parent.name), path.read_bytes().split(b"\0")
        except OSError:
            continue
