"""A registered version by reference; the gate that lets it be champion, its promotion, the way back."""

import importlib.metadata
import json
import math
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from llada_core.evaluation.statistics import Difference, paired
from llada_core.sampling.params import as_values
from llada_core.settings import ConfigError
from tasks.errors import one_line_errors
from tasks.folders import commit_of, content_hash, hash_of, read_json, write_json
from tasks.project import GateParams, Params, Project, RegisterParams
from tasks.record.model_usage import usage_to_register
from tasks.record.registry import (
    Version,
    client,
    hold_base,
    keep,
    receipts,
    require_weights,
    scores_of,
    store_folder,
    verified,
    version_of,
    versions,
    write_receipt,
)
from tasks.record.runs import RunFolder, stage_params
from tasks.record.versions import PACKAGES, make_version, point, register_lost
from tasks.work.report import scores_of as answered

Scores = dict[str, dict[str, float]]  # benchmark -> question -> score in [0, 1]


@dataclass(frozen=True)
class Decision:
    """The verdict and, in words, what it rests on."""

    passed: bool
    reason: str


def decide(gate: GateParams, candidate: Scores, champion: Scores | None) -> Decision:
    """Apply the gate; `champion` is None when there is none yet.

    A gate that names nothing lets a first champion through and no other: nothing says that the candidate is as good.
    Raises ValueError for a benchmark nobody measured.
    """
    named = (*gate.better, *gate.not_worse, *gate.at_least)
    if missing := [name for name in named if name not in candidate]:
        raise ValueError(
            f"the gate names benchmark {missing[0]!r}; measured are: {', '.join(sorted(candidate)) or 'none'}"
        )
    if broken := [name for name in named if not all(map(math.isfinite, candidate[name].values()))]:
        return Decision(False, f"{broken[0]} has a score that is no number")
    for name, floor in gate.at_least.items():
        if (score := _mean(candidate[name])) < floor:
            return Decision(False, f"{name} is {score:.3f}, below the required {floor:.3f}")
    if champion is None:
        return Decision(True, "there was no champion")
    if not named:
        ways = "name benchmarks in register.gate (better, not_worse, at_least), or `llada promote` by hand"
        return Decision(False, f"the gate is empty, and there is a champion; {ways}")
    if missing := [name for name in (*gate.better, *gate.not_worse) if not _common(candidate, champion, name)]:
        return Decision(False, f"{missing[0]}: the champion was not measured on the same questions; evaluate it first")
    for name in (*gate.not_worse, *gate.better):
        difference = _difference([name], candidate, champion)
        if difference.high < 0:
            return Decision(False, f"worse on {name}: {_words(difference)}")
    if not gate.better:
        return Decision(True, "worse on nothing that the gate lists")
    difference = _difference(list(gate.better), candidate, champion)
    where = " and ".join(gate.better)
    if difference.low <= 0:
        return Decision(False, f"not better on {where} by more than noise: {_words(difference)}")
    return Decision(True, f"better on {where}: {_words(difference)}")


def _difference(names: list[str], candidate: Scores, champion: Scores) -> Difference:
    questions = [(name, question) for name in names for question in _common(candidate, champion, name)]
    return paired([candidate[n][q] for n, q in questions], [champion[n][q] for n, q in questions])


def _common(candidate: Scores, champion: Scores, name: str) -> list[str]:
    theirs = {question for question, score in champion.get(name, {}).items() if math.isfinite(score)}
    return sorted(candidate[name].keys() & theirs)


def _mean(scores: dict[str, float]) -> float:
    return sum(scores.values()) / len(scores) if scores else 0.0


def _words(difference: Difference) -> str:
    low, high = difference.low, difference.high
    return f"{difference.value:+.3f} (95 % interval {low:+.3f} to {high:+.3f}, {difference.n} questions)"


CHAMPION, CANDIDATE = "champion", "candidate"
Trial = Callable[[Project, Version], object]
"""Has a version loaded and asked a question; raises `StageError` when it does not answer."""


def register(project: Project, params: Params, trial: Trial, send: Callable[[Project], object]) -> dict[str, Any]:
    """Register the model that the run names; returns what became of it, which is also the stage's output.

    `trial` is made before it becomes champion; `send` is called to have MLflow told of the runs that made it.
    """
    spec = params.register_
    if spec is None:
        raise ConfigError("params.yaml has no block 'register'")
    with FileLock(_lock(project)):  # two runs with the same weights are one version
        send(project)
        return _register(project, params, spec, trial)


def _lock(project: Project) -> Path:
    store_folder(project, "").mkdir(parents=True, exist_ok=True)
    return store_folder(project, ".register.lock")


def _register(project: Project, params: Params, spec: RegisterParams, trial: Trial) -> dict[str, Any]:
    digest = keep(project, project.root / "models" / spec.model)
    hold_base(project, store_folder(project, digest))  # a champion whose base is nowhere could not be loaded
    require_weights(store_folder(project, digest))
    answers = (project.root / "reports" / "eval").glob(f"*/{spec.model}.samples.jsonl")
    write_json(store_folder(project, digest).with_suffix(".scores.json"), {p.parent.name: answered(p) for p in answers})
    register_lost(project, spec.name)  # in their order, so that numbers and the champion are as they were
    known = versions(project, spec.name)
    version = next((v for v in known if v.hash == digest), None)
    if version is None:
        receipt: dict[str, Any] = {"event": "version", "name": spec.name, "hash": digest}
        usage = usage_to_register(project, digest, spec.sampling)
        receipt |= {"sampling": as_values(spec.sampling), "usage": usage.model_dump(mode="json")}
        receipt |= {"device": spec.device, "bits": spec.bits}
        receipt["tags"] = lineage(project, spec.model)
        write_receipt(project, receipt)  # first, so that a registration cut short is found again
        version = make_version(project, receipt)
    point(project, version, CANDIDATE, "registered by the pipeline")
    champion = champion_among(known)
    decision = judge(project, params, version, champion)
    if decision.passed and (champion is None or champion.number != version.number):
        trial(project, version)
        now = champion_among(versions(project, spec.name))  # a trial may wait for hours
        if now is not None and (champion is None or now.number != champion.number):
            champion, decision = now, judge(project, params, version, now)
        if decision.passed:
            point(project, version, CHAMPION, decision.reason)
    client(project).set_model_version_tag(spec.name, version.number, "gate", decision.reason)
    holder = version.number if decision.passed else (champion.number if champion else None)
    aliases = [CANDIDATE, *([CHAMPION] if decision.passed else [])]
    return {
        "name": spec.name,
        "version": version.number,
        "hash": digest,
        "aliases": aliases,
        "gate": asdict(decision),
        "champion": holder,
    }


def champion_among(known: list[Version]) -> Version | None:
    """The champion, if there is one."""
    return next((version for version in known if CHAMPION in version.aliases), None)


def judge(project: Project, params: Params, version: Version, champion: Version | None) -> Decision:
    """What the gate in params says of a version."""
    assert params.register_ is not None
    if champion is not None and champion.hash == version.hash:
        return Decision(True, "it is the champion already")
    return decide(
        params.register_.gate, scores_of(project, version.hash), scores_of(project, champion.hash) if champion else None
    )


def lineage(project: Project, stage: str) -> dict[str, str]:
    """Where a model comes from: commit, lock file, parameters, data, the run of every stage, the environment."""
    runs, inputs = _chain(project, stage)
    lock = project.root / "dvc.lock"
    return {
        "git_commit": commit_of(project.root),
        "dvc_lock": content_hash(lock) if lock.exists() else "none",
        "params": hash_of(stage_params(project, [])),
        "stage_runs": json.dumps(runs, sort_keys=True),
        "jobs": json.dumps({stage: _job(project, key) for stage, key in runs.items()}, sort_keys=True),
        "inputs": json.dumps(inputs, sort_keys=True),
        "environment": f"python {platform.python_version()}, "
        + ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES),
        "folder": str(project.root.resolve()),
    }


def _chain(project: Project, stage: str) -> tuple[dict[str, str], dict[str, str]]:
    """Stage -> key of its run, and input -> hash, back to the first training stage of this project."""
    runs: dict[str, str] = {}
    inputs: dict[str, str] = {}
    receipt = project.root / "models" / stage / "training.json"
    while receipt.exists():
        values = read_json(receipt)
        runs[values["stage"]] = values["run"]
        inputs |= values["inputs"]
        before = next(
            (Path(path) for path in values["inputs"] if Path(path).name not in runs and "models/" in path), None
        )
        receipt = project.root / before / "training.json" if before else Path("none")
    return runs, inputs


def _job(project: Project, key: str) -> str:
    run = RunFolder(project.runs / key)
    return run.job_name if run.path.exists() else "unknown"


def main(overrides: list[str], trial: Trial, send: Callable[[Project], object]) -> None:
    """What dvc.yaml runs."""
    with one_line_errors():
        project = Project.at()
        result = register(project, Params.load(project.root / "params.yaml", overrides), trial, send)
        write_json(project.root / "reports" / "registered.json", result)
        verdict = "champion" if result["gate"]["passed"] else f"not champion ({result['gate']['reason']})"
        print(f"{result['name']} version {result['version']}: {verdict}")


def gate(project: Project, name: str, which: str) -> Decision:
    """What the gate of params.yaml says of a version against the present champion."""
    params = project.params
    if params.register_ is None or params.register_.name != name:
        raise ConfigError(
            f"params.yaml has no gate for model {name!r}; promote without it (`llada promote`, gated=false)"
        )
    return judge(project, params, version_of(project, name, which), champion_among(versions(project, name)))


def promote(project: Project, name: str, which: str, why: str, trial: Trial) -> Version:
    """Make a version (number or alias) champion, once its weights are verified and it has stood the trial."""
    version = version_of(project, name, which)
    require_weights(verified(project, version.hash))
    trial(project, version)
    point(project, version, CHAMPION, why)
    return version


def roll_back(project: Project, name: str, why: str, trial: Trial) -> Version:
    """Give the alias back to the last champion before the present one; raises `ConfigError` when there was none."""
    present = version_of(project, name, CHAMPION)
    held = [r["hash"] for r in receipts(project) if r["name"] == name and r.get("alias") == CHAMPION]
    before = next((digest for digest in reversed(held) if digest != present.hash), None)
    version = next((v for v in versions(project, name) if v.hash == before), None)
    if version is None:
        raise ConfigError(f"model {name!r} had no champion before version {present.number}")
    return promote(project, name, version.number, why, trial)
