"""A folder of its own for every run of a profile, with overrides or by deployment: workspaces/<name>-<hash>/.

It is a git worktree of what was submitted (a copy where there is no git), with params.yaml written from the profile
and dvc.yaml pruned to the profile's stages; the DVC cache, run folders, store and MLflow are those of the checkout. The
same request finds the same workspace again. Knows neither DVC's Python side nor what stages do.
"""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock

from llada_core.config.params import Params
from llada_core.settings import ConfigError, nearest, read_yaml, with_overrides
from tasks.dvc_settings import configure_workspace
from tasks.folders import add_worktree, copied, hash_of, mend_worktree, submitted, write_json, write_text
from tasks.graph import prune, with_sources
from tasks.record.runs import home

PATIENCE = 600.0  # seconds for another process to make the same workspace


@dataclass(frozen=True)
class Workspace:
    """Where a pipeline runs."""

    path: Path

    @property
    def params(self) -> dict[str, Any]:
        return read_yaml(self.path / "params.yaml")


def open_workspace(
    root: Path, profile: str | None = None, overrides: list[str] | None = None, *, own: bool = False
) -> Workspace:
    """The checkout itself for its own params.yaml, else the workspace of a profile and overrides, made if need be.

    `own`: a workspace in any case. Raises `ConfigError` for an unknown profile or one that does not make sense.
    """
    if profile is None and not overrides and not own:
        Params.load(root / "params.yaml")
        return Workspace(root.resolve())
    values = with_overrides(read_yaml(profile_file(root, profile)), overrides or [])
    params = Params.parse(values, profile or "params.yaml")
    if params.evaluate is not None:  # dvc.yaml names its keys one by one, and DVC wants every named key in the file
        values["evaluate"] = params.evaluate.model_dump(mode="json") | values["evaluate"]
    values = with_sources(values, root)
    base = home(root)
    commit, tree = submitted(root)
    place = base / "workspaces" / f"{values['name']}-{hash_of([_determining(values, base), tree])[:8]}"
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(place.with_name(f".{place.name}.lock"), timeout=PATIENCE):
        if not (place / "workspace.json").exists():
            _make(root, place, commit)
            note = {"home": str(base), "profile": profile, "overrides": overrides or [], "commit": commit}
            write_json(place / "workspace.json", note | {"time": time.time()})
        _settle(root, place, values)
    return Workspace(place)


def _determining(values: dict[str, Any], base: Path) -> dict[str, Any]:
    """What names a workspace: all but how it is launched, with models of the project told from where it lies."""
    kept = {key: value for key, value in values.items() if key != "launch"}
    inside = json.dumps(f"{base}/", ensure_ascii=False)[1:-1]
    return json.loads(json.dumps(kept, ensure_ascii=False).replace(inside, ""))


def _settle(root: Path, place: Path, values: dict[str, Any]) -> None:
    """Write what a workspace holds of its place and of its models' places: it, or the project, may have moved."""
    if home(place).resolve() != home(root).resolve():
        raise ConfigError(f"{place} belongs to {home(place)}; remove the link {place.parent}, which leads there")
    write_text(place / "params.yaml", yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    spec = yaml.safe_dump(prune(read_yaml(root / "dvc.yaml"), values), sort_keys=False, width=120)
    if not (place / "dvc.yaml").exists() or (place / "dvc.yaml").read_text(encoding="utf-8") != spec:
        write_text(place / "dvc.yaml", spec)
    configure_workspace(root, place)
    if (place / ".git").is_file():
        mend_worktree(root, place)


def profile_file(root: Path, profile: str | None) -> Path:
    """params.yaml, a file of profiles/ by name, or any YAML file; raises `ConfigError` with the nearest name."""
    if profile is None:
        return root / "params.yaml"
    for path in (root / "profiles" / f"{profile}.yaml", Path(profile)):
        if path.is_file():
            return path
    known = [path.stem for path in sorted((root / "profiles").glob("*.yaml"))]
    raise ConfigError(f"no profile {profile!r}{nearest(profile, known)}")


@contextmanager
def pipeline_lock(workspace: Workspace) -> Iterator[None]:
    """One pipeline at a time in a folder; raises `ConfigError` that names who is at it."""
    with _holding(workspace.path / ".dvc" / "tmp" / "lladaflow.lock", f"running the pipeline in {workspace.path}"):
        yield


@contextmanager
def _holding(path: Path, doing: str) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = json.loads(lock.read() or "{}")
            who = f"process {holder.get('pid', '?')}, since {holder.get('since', '?')}"
            ways = "`llada logs -f` follows it, `llada status` shows its runs"
            raise ConfigError(f"another process is {doing} ({who}); {ways}") from None
        lock.truncate(0)
        lock.write(json.dumps({"pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}))
        lock.flush()
        yield


def _make(root: Path, place: Path, commit: str | None) -> None:
    if commit is None:
        shutil.rmtree(place, ignore_errors=True)
        for file in copied(root):
            (place / file.relative_to(root)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, place / file.relative_to(root))
    else:
        add_worktree(root, place, commit)
