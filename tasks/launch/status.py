"""Runs as a person watches them, and what of them can be freed."""

import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from llada_core.modeling.folder import CONTENT, base_name, is_adapter
from tasks.errors import StageError
from tasks.folders import has_git, prune_worktrees, read_json, size_of
from tasks.launch.launcher import NoAnswerError, launcher_of
from tasks.launch.workspace import pipeline_lock
from tasks.project import LaunchParams, Project
from tasks.record.registry import client
from tasks.record.runs import RunFolder, all_runs

SECONDS_BETWEEN_LINES = 10.0
_SHOWN = ("loss", "nll", "reward", "rollout_correct", "validation_nll", "validation_loss", "validation_correct")


class TrainingProgress:
    """Call it with every line of metrics.jsonl."""

    def __init__(self, stage: str) -> None:
        self._stage, self._shown = stage, 0.0
        self._bar = self._task = None
        if sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
            self._bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(stage, total=1.0)

    def __call__(self, line: dict[str, Any]) -> None:
        """Show a line; training lines at most every ten seconds where there is no bar."""
        if self._bar is not None and self._task is not None and "share" in line:
            self._bar.start()  # with the first step, not while the model is loaded
            self._bar.update(self._task, completed=line["share"], description=sentence(self._stage, line))
            if line["share"] >= 1:
                self._bar.stop()
            return
        now = time.monotonic()
        if "share" not in line or line["share"] >= 1 or now - self._shown >= SECONDS_BETWEEN_LINES:
            self._shown = now if "share" in line else self._shown
            sys.stderr.write(sentence(self._stage, line) + "\n")
            sys.stderr.flush()


def sentence(stage: str, line: dict[str, Any]) -> str:
    """What one line of metrics.jsonl says."""
    words = [f"{stage} step {line['step']}"]
    if "event" in line:
        words.append(line["event"])
    words += [f"{name.replace('_', ' ')} {line[name]:.4g}" for name in _SHOWN if isinstance(line.get(name), float)]
    if "learning_rate" in line:
        words.append(f"learning rate {line['learning_rate']:.2g}")
    if "tokens_per_second" in line:
        words.append(f"{line['tokens_per_second']:.0f} tokens/s")
    if "share" in line:
        words.append(f"{line['share']:.0%}")
    if 0 < line.get("share", 0) < 1 and line.get("seconds"):
        left = line["seconds"] * (1 - line["share"]) / line["share"]
        words.append(f"{int(left // 60)}:{int(left % 60):02d} left")
    return ", ".join(words)


COLUMNS = ("run", "state", "of", "begun", "took", "job", "step", "loss", "left", "GB")


def line_of(run: RunFolder) -> tuple[str, ...]:
    """One run as it is now: a text for each of COLUMNS; of one whose files are damaged, which and what to do."""
    try:
        return _line(run)
    except (ValueError, KeyError, TypeError, OSError) as error:
        told = " ".join(str(error).split()) if isinstance(error, ValueError | OSError) else f"{run.path} is damaged"
        return (run.key, told, *[""] * (len(COLUMNS) - 2))


def _line(run: RunFolder) -> tuple[str, ...]:
    state = state_of(run)
    last = run.last_metrics()
    size = size_of([run.path / "checkpoints", run.log]) / 2**30
    loss = last.get("loss")
    share = last.get("share")
    step = f"{last['step']}" + (f" ({share:.0%})" if share else "") if "step" in last else ""
    shown = f"{loss:.4g}" if loss else ""
    begun = time.strftime("%m-%d %H:%M", time.localtime((run.path / "request.json").stat().st_mtime))
    took = f"{run.seconds / 60:.1f} min" if run.seconds is not None else ""
    left = _left(run, last, state)
    return run.key, state, run.title, begun, took, run.job_name, step, shown, left, f"{size:.2f}"


def state_of(run: RunFolder) -> str:
    """done, running, stopped (by request), failed, or unknown while Slurm does not answer."""
    if run.succeeded:
        return "done"
    try:
        state = launcher_of(run, LaunchParams(kind="local")).state(run)
    except (NoAnswerError, ValueError):
        return "unknown"
    if state != "gone":
        return "running" if state == "alive" else "unknown"
    stopped = (run.path / "CANCELLED").exists() or run.exit_status in (75, 143)
    return "stopped" if stopped or run.exit_status is None else f"failed ({run.exit_status})"


def _left(run: RunFolder, last: dict[str, float], state: str) -> str:
    share, rate = last.get("share"), last.get("steps_per_second")
    if state != "running" or not share or not rate:
        return ""
    seconds = last["step"] / share * (1 - share) / rate - (time.time() - last["time"])
    return f"{max(0, seconds) / 60:.0f} min"


@dataclass(frozen=True)
class Candidate:
    """A folder that could go."""

    path: Path
    why: str
    gigabytes: float


def candidates(project: Project) -> list[Candidate]:
    """Checkpoints of finished runs, workspaces in which nothing runs, weights without a version."""
    found = [
        (run.path / "checkpoints", "checkpoints of a finished run")
        for run in all_runs(project)
        if run.succeeded and (run.path / "checkpoints").exists()
    ]
    busy = {run.root.resolve() for run in all_runs(project) if state_of(run) in ("running", "unknown")}
    spaces = [path.parent for path in sorted((project.home / "workspaces").glob("*/workspace.json"))]
    found += [(path, f"workspace of {_profile(path)}") for path in spaces if path.resolve() not in busy]
    found += [(path, "no registered version and no adapter points to it") for path in _orphans(project)]
    return [Candidate(path, why, size_of([path]) / 2**30) for path, why in found]


def remove(project: Project, chosen: list[Candidate]) -> None:
    """Free them; raises `StageError` when a workspace turns out to be in use."""
    for item in chosen:
        if (item.path / "workspace.json").exists():
            with pipeline_lock(Project(item.path)):
                shutil.rmtree(item.path)
        else:
            shutil.rmtree(item.path)
    if has_git(project.root):
        prune_worktrees(project.root, project.home / "workspaces")


def _profile(workspace: Path) -> str:
    return read_json(workspace / "workspace.json")["profile"] or "params.yaml with overrides"


def _orphans(project: Project) -> list[Path]:
    stored = [path for path in (project.store).glob("*") if path.is_dir()]
    if not stored:
        return []
    try:
        used = {
            version.tags.get("content_hash") for version in client(project).search_model_versions(max_results=10_000)
        }
    except OSError as error:
        raise StageError(f"MLflow does not answer, so nobody knows which weights are in use: {error}") from None
    adapters = [store for store in stored if store.name in used]
    made = ("models/*", "workspaces/*/models/*", "runs/*/tree/models/*", "runs/*/adapter")
    adapters += [path for pattern in made for path in project.home.glob(pattern)]
    for folder in adapters:  # grows: a base may be an adapter itself
        if is_adapter(folder) and (name := base_name(folder)).startswith(CONTENT):
            base = project.store / name.removeprefix(CONTENT)
            if base.name not in used:
                used.add(base.name)
                adapters.append(base)
    return [path for path in stored if path.name not in used]
