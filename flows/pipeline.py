"""The pipeline as a flow that walks DVC's graph, and the Prefect server it talks to."""

import base64
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any, Literal

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_image_artifact, create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.runtime import flow_run
from prefect.settings import get_current_settings
from prefect.states import Completed

from llada_core.settings import ConfigError, nearest
from tasks.errors import StageError, one_line_errors
from tasks.folders import SECONDS, NoDatabaseError, require, shown
from tasks.launch.program import environment, mend, summary
from tasks.launch.workspace import configure_without_git, open_workspace, pipeline_lock
from tasks.project import Project
from tasks.record.runs import all_runs
from tasks.record.tracking import mlflow_link
from tasks.record.versions import restore_if_empty


def require_prefect() -> str:
    """What was found; raises `NoDatabaseError` with the remedy."""
    settings = get_current_settings()
    if not (api := settings.api.url):
        url = settings.server.database.connection_url
        database = url.get_secret_value() if url else ""
        require("Prefect", database, "PREFECT_SERVER_DATABASE_CONNECTION_URL")
        return f"Prefect starts a server when it needs one, on {shown(database)}"
    ours = importlib.metadata.version("prefect")
    try:
        with urllib.request.urlopen(f"{api.rstrip('/')}/admin/version", timeout=SECONDS) as answer:
            theirs = json.load(answer)
    except (OSError, ValueError) as error:
        ways = "start it (`make ui`), or unset PREFECT_API_URL"
        raise NoDatabaseError(f"Prefect's server at {api}: {error}; {ways}") from None
    if theirs != ours:
        ways = "run both from this environment, or `prefect config unset PREFECT_API_URL`"
        raise NoDatabaseError(f"Prefect's server at {api} is version {theirs}, this is {ours}; {ways}")
    return f"Prefect's server at {api} is version {theirs}, as this is"


Outcome = Literal["ran", "skipped"]


def stage_graph(folder: Path) -> tuple[dict[str, set[str]], set[str]]:
    """Stage -> the stages it depends on, and the stages that are not up to date. Half a second, in process.

    One thread at a time: DVC's reader of dvc.yaml fails now and then when two use it.
    """
    from dvc.repo import Repo

    mend(folder)
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
        mend(self.folder)
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


HOPELESS = {2, 75, 130, 143}  # a mistake, a stop, a cancellation: another try would not help


def _may_help(_task: Any, _run: TaskRun, state: State) -> bool:
    error = state.result(raise_on_failure=False)
    return not (isinstance(error, StageError) and error.status in HOPELESS)


@task(task_run_name="{stage}", retries=1, retry_delay_seconds=5, retry_condition_fn=_may_help, cache_policy=NO_CACHE)
def run_stage(stage: str, processes: StageProcesses) -> State:
    """One stage: its output streams into this task's log; `Skipped` when nothing that it reads has changed."""
    logger = get_run_logger()
    if processes.run(stage, logger.info) == "skipped":
        return Completed(name="Skipped", message="nothing that it reads has changed")
    return Completed(message="done")


@task(task_run_name="{stage}", cache_policy=NO_CACHE)
def skip_stage(stage: str) -> State:
    """A stage that DVC knows to be up to date."""
    return Completed(name="Skipped", message=f"{stage}: nothing that it reads has changed")


def _run_name() -> str:
    return str(flow_run.parameters.get("profile") or "params.yaml")


@flow(name="pipeline", flow_run_name=_run_name, log_prints=True)
def pipeline(
    profile: str | None = None,
    overrides: list[str] | None = None,
    from_stage: str | None = None,
    upto: str | None = None,
    confirmed: bool = False,
    own: bool = False,
    stage_hours: float | None = None,
) -> str:
    """Run a profile (None: params.yaml) with `block.key=value` overrides; returns the folder with the results.

    `confirmed`: costly stages are done again without asking; `own`: in a workspace even if nothing differs;
    `stage_hours`: a stage that takes longer saves itself and ends, and the same flow goes on from there.
    """
    workspace = open_workspace(Project.at(), profile, overrides, own=own)
    configure_without_git(workspace.root)
    graph, changed = stage_graph(workspace.root)
    processes = StageProcesses(workspace.root, confirmed, stage_hours)
    with pipeline_lock(workspace):
        futures: dict[str, Any] = {}
        stale: set[str] = set(changed)
        try:
            for stage, needs in part_of(graph, from_stage, upto).items():
                waits = [futures[name] for name in needs]
                if stage in stale or needs & stale:
                    stale.add(stage)
                    futures[stage] = run_stage.submit(stage, processes, wait_for=waits)
                else:
                    futures[stage] = skip_stage.submit(stage, wait_for=waits)
            failed = [stage for stage, future in futures.items() if future.wait() or future.state.is_failed()]
        except BaseException:
            processes.end_all()
            raise
        restore_if_empty(workspace)
    report(workspace)
    if failed:
        raise StageError(f"failed: {', '.join(failed)}; the same flow goes on where it ended")
    print(summary(workspace))
    return str(workspace.root)


def report(project: Project) -> None:
    """What the UI shows of the pipeline: the results table, and where each stage's run lies."""
    table = project.root / "reports" / "table.md"
    lines = [f"MLflow: {mlflow_link(project)}", "", "| stage | run folder | job |", "|---|---|---|"]
    for run in all_runs(project):
        if run.root.resolve() == project.root.resolve():
            lines.append(f"| {run.stage} | `{run.path}` | {run.job_name} |")
    text = (table.read_text(encoding="utf-8") + "\n\n" if table.exists() else "") + "\n".join(lines)
    create_markdown_artifact(key="results", markdown=text, description=f"results of {project.root.name}")
    for curves in sorted((project.root / "reports" / "training").glob("*.png")):
        picture = base64.b64encode(curves.read_bytes()).decode()
        create_image_artifact(f"data:image/png;base64,{picture}", key=f"curves-{curves.stem.replace('_', '-')}")


if __name__ == "__main__":
    with one_line_errors():
        names = [argument for argument in sys.argv[1:] if "=" not in argument]
        given = [argument for argument in sys.argv[1:] if "=" in argument]
        require_prefect()
        open_workspace(Project.at(), names[0] if names else None, given)  # a mistake is told before a server is started
        pipeline(names[0] if names else None, given)
