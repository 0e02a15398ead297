"""What dvc.yaml says of one stage: the code it runs, what it reads, the parameters, what it writes.

dvc.yaml is the only place where this is written; the fingerprint of a run, the snapshot that a job runs in and the
pruned graph of a workspace are all derived from it. Knows neither DVC's Python side (importing it costs half a second
for each stage) nor what a stage does.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llada_core.modeling.folder import base_folder, is_adapter
from llada_core.settings import ConfigError, nearest, read_yaml
from tasks import own_code
from tasks.project import Project
from tasks.stages import TRAINING_STAGES

CODE = frozenset({"llada_core", "tasks"})
VALUE = re.compile(r"\$\{([\w.]+)\}")


@dataclass(frozen=True)
class StageNode:
    """One node: paths relative to the project (or absolute, for a model from elsewhere), keys of params.yaml."""

    name: str  # as DVC says it: sft, evaluate@sudoku
    code: tuple[str, ...]
    inputs: tuple[str, ...]
    params: tuple[str, ...]
    outs: tuple[str, ...]

    @property
    def kind(self) -> str:
        """The name without an instance: evaluate for evaluate@sudoku."""
        return self.name.partition("@")[0]

    @property
    def models(self) -> tuple[str, ...]:
        """The stages whose models this one reads."""
        return tuple(Path(path).name for path in self.inputs if path.startswith("models/"))


def load_stage(project: Project, name: str, params: dict[str, Any]) -> StageNode:
    """The stage `name` (with its instance after @) of `root`/dvc.yaml, for the given values of params.yaml."""
    kind, _, item = name.partition("@")
    stages = read_yaml(project.root / "dvc.yaml").get("stages", {})
    if kind not in stages:
        raise ConfigError(f"dvc.yaml has no stage {kind!r}{nearest(kind, list(stages))}")
    spec = _body(stages[kind])
    values = params | ({"item": item} if item else {})
    others = set(_own(kind, spec, params)) - set(_own(kind, spec, _of(item, params)))  # other benchmarks' questions
    deps = [_fill(path, values) for path in _deps(kind, spec, params) if path not in others]
    return StageNode(
        name=name,
        code=tuple(path for path in deps if Path(path).parts[0] in CODE),
        inputs=tuple(path for path in deps if Path(path).parts[0] not in CODE),
        params=tuple(_params(kind, spec, params)),
        outs=tuple(_fill(_path(out), values) for out in _outs(spec)),
    )


def chosen(params: dict[str, Any], stage: StageNode) -> dict[str, Any]:
    """The values of the keys that `stage` reads; of `evaluate.overrides` an instance reads only its benchmark's, and
    `prepare` which files of one's own have questions."""
    values = _of(stage.name.partition("@")[2], params)
    return {key: lookup(values, key) for key in stage.params}


def _of(item: str, params: dict[str, Any]) -> dict[str, Any]:
    """`params` as an instance of evaluate reads them, without other benchmarks' overrides; as other stages do where it is
    empty, with nothing of these but the files of questions."""
    if not (overrides := lookup(params, "evaluate.overrides")):
        return params
    own = {name: value for name, value in overrides.items() if name == item}
    if not item:
        files = {name: lookup(overrides, f"{name}.{own_code.QUESTIONS}") for name in overrides}
        own = {name: {own_code.QUESTIONS: file} for name, file in files.items() if file}
    return params | {"evaluate": params["evaluate"] | {"overrides": own}}


def lookup(params: dict[str, Any], key: str) -> Any:
    """The value at a dotted key, None where there is none."""
    value: Any = params
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def prune(spec: dict[str, Any], params: dict[str, Any]) -> dict[str, Any]:
    """dvc.yaml's content for a run with only the stages that `params` lists.

    A dependency on what a dropped stage would have made goes with it; a training stage depends on what it starts from;
    an optional stage (`foreach: []`) that is listed becomes a plain one. Raises `ConfigError` for a source that no
    stage of the run makes.
    """
    listed = params["stages"]
    if missing := [name for name in listed if name not in spec["stages"]]:
        near = nearest(missing[0], list(spec["stages"]))
        raise ConfigError(f"stages lists {missing[0]!r}, which dvc.yaml does not have{near}")
    stages = {name: _plain(stage) for name, stage in spec["stages"].items()}
    outs = {name: [_path(out) for out in _outs(_body(stage))] for name, stage in stages.items()}
    made = [out for name in listed for out in outs[name]]
    dropped = [out for name in stages if name not in listed for out in outs[name]]
    folders = {str(Path(out).parent) for out in dropped}
    dropped += [folder for folder in folders if not any(_under(out, [folder]) for out in made)]
    for name in listed:
        source = _source(name, params)
        if source is not None and _under(source, dropped):
            listed_ones = ", ".join(stage for stage in listed if stage in TRAINING_STAGES)
            raise ConfigError(
                f"{name}.init_from is {Path(source).name!r}, which this run does not make; it makes: {listed_ones}"
            )
        body = _body(stages[name])
        body["deps"] = [path for path in _deps(name, body, params) if not _under(path, dropped)]
        body["params"] = [key for key in _params(name, body, params) if _given(params, key)]
    result = spec | {"stages": {name: stage for name, stage in stages.items() if name in listed}}
    for key in ("metrics", "plots"):
        if key in spec:
            result[key] = [entry for entry in spec[key] if not _under(_path(entry), dropped)]
    return result


def _deps(kind: str, body: dict[str, Any], params: dict[str, Any]) -> list[str]:
    """The dependencies as written, but with the models that `params` name: what a stage starts from, or evaluates."""
    written = [path for path in body.get("deps", []) if not path.endswith(".init_from}")]
    models = [source] if (source := _source(kind, params)) else []
    if kind == "evaluate":
        written = [path for path in written if not path.startswith("models/")]
        named = lookup(params, "evaluate.models") or []
        models = [f"models/{name}" for name in named if name in TRAINING_STAGES]
        models += [name.partition("=")[2] for name in named if "=" in name]
    models += [base for path in models for base in _bases(path)]
    return list(dict.fromkeys([*written, *models, *_own(kind, body, params)]))


def _own(kind: str, body: dict[str, Any], params: dict[str, Any]) -> list[str]:
    """The files of one's own that the settings of a stage name."""
    return own_code.files_of([{key.rpartition(".")[2]: lookup(params, key)} for key in _params(kind, body, params)])


def require_listed(spec: dict[str, Any], params: dict[str, Any]) -> None:
    """Raises `ConfigError` for a file of one's own that dvc.yaml does not list: DVC would not see that it was edited."""
    if own_code.with_benchmarks(params) is not params:
        raise ConfigError("params.yaml names a file in evaluate.benchmarks; run the same settings as a profile")
    for kind in params["stages"]:
        body = _body(spec["stages"].get(kind, {}))
        if missing := [path for path in _own(kind, body, params) if path not in body.get("deps", [])]:
            ways = f"add `- {missing[0]}` to deps of {kind} there, or run the same settings as a profile"
            raise ConfigError(f"params.yaml names {missing[0]}, which dvc.yaml does not know: {ways}")


def require_keys(spec: dict[str, Any], params: dict[str, Any]) -> None:
    """Raises `ConfigError` for a key that dvc.yaml lists and params.yaml lacks: DVC would stop there, in the middle."""
    for kind in params["stages"]:
        body = _body(spec["stages"].get(kind, {}))
        if lacking := [key for key in _params(kind, body, params) if not _given(params, key)]:
            parent, _, last = lacking[0].rpartition(".")
            way = f"add `{last}: null` to its block {parent}" if parent else "add it"
            raise ConfigError(f"params.yaml lacks {lacking[0]}, which dvc.yaml lists for {kind}: {way}")


def _bases(model: str) -> list[str]:
    """The folders that belong to a model from elsewhere: the base that an adapter names by its place, and that one's."""
    found = [Path(model)]
    while found[-1].is_absolute() and is_adapter(found[-1]) and (base := base_folder(found[-1])):
        found.append(base.resolve())
    return [str(folder) for folder in found[1:]]


def _params(kind: str, body: dict[str, Any], params: dict[str, Any]) -> list[str]:
    """The parameters as written; a training stage that starts from nothing reads the shape of a new model as well."""
    fresh = kind in TRAINING_STAGES and _source(kind, params) is None
    return list(dict.fromkeys([*body.get("params", []), *(["model"] if fresh else [])]))


def _given(params: dict[str, Any], key: str) -> bool:
    parent, _, last = key.rpartition(".")
    block = lookup(params, parent) if parent else params
    return isinstance(block, dict) and last in block


def _source(kind: str, params: dict[str, Any]) -> str | None:
    value = lookup(params, f"{kind}.init_from") if kind in TRAINING_STAGES else None
    return f"models/{value}" if value in TRAINING_STAGES else value


def _plain(stage: dict[str, Any]) -> dict[str, Any]:
    return stage["do"] if stage.get("foreach") == [] else stage


def _body(stage: dict[str, Any]) -> dict[str, Any]:
    return stage.get("do", stage)


def _fill(text: str, values: dict[str, Any]) -> str:
    return VALUE.sub(lambda match: str(lookup(values, match[1])), text)


def _outs(spec: dict[str, Any]) -> list[Any]:
    return [out for key in ("outs", "metrics", "plots") for out in spec.get(key, [])]


def _path(entry: Any) -> str:
    return next(iter(entry)) if isinstance(entry, dict) else entry


def _under(path: str, roots: list[str]) -> bool:
    return any(path == root or path.startswith(f"{root}/") for root in roots if "${" not in root)
