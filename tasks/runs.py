"""The run folder: the only state of a launched stage, named by a fingerprint of what determines its result.

    runs/<stage>-<fingerprint>/
      request.json   what is to be made (stage, parameters, hashes of code and inputs); written once
      tree/          the snapshot that the job runs in: its own copy of the code, params.yaml, hard links to the inputs;
                     outputs are made here and published when they are complete
      job.json       who is at it: launcher, id; log.txt, exit, STOP (a wish to save and end), CANCELLED
      checkpoints/   metrics.jsonl, samples.jsonl: the training loop's
      SUCCESS        the only proof of success, written as the program's last act

Knows neither how a job is started nor what a stage does.
"""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock

from llada_core.config.base import ConfigError, flat, read_yaml, with_overrides
from llada_core.config.params import Params
from tasks.folders import content_hash, files_in, hash_of, link_into, read_json, write_json, write_text
from tasks.graph import CODE, Stage, chosen

FINGERPRINT_DIGITS = 16
MADE = ("data/", "models/", "reports/")  # made by stages, which replace and never change


def home(root: Path) -> Path:
    """The folder that holds runs/, store/ and mlflow.db: the checkout, also for its workspaces (`LLADAFLOW_HOME`)."""
    if given := os.environ.get("LLADAFLOW_HOME"):
        return Path(given)
    note = root / "workspace.json"
    return Path(read_json(note)["home"]) if note.exists() else root.resolve()


def commit_of(root: Path) -> str:
    """The commit that a checkout is at, `+changes` if tracked files differ from it; "no git" outside of git."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    commit = git("rev-parse", "HEAD")
    return (commit + ("+changes" if git("status", "--porcelain", "-uno") else "")) if commit else "no git"


@dataclass(frozen=True)
class RunFolder:
    """One run folder; every property reads the disk anew."""

    path: Path

    @property
    def key(self) -> str:
        return self.path.name

    @property
    def tree(self) -> Path:
        return self.path / "tree"

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    @property
    def log_size(self) -> int:
        return self.log.stat().st_size if self.log.exists() else 0

    @property
    def succeeded(self) -> bool:
        return (self.path / "SUCCESS").exists()

    @property
    def request(self) -> dict[str, Any]:
        return read_json(self.path / "request.json")

    @property
    def stage(self) -> str:
        return self.request["stage"]

    @property
    def job(self) -> dict[str, Any] | None:
        """What the launcher wrote down of the last job, None before the first."""
        path = self.path / "job.json"
        return read_json(path) if path.exists() else None

    @property
    def job_name(self) -> str:
        """The last job in words: `slurm 123`, `local 4567`, `inline`."""
        job = self.job
        return f"{job['launcher']} {job.get('id', job.get('pid'))}" if job else "inline"

    @property
    def exit_status(self) -> int | None:
        path = self.path / "exit"
        text = path.read_text().strip() if path.exists() else ""
        return int(text) if text else None

    @property
    def seconds(self) -> float | None:
        """What the run cost, as its program measured; None before success."""
        return read_json(self.path / "SUCCESS")["seconds"] if self.succeeded else None

    def succeed(self, seconds: float) -> None:
        """The program's last act: what it wrote stays for good."""
        write_json(self.path / "SUCCESS", {"seconds": round(seconds, 1), "time": time.time()})

    def forget_success(self) -> None:
        """Let the stage be done again although nothing that determines it has changed."""
        (self.path / "SUCCESS").unlink(missing_ok=True)

    def last_metrics(self) -> dict[str, Any]:
        """The newest line of metrics.jsonl; empty before the first."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return {}
        with path.open("rb") as stream:
            stream.seek(max(0, path.stat().st_size - 65536))
            lines = stream.read().split(b"\n")[:-1]
        return json.loads(lines[-1]) if lines and lines[-1].startswith(b"{") else {}

    def publish(self, root: Path) -> None:
        """Put the finished outputs where DVC expects them, each all at once."""
        for out in self.request["outs"]:
            if (self.tree / out).exists():
                link_into(self.tree / out, root / out)


def material(root: Path, stage: Stage, params: dict[str, Any]) -> dict[str, Any]:
    """What determines the result of a stage: hashes of the code that runs and of the inputs, the parameters read."""
    files = [file for path in stage.code for file in files_in(root / path)]
    code = {file.relative_to(root).as_posix(): content_hash(file) for file in files}
    inputs = {path: content_hash(root / path) for path in stage.inputs}
    return {"stage": stage.name, "params": chosen(params, stage.params), "code": code, "inputs": inputs}


def fingerprint(values: dict[str, Any]) -> str:
    """The name of a result: 16 hex digits. Where an input from outside the project lies does not enter."""
    inputs = [["" if os.path.isabs(path) else path, digest] for path, digest in sorted(values["inputs"].items())]
    return hash_of(values | {"inputs": sorted(inputs)})[:FINGERPRINT_DIGITS]


def open_run(root: Path, stage: Stage, params: dict[str, Any]) -> RunFolder:
    """The run folder of what `stage` would make now; made, with its snapshot, if there is none."""
    values = material(root, stage, params)
    key = f"{stage.name.replace('@', '-')}-{fingerprint(values)}"
    run = RunFolder(home(root) / "runs" / key)
    run.path.mkdir(parents=True, exist_ok=True)
    with FileLock(run.path / ".lock"):
        if not (run.path / "request.json").exists():
            _snapshot(root, stage, params, run.tree)
            origin = {"root": str(root.resolve()), "outs": list(stage.outs), "all_params": params}
            origin["source"] = hash_of([content_hash(root / package) for package in sorted(CODE)])
            write_json(run.path / "request.json", values | origin)
    return run


def _snapshot(root: Path, stage: Stage, params: dict[str, Any], tree: Path) -> None:
    fresh = tree.with_name("tree.new")
    for old in (fresh, tree):
        shutil.rmtree(old, ignore_errors=True)
    for package in CODE:
        shutil.copytree(root / package, fresh / package, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    shutil.copy2(root / "dvc.yaml", fresh / "dvc.yaml")
    for path in (p for p in stage.inputs if not Path(p).is_absolute()):
        if path.startswith(MADE):
            link_into(root / path, fresh / path)
        else:  # a person's file may be changed in place
            copy = shutil.copytree if (root / path).is_dir() else shutil.copy2
            (fresh / path).parent.mkdir(parents=True, exist_ok=True)
            copy(root / path, fresh / path)
    write_text(fresh / "params.yaml", yaml.safe_dump(params, sort_keys=False, allow_unicode=True))
    os.replace(fresh, tree)


def all_runs(root: Path) -> Iterator[RunFolder]:
    """Every run folder, the newest first."""
    folders = (home(root) / "runs").glob("*/request.json")
    for file in sorted(folders, key=lambda f: f.stat().st_mtime, reverse=True):
        yield RunFolder(file.parent)


def find_run(root: Path, name: str) -> RunFolder:
    """A run by its key, the beginning of it, or its stage's name (then the newest); raises `ConfigError`."""
    runs = list(all_runs(root))
    found = [r for r in runs if r.key == name] or [
        r for r in runs if (name and r.key.startswith(name)) or r.stage == name
    ]
    if not found:
        known = ", ".join(r.key for r in runs[:5]) or "there is none yet"
        raise ConfigError(f"no run {name!r}; the newest: {known}")
    return found[0]


def previous_run(root: Path, run: RunFolder) -> RunFolder | None:
    """The newest successful run of the same stage in the same folder that is not `run`."""
    stage, here = run.stage, str(root.resolve())
    others = (r for r in all_runs(root) if r.key != run.key and r.succeeded)
    return next((r for r in others if r.stage == stage and r.request["root"] == here), None)


def differences(new: RunFolder, old: RunFolder) -> list[str]:
    """What determines `new` and is not as it was for `old`, a short line each."""
    lines = []
    for part in ("params", "code", "inputs"):
        now, then = flat(new.request[part]), flat(old.request[part])
        for key in sorted(now.keys() | then.keys()):
            if now.get(key) != then.get(key):
                values = f": {then.get(key)} -> {now.get(key)}" if part == "params" else ""
                lines.append(f"{part[:-1] if part != 'code' else part} {key}{values}")
    return lines


def stage_params(root: Path, overrides: list[str]) -> dict[str, Any]:
    """The whole of params.yaml as plain values, checked, with overrides; defaults of absent keys are not filled in."""
    values = with_overrides(read_yaml(root / "params.yaml"), overrides)
    Params.parse(values, "params.yaml")
    return values
