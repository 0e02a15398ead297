"""The run folder, named by what determines its result, and the request that a run is made from."""

import fcntl
import math
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock

from llada_core.files import complete, parsed
from llada_core.settings import ConfigError, flat, read_yaml, with_overrides
from llada_core.training.params import TrainingParams
from tasks.folders import content_hash, files_in, hash_of, link_into, read_json, write_json, write_text
from tasks.graph import CODE, StageNode, chosen
from tasks.project import Params, Project
from tasks.record.registry import model_hash
from tasks.stages import TRAINING_STAGES

FINGERPRINT_DIGITS = 16
DETERMINING = ("stage", "settings", "code", "inputs")
StageRequest = dict[str, Any]
"""The content of request.json."""


def request_of(project: Project, stage: StageNode, params: dict[str, Any]) -> StageRequest:
    """What `stage` would make now: hashes of the code that runs and of the inputs, the settings, and their origin.

    `settings` determine the result. They are told with their defaults, so that one spelled out is the same one.
    `free` are those that the configuration marks `NOT_IN_FINGERPRINT`; `params` are both, as a person wrote them.
    """
    files = [file for path in stage.code for file in files_in(project.root / path)]
    parsed = Params.parse(params, "params.yaml")
    determining = parsed.determining()
    settings = chosen(determining, stage)
    told = flat(chosen(parsed.model_dump(mode="json", by_alias=True), stage))
    source = hash_of([content_hash(project.root / package) for package in sorted(CODE)])
    pipeline = {key: value for key, value in determining.items() if key != "launch"}
    request = {
        "stage": stage.name,
        "settings": settings,
        "free": {key: value for key, value in told.items() if key not in flat(settings)},
        "params": chosen(params, stage),
        "code": {file.relative_to(project.root).as_posix(): content_hash(file) for file in files},
        "inputs": {path: model_hash(project.root / path) for path in stage.inputs},
        "outs": list(stage.outs),
        "root": str(project.root.resolve()),
        "home": str(project.home.resolve()),
        "source": source,
        "pipeline": hash_of([pipeline, source])[:FINGERPRINT_DIGITS],
        "all_params": params,
    }
    return request | {"any_length": fingerprint(_of_any_length(request))}


def fingerprint(request: StageRequest) -> str:
    """The name of a result: 16 hex digits. Where an input from outside the project lies does not enter."""
    inputs = [["" if os.path.isabs(path) else path, digest] for path, digest in sorted(request["inputs"].items())]
    settings = dict(request["settings"])
    if models := settings.get("evaluate.models"):  # a label stands in tables; what it labels is told by its content
        named = [name.partition("=") for name in models]
        settings["evaluate.models"] = [[label, request["inputs"].get(folder, "")] for label, _, folder in named]
    values = {key: request[key] for key in DETERMINING} | {"settings": settings, "inputs": sorted(inputs)}
    return hash_of(values)[:FINGERPRINT_DIGITS]


def training_block(request: StageRequest) -> dict[str, Any] | None:
    """The settings of a training stage; None for any other stage."""
    block = request["settings"].get(request["stage"])
    return block if request["stage"] in TRAINING_STAGES and isinstance(block, dict) else None


def with_block(request: StageRequest, block: dict[str, Any]) -> StageRequest:
    """The request of a training stage with other settings."""
    return request | {"settings": request["settings"] | {request["stage"]: block}}


def _of_any_length(request: StageRequest) -> StageRequest:
    """A request with nothing in it that says how long training is: the same for all that are one run, cut or extended."""
    block = training_block(request)
    if block is None:
        return request
    receipt = f"models/{block['flops_of']}/training.json"  # read for its FLOPs alone
    inputs = {path: digest for path, digest in request["inputs"].items() if path != receipt}
    fixed = {key: value for key, value in block.items() if key not in (*TrainingParams.LENGTH, "extend")}
    return with_block(request, fixed) | {"inputs": inputs}


def changed_settings(new: StageRequest, old: StageRequest) -> list[str]:
    """The free settings that `new` asks for and `old` did not, a short text each."""
    now, then = new["free"], old.get("free", {})
    return [f"{key}: {then.get(key)} -> {now[key]}" for key in sorted(now) if now[key] != then.get(key)]


def differences(new: StageRequest, old: StageRequest) -> list[str]:
    """What determines `new` and is not as it was for `old`, a short line each."""
    lines = []
    for part, one in (("settings", "setting"), ("code", "code"), ("inputs", "input")):
        now, then = flat(new[part]), flat(old.get(part, {}))
        for key in sorted(now.keys() | then.keys()):
            if now.get(key) != then.get(key):
                values = f": {then.get(key)} -> {now.get(key)}" if part == "settings" else ""
                lines.append(f"{one} {key}{values}")
    return lines


PAST = ("metrics.jsonl", "samples.jsonl", "recovery.json")  # beside checkpoints, what a run that goes on starts with
MADE = ("data/", "models/", "reports/")  # made by stages, which replace and never change
SHARES = "shards"  # the folder of a run with those of the jobs that share its benchmark


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
    def whole(self) -> "RunFolder":
        """The run that a share belongs to; any other run is whole."""
        return RunFolder(self.path.parents[1]) if self.path.parent.name == SHARES else self

    @property
    def root(self) -> Path:
        """The checkout or workspace that asked for it, where it lies now."""
        request = self.request
        asked, then = Path(request["root"]), Path(request.get("home", request["root"]))
        return self.path.parents[1] / asked.relative_to(then) if asked.is_relative_to(then) else asked

    @property
    def last_job(self) -> dict[str, Any] | None:
        """What a launcher wrote down of the last job, None before the first."""
        path = self.path / "job.json"
        return read_json(path) if path.exists() else None

    @property
    def job(self) -> dict[str, Any] | None:
        """The last job if it is this folder's own: a copy of a run has nothing to do with the original's job."""
        job = self.last_job
        return job if job is None or self._is_own(job) else None

    def note_job(self, job: dict[str, Any]) -> None:
        """Write down who is at this run, and which folder that is."""
        note = {"folder": str(self.path), "inode": self.path.stat().st_ino, "host": socket.gethostname()}
        write_json(self.path / "job.json", note | {"time": time.time()} | job)

    def _is_own(self, job: dict[str, Any]) -> bool:
        """Whether a job was started for this folder: by its path here, by its inode where it was moved or is mounted."""
        noted, same = Path(job.get("folder", self.path)), job.get("inode") == self.path.stat().st_ino
        if noted == self.path:  # also on another machine, of which this may be a backup
            return same or job.get("host", socket.gethostname()) == socket.gethostname()
        return same and (not noted.exists() or noted.samefile(self.path))

    @property
    def title(self) -> str:
        """What tells its pipeline from others: the profile's name and what was put over it."""
        note = self.root / "workspace.json"
        over = read_json(note).get("overrides", []) if note.is_file() else []
        return " ".join([self.request["all_params"]["name"], *over])

    @property
    def job_name(self) -> str:
        """The last job in words: `slurm 123`, `local 4567`, `inline`."""
        job = self.last_job
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

    @property
    def saved_step(self) -> int:
        """The step of the newest checkpoint; 0 without one."""
        return max((int(folder.name[5:]) for folder in (self.path / "checkpoints").glob("step-*")), default=0)

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """Hold the lock that a job's script holds as well; False (and nothing held) while somebody else works here."""
        with (self.path / "running.lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True

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
            lines = complete(stream.read())
        return parsed(lines[-1], str(path)) if lines and lines[-1].startswith(b"{") else {}

    def publish(self, root: Path) -> None:
        """Put the finished outputs where DVC expects them, each all at once."""
        for out in self.request["outs"]:
            if (self.tree / out).exists():
                link_into(self.tree / out, root / out)


def open_run(
    project: Project, stage: StageNode, params: dict[str, Any], request: StageRequest | None = None
) -> RunFolder:
    """The run folder of what `stage` would make now (`request`, if that is known); made, with its snapshot, if need be.

    With `extend` a run that is made begins from a shorter one's checkpoints; raises `ConfigError` while that one trains.
    """
    request = request_of(project, stage, params) if request is None else request
    run, shorter = _which(project, request)
    run.path.mkdir(parents=True, exist_ok=True)
    with FileLock(run.path / ".lock"):
        if not (run.path / "request.json").exists():
            _snapshot(project, stage, params, run.tree)
            if shorter is not None:
                _begin_from(shorter, run)
                request = request | {"extends": shorter.key, "machine": shorter.request.get("machine", {})}
            write_json(run.path / "request.json", request)
    return run


def _which(project: Project, request: StageRequest) -> tuple[RunFolder, RunFolder | None]:
    """The run that is asked for, and the shorter one that it goes on from if it has to be made.

    A run that goes on from another has another result than one of that length from the start (its learning rate has
    fallen before), so it has another name. Where there is nothing to go on from, or one of just this length has ended,
    `extend` changes nothing.
    """

    def folder_of(values: StageRequest) -> RunFolder:
        return RunFolder(project.runs / f"{values['stage'].replace('@', '-')}-{fingerprint(values)}")

    block = training_block(request)
    if block is None:
        return folder_of(request), None
    plain, extended = (folder_of(with_block(request, block | {"extend": value})) for value in (False, True))
    if block["extend"] and (extended.path / "request.json").exists():
        return extended, None
    if (plain.path / "request.json").exists() and (plain.succeeded or not block["extend"]):
        return plain, None
    others = [
        r for r in all_runs(project) if r.request.get("any_length") == request["any_length"] and r.key != plain.key
    ]
    furthest = max(others, key=lambda run: run.saved_step, default=None)
    shorter = [run for run in others if 0 < run.saved_step < (block["max_steps"] or math.inf)]
    if block["extend"] and shorter:
        return extended, max(shorter, key=lambda run: run.saved_step)
    if furthest is not None:
        there = f"{furthest.key}, the same at another length, has saved step {furthest.saved_step}"
        way = "which is no shorter" if block["extend"] else f"{request['stage']}.extend: true goes on from there"
        print(f"{plain.key}: from the beginning; {there}: {way}", flush=True)
    return plain, None


def _begin_from(shorter: RunFolder, run: RunFolder) -> None:
    """Give a new run another's past: links to its checkpoints, which never change, and copies of what is appended to."""
    with shorter.alone() as alone:
        if not alone:
            ways = f"wait for its end, or `llada cancel {shorter.key}` saves and ends it; then the same command goes on"
            raise ConfigError(f"{shorter.key}, which {shorter.stage}.extend goes on from, is still training: {ways}")
        link_into(shorter.path / "checkpoints", run.path / "checkpoints")
        for name in PAST:
            if (shorter.path / name).exists():
                write_text(run.path / name, (shorter.path / name).read_text(encoding="utf-8"))
    print(f"{run.key}: goes on from step {run.saved_step} of {shorter.key}", flush=True)


def take_settings(run: RunFolder, asked: StageRequest) -> None:
    """Let a run that nobody is at, and whose lock the caller holds, go on with the free settings that are asked for."""
    old = run.request
    new = old | {key: asked[key] for key in ("params", "free", "inputs", "all_params")}
    for line in changed_settings(new, old):
        print(f"{run.key}: {line}", flush=True)
    if new != old:
        write_json(run.path / "request.json", new)
        write_text(run.tree / "params.yaml", _params_file(new["all_params"]))  # to be read; the request is what counts


def _snapshot(project: Project, stage: StageNode, params: dict[str, Any], tree: Path) -> None:
    fresh = tree.with_name("tree.new")
    for old in (fresh, tree):
        shutil.rmtree(old, ignore_errors=True)
    copy_code(project.root, fresh)
    shutil.copy2(project.root / "dvc.yaml", fresh / "dvc.yaml")
    for path in (p for p in stage.inputs if not Path(p).is_absolute()):
        if path.startswith(MADE):
            link_into(project.root / path, fresh / path)
        else:  # a person's file may be changed in place
            copy = shutil.copytree if (project.root / path).is_dir() else shutil.copy2
            (fresh / path).parent.mkdir(parents=True, exist_ok=True)
            copy(project.root / path, fresh / path)
    write_text(fresh / "params.yaml", _params_file(params))
    os.replace(fresh, tree)


def copy_code(root: Path, tree: Path) -> None:
    """Put the packages that a job runs into its snapshot; what Python compiles of them stays out."""
    for package in CODE:
        shutil.copytree(root / package, tree / package, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))


def _params_file(params: dict[str, Any]) -> str:
    return yaml.safe_dump(params, sort_keys=False, allow_unicode=True)


def all_runs(project: Project) -> Iterator[RunFolder]:
    """Every run folder, the newest first."""
    folders = (project.runs).glob("*/request.json")
    for file in sorted(folders, key=lambda f: f.stat().st_mtime, reverse=True):
        yield RunFolder(file.parent)


def find_run(project: Project, name: str) -> RunFolder:
    """A run by its key, the beginning of it, or its stage's name (then the newest); raises `ConfigError`."""
    runs = list(all_runs(project))
    found = [r for r in runs if r.key == name] or [
        r for r in runs if (name and r.key.startswith(name)) or r.stage == name
    ]
    if not found:
        known = ", ".join(r.key for r in runs[:5]) or "there is none yet"
        raise ConfigError(f"no run {name!r}; the newest: {known}")
    return found[0]


def previous_run(project: Project, run: RunFolder) -> RunFolder | None:
    """The newest successful run of the same stage in the same folder that is not `run`."""
    stage, here = run.stage, project.root.resolve()
    others = (r for r in all_runs(project) if r.key != run.key and r.succeeded)
    return next((r for r in others if r.stage == stage and r.root.resolve() == here), None)


def stage_params(project: Project, overrides: list[str]) -> dict[str, Any]:
    """The whole of params.yaml as plain values, checked, with overrides; defaults of absent keys are not filled in."""
    values = with_overrides(read_yaml(project.root / "params.yaml"), overrides)
    Params.parse(values, "params.yaml")
    return values


def rank() -> int:
    """Which of several processes this is; 0 writes."""
    return int(os.environ.get("RANK", "0"))


def _unseen(line: dict[str, Any]) -> None:
    """Nobody looks on."""


@dataclass(frozen=True)
class StageContext:
    """What a stage's function is given; the working directory is the run's snapshot, laid out like the project."""

    params: Params
    run: RunFolder
    stage: str
    item: str | None  # the benchmark, for an instance of evaluate
    follow: Callable[[dict[str, Any]], None] = _unseen  # told every line of metrics.jsonl while it trains


def verify_inputs(work: StageContext) -> None:
    """Folders outside the snapshot may have changed while the job waited; the first rank of each node looks.

    Raises `ConfigError` for one that has.
    """
    if int(os.environ.get("LOCAL_RANK", "0")) != 0:
        return
    for path, digest in work.run.request["inputs"].items():
        if Path(path).is_absolute() and model_hash(Path(path)) != digest:
            raise ConfigError(f"{path} has changed since this job was submitted; run the same command again")


def compared(first: RunFolder, second: RunFolder) -> str:
    """Two runs side by side: what determines them and differs, and the last value that each has of every number."""
    lines = [f"A {first.key} ({first.title})", f"B {second.key} ({second.title})", "", "A -> B"]
    lines += differences(second.request, first.request) or ["nothing that determines them differs"]
    ends = first.last_metrics(), second.last_metrics()
    names = [key for key in ends[0] | ends[1] if key != "time"]
    shown = [[f"{end[key]:.6g}" if isinstance(end.get(key), int | float) else "-" for end in ends] for key in names]
    return "\n".join([*lines, *(f"{key}: {a} -> {b}" for key, (a, b) in zip(names, shown, strict=True))])
