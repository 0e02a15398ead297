"""A grid or list of overrides over one stage: every point a workspace and jobs of its own, ranked at the end."""

import itertools
import json
import threading
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE

from flows.pipeline import StageProcesses, part_of, stage_graph
from llada_core.settings import ConfigError
from tasks.errors import StageError
from tasks.folders import read_json
from tasks.graph import lookup
from tasks.launch.workspace import open_workspace
from tasks.project import Project
from tasks.record.tracking import gather, send_pending

Grid = dict[str, list[Any]] | list[list[str]]
Row = dict[str, Any]
"""One point: its overrides, where it ran, and what it scored."""


def points(grid: Grid) -> list[list[str]]:
    """Every combination as overrides: {"sft.learning_rate": [1e-3, 3e-3], "seed": [0, 1]} gives four; a list is kept."""
    if isinstance(grid, list) and grid:
        return grid
    if isinstance(grid, list) or not grid or not all(grid.values()):
        raise ConfigError("a sweep needs at least one value for each key, such as {sft.learning_rate: [1e-3, 3e-3]}")
    return [
        [f"{key}={json.dumps(value)}" for key, value in zip(grid, values, strict=True)]
        for values in itertools.product(*grid.values())
    ]


@task(task_run_name="{overrides}", cache_policy=NO_CACHE)
def trial(overrides: list[str], processes: StageProcesses, stages: list[str], room: threading.Semaphore) -> None:
    """Bring these stages up to date in the workspace of one point."""
    with room:
        for name in stages:
            processes.run(name, get_run_logger().info)


@flow(name="sweep", flow_run_name="{stage}", log_prints=True)
def sweep(stage: str, grid: Grid, metric: str, profile: str | None = None, at_once: int = 2) -> list[Row]:
    """Run a grid (or a list of lists of overrides) up to `stage` and rank it by `metric`; a point that fails is ranked last and stops nobody.

    `metric`: a file of reports/ without .json, a colon, a dotted key (`training/sft:loss`); `-` before it ranks
    downwards, as for a score. Raises `StageError` when no point has it.
    """
    room = threading.Semaphore(at_once)
    workspaces = [(overrides, open_workspace(Project.at(), profile, overrides)) for overrides in points(grid)]
    # Here and not in the tasks: DVC cannot read a dvc.yaml in two threads at once.
    stages = [list(part_of(stage_graph(workspace.root)[0], None, stage)) for _, workspace in workspaces]
    processes = [StageProcesses(workspace.root, confirmed=True) for _, workspace in workspaces]
    try:
        submitted = zip(workspaces, processes, stages, strict=True)
        futures = [trial.submit(overrides, each, needed, room) for (overrides, _), each, needed in submitted]
        errors = [str(f.state.result(raise_on_failure=False)) for f in futures if f.wait() or f.state.is_failed()]
    except BaseException:
        for each in processes:
            each.end_all()
        raise
    rows = [_row(overrides, workspace, metric) for overrides, workspace in workspaces]
    sign = -1.0 if metric.startswith("-") else 1.0
    ranked = sorted(rows, key=lambda row: float("inf") if row["score"] is None else sign * row["score"])
    create_table_artifact(key="sweep", table=ranked, description=f"{stage} by {metric}")
    gather(Project.at(), f"sweep of {stage} by {metric}", ranked)
    for row in ranked:
        print(f"{row['score']}  {row['overrides']}  {row['folder']}")
    if ranked[0]["score"] is None:
        why = "; ".join(errors) or f"{ranked[0]['folder']}/reports has what there is"
        raise StageError(f"no point has {metric}: {why}")
    return ranked


def _row(overrides: list[str], workspace: Project, metric: str) -> Row:
    send_pending(workspace)
    name, _, key = metric.removeprefix("-").partition(":")
    path = workspace.root / "reports" / f"{name}.json"
    score = lookup(read_json(path), key) if path.exists() else None
    return {"overrides": " ".join(overrides), "score": score, "folder": str(workspace.root)}
