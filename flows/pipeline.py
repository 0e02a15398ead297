"""The pipeline as a Prefect flow: DVC's graph, each stage a task that runs, is skipped, fails or is tried again."""

import base64
import sys
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_image_artifact, create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.runtime import flow_run
from prefect.states import Completed

from flows.server import require_prefect
from flows.walk import StageProcesses, part_of, stage_graph
from tasks.dvc_settings import configure_without_git
from tasks.errors import StageError, one_line_errors
from tasks.pipeline import restore_lost_records, summary
from tasks.runs import all_runs
from tasks.tracking import mlflow_link
from tasks.workspace import open_workspace, pipeline_lock

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
    workspace = open_workspace(Path.cwd(), profile, overrides, own=own)
    configure_without_git(workspace.path)
    graph, changed = stage_graph(workspace.path)
    processes = StageProcesses(workspace.path, confirmed, stage_hours)
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
        restore_lost_records(workspace.path)
    report(workspace.path)
    if failed:
        raise StageError(f"failed: {', '.join(failed)}; the same flow goes on where it ended")
    print(summary(workspace))
    return str(workspace.path)


def report(folder: Path) -> None:
    """What the UI shows of the pipeline: the results table, and where each stage's run lies."""
    table = folder / "reports" / "table.md"
    lines = [f"MLflow: {mlflow_link(folder)}", "", "| stage | run folder | job |", "|---|---|---|"]
    for run in all_runs(folder):
        if run.root.resolve() == folder.resolve():
            lines.append(f"| {run.stage} | `{run.path}` | {run.job_name} |")
    text = (table.read_text(encoding="utf-8") + "\n\n" if table.exists() else "") + "\n".join(lines)
    create_markdown_artifact(key="results", markdown=text, description=f"results of {folder.name}")
    for curves in sorted((folder / "reports" / "training").glob("*.png")):
        picture = base64.b64encode(curves.read_bytes()).decode()
        create_image_artifact(f"data:image/png;base64,{picture}", key=f"curves-{curves.stem.replace('_', '-')}")


if __name__ == "__main__":
    with one_line_errors():
        names = [argument for argument in sys.argv[1:] if "=" not in argument]
        given = [argument for argument in sys.argv[1:] if "=" in argument]
        require_prefect()
        open_workspace(Path.cwd(), names[0] if names else None, given)  # a mistake is told before a server is started
        pipeline(names[0] if names else None, given)
