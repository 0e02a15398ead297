"""What could be freed on disk, and freeing it. Never a running job's folder, never weights that a version points to."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from llada_core.modeling.folder import CONTENT, base_name, is_adapter
from tasks.errors import StageError
from tasks.folders import has_git, prune_worktrees, read_json, size_of
from tasks.launch.workspace import Workspace, pipeline_lock
from tasks.record.registry import client
from tasks.record.runs import all_runs, home
from tasks.status import state_of


@dataclass(frozen=True)
class Candidate:
    """A folder that could go."""

    path: Path
    why: str
    gigabytes: float


def candidates(root: Path) -> list[Candidate]:
    """Checkpoints of finished runs, workspaces in which nothing runs, weights without a version."""
    found = [
        (run.path / "checkpoints", "checkpoints of a finished run")
        for run in all_runs(root)
        if run.succeeded and (run.path / "checkpoints").exists()
    ]
    busy = {run.root.resolve() for run in all_runs(root) if state_of(run) in ("running", "unknown")}
    spaces = [path.parent for path in sorted((home(root) / "workspaces").glob("*/workspace.json"))]
    found += [(path, f"workspace of {_profile(path)}") for path in spaces if path.resolve() not in busy]
    found += [(path, "no registered version and no adapter points to it") for path in _orphans(root)]
    return [Candidate(path, why, size_of([path]) / 2**30) for path, why in found]


def remove(root: Path, chosen: list[Candidate]) -> None:
    """Free them; raises `StageError` when a workspace turns out to be in use."""
    for item in chosen:
        if (item.path / "workspace.json").exists():
            with pipeline_lock(Workspace(item.path)):
                shutil.rmtree(item.path)
        else:
            shutil.rmtree(item.path)
    if has_git(root):
        prune_worktrees(root, home(root) / "workspaces")


def _profile(workspace: Path) -> str:
    return read_json(workspace / "workspace.json")["profile"] or "params.yaml with overrides"


def _orphans(root: Path) -> list[Path]:
    stored = [path for path in (home(root) / "store").glob("*") if path.is_dir()]
    if not stored:
        return []
    try:
        used = {version.tags.get("content_hash") for version in client(root).search_model_versions(max_results=10_000)}
    except OSError as error:
        raise StageError(f"MLflow does not answer, so nobody knows which weights are in use: {error}") from None
    adapters = [store for store in stored if store.name in used]
    made = ("models/*", "workspaces/*/models/*", "runs/*/tree/models/*", "runs/*/adapter")
    adapters += [path for pattern in made for path in home(root).glob(pattern)]
    for folder in adapters:  # grows: a base may be an adapter itself
        if is_adapter(folder) and (name := base_name(folder)).startswith(CONTENT):
            base = home(root) / "store" / name.removeprefix(CONTENT)
            if base.name not in used:
                used.add(base.name)
                adapters.append(base)
    return [path for path in stored if path.name not in used]
