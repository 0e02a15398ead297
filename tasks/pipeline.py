"""The whole pipeline by `dvc repro`, in the checkout or in a workspace, and what it says at the end.

Knows DVC's command line; the order of stages is dvc.yaml's. Prefect's way to the same is flows/pipeline.py.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import FrameType

from llada_core.settings import ConfigError, nearest, read_yaml
from tasks.errors import StageError
from tasks.folders import PATIENCE, read_json, sqlite_file
from tasks.launch.workspace import Workspace, configure_without_git, pipeline_lock
from tasks.record import tracking
from tasks.record.registry import receipts, tracking_uri, versions


def dvc(workspace: Workspace, *arguments: str) -> int:
    """Run a DVC command in the workspace with this environment's programs; returns its exit status.

    A SIGTERM or SIGHUP (a kill, a closed terminal) goes on to DVC and to the stage that it runs, which ends its job.
    """
    command = [sys.executable, "-m", "dvc", *arguments]
    with subprocess.Popen(command, cwd=workspace.path, env=environment()) as process, _passing_on(process):
        return process.wait()


@contextmanager
def _passing_on(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """DVC, which does not tell its children, is told together with them; then this program ends as well."""
    import psutil

    def pass_on(number: int, _frame: FrameType | None) -> None:
        try:
            own = psutil.Process(process.pid)
            told = [*own.children(recursive=True), own]  # with the stage's job, which saves itself and ends
        except psutil.NoSuchProcess:
            told = []
        for one in told:
            with suppress(psutil.NoSuchProcess):
                one.terminate()
        psutil.wait_procs(told)
        sys.exit(128 + number)

    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, pass_on) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def known(workspace: Workspace, stages: list[str]) -> list[str]:
    """These names of stages (`evaluate@sudoku`: an instance); raises `ConfigError` for one that dvc.yaml lacks."""
    listed = list(read_yaml(workspace.path / "dvc.yaml")["stages"])
    for name in stages:
        if name.partition("@")[0] not in listed:
            raise ConfigError(f"this run has no stage {name!r}{nearest(name, listed)}")
    return stages


def environment() -> dict[str, str]:
    """This process's environment with our interpreter first, so that `python` in dvc.yaml is the right one."""
    quiet = {"DVC_NO_ANALYTICS": "1", "PYTHONUNBUFFERED": "1"}
    return os.environ | quiet | {"PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"}


def reproduce(workspace: Workspace, targets: list[str]) -> None:
    """Bring the stages (all, or `targets` with what they need) up to date; raises `StageError` when one fails."""
    configure_without_git(workspace.path)
    with pipeline_lock(workspace):
        status = dvc(workspace, "repro", *known(workspace, targets))
        restore_lost_records(workspace.path)
    if status:
        raise StageError("the pipeline stopped; the same command goes on where it ended", status if status > 2 else 1)


def restore_lost_records(root: Path) -> None:
    """Send what MLflow does not have, and register anew what it has lost; costs nothing when all is there."""
    if os.environ.get("LLADAFLOW_TRACKING") == "off":
        return
    names = {receipt["name"] for receipt in receipts(root)}
    if names and _database_is_empty(root):
        for name in names:
            versions(root, name)
        tracking.send_pending(root, again=True)
    else:
        tracking.send_pending(root)


def _database_is_empty(root: Path) -> bool:
    path = sqlite_file(tracking_uri(root))
    if path is None:
        return False
    if not path.exists():
        return True
    import sqlite3

    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=PATIENCE)) as database:
        try:
            return not database.execute("select 1 from model_versions limit 1").fetchall()
        except sqlite3.OperationalError as error:
            return "no such table" in str(error)  # one that is locked may hold everything


def summary(workspace: Workspace) -> str:
    """The results table, the registered version, and what to do next."""
    parts = []
    table = workspace.path / "reports" / "table.md"
    if table.exists():
        parts.append(table.read_text(encoding="utf-8").strip())
    registered = workspace.path / "reports" / "registered.json"
    if registered.exists():
        entry = read_json(registered)
        aliases = " ".join(f"@{alias}" for alias in entry["aliases"])
        parts.append(f"registered: models:/{entry['name']}/{entry['version']} {aliases} ({entry['gate']['reason']})")
    parts.append("next:\n  make app   the page, with the champion\n  make ui    MLflow and Prefect in the browser")
    parts.append(f"  llada status   every run and where it is (this one: {workspace.path})")
    return "\n\n".join(parts[:-1]) + "\n" + parts[-1]
