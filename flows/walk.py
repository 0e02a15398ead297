"""DVC's graph as plain names, and one stage of it as a process of its own.

Knows DVC's Python side for the graph and its command line for the work; does not know Prefect.
"""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Literal

from llada_core.settings import ConfigError, nearest
from tasks.errors import StageError
from tasks.pipeline import environment

Outcome = Literal["ran", "skipped"]


def stage_graph(folder: Path) -> tuple[dict[str, set[str]], set[str]]:
    """Stage -> the stages it depends on, and the stages that are not up to date. Half a second, in process.

    One thread at a time: DVC's reader of dvc.yaml fails now and then when two use it.
    """
    from dvc.repo import Repo

    with Repo(str(folder)) as repo:
        graph = {stage.name: {s.name for s in repo.index.graph[stage]} for stage in repo.index.graph}
        return graph, {address.rpartition(":")[2] for address in repo.status()}  # addresses hold the path from here


def part_of(graph: dict[str, set[str]], first: str | None, last: str | None) -> dict[str, set[str]]:
    """The part from `first` (with all that follows from it) up to `last` (with all that it needs)."""
    after, before = _reach(_reversed(graph), first), _reach(graph, last)
    kept = [name for name in TopologicalSorter(graph).static_order() if name in after and name in before]
    return {name: graph[name] & set(kept) for name in kept}


def _reach(graph: dict[str, set[str]], name: str | None) -> set[str]:
    if name is None:
        return set(graph)
    found = {stage for stage in graph if name in (stage, stage.partition("@")[0])}
    if not found:
        raise ConfigError(f"there is no stage {name!r}{nearest(name, list(graph))}")
    while more := {d for stage in found for d in graph[stage]} - found:
        found |= more
    return found


def _reversed(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    return {name: {other for other, needs in graph.items() if name in needs} for name in graph}


@dataclass
class StageProcesses:
    """Runs stages of one folder, each as `dvc repro --single-item` in a session of its own, and can end them all."""

    folder: Path
    confirmed: bool = False
    hours: float | None = None  # a stage that takes longer is ended, after it has saved itself
    _live: set[subprocess.Popen[str]] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, stage: str, tell: Callable[[str], object]) -> Outcome:
        """Bring one stage up to date, telling each line it prints; raises `StageError` with the stage's exit status."""
        command = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--single-item", stage]
        extra = {"LLADAFLOW_YES": "1"} if self.confirmed else {}
        outcome: Outcome = "skipped"
        text = ""
        with self._started(command, environment() | extra) as process:
            assert process.stdout is not None
            for line in process.stdout:
                text = line.rstrip() or text
                outcome = "ran" if line.startswith("Running stage") else outcome
                tell(line.rstrip())
        if process.returncode:
            status = re.search(r"exited with (\d+)", text)
            killed = 128 - process.returncode if process.returncode < 0 else 1
            raise StageError(f"{stage}: {text}", int(status[1]) if status else killed)
        return outcome

    @contextmanager
    def _started(self, command: list[str], env: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
        process = subprocess.Popen(
            command,
            cwd=self.folder,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        with self._lock:
            self._live.add(process)
        limit = threading.Timer(self.hours * 3600 if self.hours else threading.TIMEOUT_MAX, _end, [process])
        limit.daemon = True
        limit.start()
        try:
            yield process
            process.wait()
        finally:
            limit.cancel()
            with self._lock:
                self._live.discard(process)

    def end_all(self) -> None:
        """SIGTERM to every stage that runs, which ends its job as well."""
        with self._lock:
            live = list(self._live)
        for process in live:
            _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    try:
        os.killpg(process.pid, signal.SIGTERM)
    except ProcessLookupError:
        return
