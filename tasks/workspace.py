"""A folder of its own for every run of a profile, with overrides or by deployment: workspaces/<name>-<hash>/.

It is a git worktree of what was submitted (a copy where there is no git), with params.yaml written from the profile
and dvc.yaml pruned to the profile's stages; the DVC cache, run folders, store and MLflow are those of the checkout. The
same request finds the same workspace again. Knows neither DVC's Python side nor what stages do.
"""

import configparser
import fcntl
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llada_core.config.base import ConfigError, nearest, read_yaml, with_overrides
from llada_core.config.params import Params
from tasks.folders import content_hash, files_in, hash_of, write_json, write_text
from tasks.graph import prune, with_sources
from tasks.runs import home

LEFT_OUT = ("data", "models", "runs", "store", "workspaces", "mlartifacts", "mlruns", "build", "dist", "__pycache__")


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
    commit, tree = _submitted(root)
    determining = {key: value for key, value in values.items() if key != "launch"}
    place = base / "workspaces" / f"{values['name']}-{hash_of([determining, tree])[:8]}"
    if not (place / "workspace.json").exists():
        with _holding(base / "workspaces" / f".{place.name}.lock", f"making {place}"):
            _make(root, place, commit, values)
            note = {"home": str(base), "profile": profile, "overrides": overrides or [], "commit": commit}
            write_json(place / "workspace.json", note | {"time": time.time()})
    write_text(place / "params.yaml", yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    return Workspace(place)


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


def _submitted(root: Path) -> tuple[str | None, str]:
    """What was submitted: a commit that holds the tracked files as they are now, and the hash of its content."""
    if not (root / ".git").exists():
        files = [file for file in _copied(root) if file.suffix in (".py", ".yaml", ".jinja", ".json")]
        return None, hash_of([[str(file.relative_to(root)), content_hash(file)] for file in files])
    commit = git(root, "stash", "create") or git(root, "rev-parse", "HEAD")
    return commit, git(root, "rev-parse", f"{commit}^{{tree}}")


def _make(root: Path, place: Path, commit: str | None, values: dict[str, Any]) -> None:
    if commit is None:
        shutil.rmtree(place, ignore_errors=True)
        for file in _copied(root):
            (place / file.relative_to(root)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, place / file.relative_to(root))
    else:
        git(root, "worktree", "prune")
        if place.exists():  # a making that was cut short
            git(root, "worktree", "remove", "--force", str(place))
        git(root, "worktree", "add", "--quiet", "--detach", str(place), commit)
    spec = prune(read_yaml(place / "dvc.yaml"), values)
    write_text(place / "dvc.yaml", yaml.safe_dump(spec, sort_keys=False, width=120))
    _configure_dvc(root, place)


def _configure_dvc(root: Path, place: Path) -> None:
    """The checkout's own settings (remotes, cache), with the cache at the same place."""
    settings = configparser.ConfigParser(interpolation=None)
    settings.read(root / ".dvc" / "config.local")
    given = settings.get("cache", "dir", fallback="cache")
    _write(settings, place, "cache", "dir", str((root.resolve() / ".dvc" / given).resolve()))


def configure_without_git(root: Path) -> None:
    """Tell DVC that there is no git here (a tarball): without it every command fails."""
    settings = configparser.ConfigParser(interpolation=None)
    settings.read(root / ".dvc" / "config.local")
    if not (root / ".git").exists() and not settings.has_option("core", "no_scm"):
        _write(settings, root, "core", "no_scm", "true")


def _write(settings: configparser.ConfigParser, root: Path, section: str, key: str, value: str) -> None:
    settings.read_dict({section: {key: value}})
    with (root / ".dvc" / "config.local").open("w") as file:
        settings.write(file)


def _copied(root: Path) -> list[Path]:
    """The files of a checkout without git that are its own: nothing hidden but .dvc's settings, nothing made."""
    hidden = [root / ".dvcignore", root / ".dvc" / "config"]
    entries = [p for p in sorted(root.iterdir()) if p.name not in LEFT_OUT and not p.name.startswith(".")]
    return [file for entry in [*hidden, *entries] if entry.exists() for file in files_in(entry)]


def git(root: Path, *arguments: str) -> str:
    """What a git command prints; raises `ConfigError` with git's own words."""
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"git {' '.join(arguments[:2])}: {' '.join(done.stderr.split())}")
    return done.stdout.strip()
