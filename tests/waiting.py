"""Waiting for something to become true. A limit only ends a test that hangs: no machine is too slow for one."""

import time
from collections.abc import Callable

PATIENCE = 600.0  # seconds


def wait_for(what: str, condition: Callable[[], object]) -> None:
    """Poll until `condition` holds; AssertionError that names `what` when it never does."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"timed out waiting for {what}"
        time.sleep(0.05)
