"""Runs as a person watches them, and what of them can be freed."""

import shutil
import sys
import time
from dataclasses import dataclass
from datetime import datetime
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


def facts_of(run: RunFolder) -> dict[str, Any]:
    """One run as it is now, for programs: a value for each of COLUMNS, and `share` of the whole; None where there is none.

    `begun` is ISO 8601 with its offset, `took` and `left` are seconds. Of a run whose files are damaged `state` says which
    and what to do.
    """
    facts: dict[str, Any] = dict.fromkeys((*COLUMNS, "share")) | {"run": run.key}
    try:
        return facts | _facts(run)
    except (ValueError, KeyError, TypeError, OSError) as error:
        told = " ".join(str(error).split()) if isinstance(error, ValueError | OSError) else f"{run.path} is damaged"
        return facts | {"state": told}


def _facts(run: RunFolder) -> dict[str, Any]:
    state, last = state_of(run), run.last_metrics()
    begun = datetime.fromtimestamp((run.path / "request.json").stat().st_mtime).astimezone()
    return {
        "state": state,
        "of": run.title,
        "begun": begun.isoformat(timespec="seconds"),
        "took": run.seconds,
        "job": run.job_name,
        **{name: last.get(name) for name in ("step", "share", "loss")},
        "left": _left(last, state),
        "GB": size_of([run.path / "checkpoints", run.log]) / 2**30,
    }


def line_of(run: RunFolder) -> tuple[str, ...]:
    """One run as it is now, for people: a text for each of COLUMNS."""
    facts = facts_of(run)
    share = f" ({facts['share']:.0%})" if facts["share"] else ""
    texts = {
        "begun": f"{facts['begun'] or '':.16}"[5:].replace("T", " "),
        "took": "" if facts["took"] is None else f"{facts['took'] / 60:.1f} min",
        "step": "" if facts["step"] is None else f"{facts['step']}{share}",
        "loss": f"{facts['loss']:.4g}" if facts["loss"] else "",
        "left": "" if facts["left"] is None else f"{facts['left'] / 60:.0f} min",
        "GB": "" if facts["GB"] is None else f"{facts['GB']:.2f}",
    }
    return tuple(texts[name] if name in texts else facts[name] or "" for name in COLUMNS)


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


def _left(last: dict[str, float], state: str) -> float | None:
    share, rate = last.get("share"), last.get("steps_per_second")
    if state != "running" or not share or not rate:
        return None
    return max(0.0, last["step"] / share * (1 - share) / rate - (time.time() - last["time"]))


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
