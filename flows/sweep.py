"""A grid or list of overrides over one stage: every point a workspace and jobs of its own, ranked at the end."""

import itertools
import json
import threading
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE

from flows.walk import StageProcesses, part_of, stage_graph
from llada_core.config.base import ConfigError
from tasks.folders import read_json
from tasks.graph import lookup
from tasks.tracking import gather, send_pending
from tasks.workspace import Workspace, open_workspace

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
def trial(overrides: list[str], processes: StageProcesses, stage: str, room: threading.Semaphore) -> None:
    """Bring `stage`, and what it needs, up to date in the workspace of one point."""
    with room:
        graph, _ = stage_graph(processes.folder)
        for name in part_of(graph, None, stage):
            processes.run(name, get_run_logger().info)


@flow(name="sweep", flow_run_name="{stage}", log_prints=True)
def sweep(stage: str, grid: Grid, metric: str, profile: str | None = None, at_once: int = 2) -> list[Row]:
    """Run a grid (or a list of lists of overrides) up to `stage` and rank it by `metric`; a point that fails is ranked last and stops nobody.

    `metric`: a file of reports/ without .json, a colon, a dotted key (`training/sft:loss`); `-` before it ranks
    downwards, as for a score.
    """
    room = threading.Semaphore(at_once)
    workspaces = [(overrides, open_workspace(Path.cwd(), profile, overrides)) for overrides in points(grid)]
    runs = [(overrides, StageProcesses(workspace.path, confirmed=True)) for overrides, workspace in workspaces]
    try:
        for future in [trial.submit(overrides, processes, stage, room) for overrides, processes in runs]:
            future.wait()
    except BaseException:
        for _, processes in runs:
            processes.end_all()
        raise
    rows = [_row(overrides, workspace, metric) for overrides, workspace in workspaces]
    sign = -1.0 if metric.startswith("-") else 1.0
    ranked = sorted(rows, key=lambda row: float("inf") if row["score"] is None else sign * row["score"])
    create_table_artifact(key="sweep", table=ranked, description=f"{stage} by {metric}")
    gather(Path.cwd(), f"sweep of {stage} by {metric}", ranked)
    for row in ranked:
        print(f"{row['score']}  {row['overrides']}  {row['folder']}")
    return ranked


def _row(overrides: list[str], workspace: Workspace, metric: str) -> Row:
    send_pending(workspace.path)
    name, _, key = metric.removeprefix("-").partition(":")
    path = workspace.path / "reports" / f"{name}.json"
    score = lookup(read_json(path), key) if path.exists() else None
    return {"overrides": " ".join(overrides), "score": score, "folder": str(workspace.path)}
