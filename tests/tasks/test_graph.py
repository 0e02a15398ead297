"""dvc.yaml as it is: what stages name is what they read, and the default run has every key that DVC looks up."""

import ast
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import yaml

from llada_core.data.formats import FORMATS
from llada_core.data.params import DataParams, PartParams, PuzzleCounts
from llada_core.settings import ConfigError, function_at
from tasks.graph import load_stage, lookup, prune, require_keys
from tasks.launch.workspace import with_sources
from tasks.project import Params, Project
from tasks.stages import STAGES, TRAINING_STAGES, Stage, program_of

ROOT = Path(__file__).resolve().parents[2]
SPEC = yaml.safe_load((ROOT / "dvc.yaml").read_text())
PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())
# How runs are launched, told and kept; what composes and checks settings; what a stage imports of a room without using.
PLUMBING = {
    *(
        f"llada_core/{n}.py"
        for n in ("__init__", "settings", "modeling/__init__", "modeling/folder", "sampling/__init__")
    ),
    *(
        f"tasks/{n}.py"
        for n in ("__init__", "errors", "folders", "graph", "project", "stages", "work/__init__", "work/register")
    ),
    *(
        file.relative_to(ROOT).as_posix()
        for room in ("launch", "record")
        for file in (ROOT / "tasks" / room).glob("*.py")
    ),
}
CONFIG = {
    f"llada_core/{n}.py"
    for n in (
        "data/params",
        "evaluation/params",
        "modeling/architecture",
        "modeling/configuration",
        "sampling/params",
        "training/params",
        "usage",
    )
}
# Texts written at a validation, to be read by people: they decide nothing.
SAMPLES = ("sampling", "verifiers", "training/rollouts.py", "training/rewards")
# What a program imports without its outputs depending on it: in a training stage the samples, unless it is listed here.
NOT_READ = dict.fromkeys(TRAINING_STAGES, SAMPLES) | {
    "grpo": (),
    # Of the evaluation it only counts questions that are trained on.
    "prepare": tuple(f"evaluation/{name}.py" for name in ("answering", "benchmark", "harness", "requests", "speed")),
}
READ_AS_DATA = (
    "llada_core/evaluation/definitions",
    "llada_core/evaluation/figures.yaml",
    "llada_core/evaluation/speed_prompts.yaml",
)
TOO_WIDE = {
    "prepare": {"llada_core/data/batches.py"}
}  # it lists the folder, of which this is the one file it does not run


def module_file(name: str) -> Path | None:
    path = ROOT.joinpath(*name.split("."))
    return next((c for c in (path.with_suffix(".py"), path / "__init__.py") if c.exists()), None)


def names_in(file: Path) -> set[str]:
    """The dotted names that a file imports, or writes as text, of what is fetched by its name (a network, a child)."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if node.value.endswith("_child.py"):
                names.add(".".join(file.relative_to(ROOT).with_name(node.value).with_suffix("").parts))
            elif node.value.startswith("llada_core.") and file.name != "params.py":  # where each stage names its own
                names.add(node.value.rpartition(".")[0])
    return names


def imported(file: Path) -> set[Path]:
    """The files of ours that a file names; through a package's face (its `__init__`) those behind the names that it takes."""
    names = names_in(file)
    for package in [n for n in names if (face := module_file(n)) and face.name == "__init__.py"]:
        behind = names_in(ROOT.joinpath(*package.split("."), "__init__.py"))
        taken = {n.rpartition(".")[2] for n in names if n.rpartition(".")[0] == package}
        names |= {n.rpartition(".")[0] for n in behind if n.rpartition(".")[2] in taken}
    return {f for n in names if n.split(".")[0] in ("llada_core", "tasks") and (f := module_file(n))}


def closure(stage: str) -> set[str]:
    left_out = {f"llada_core/{name}" for name in NOT_READ.get(stage, ())}
    seen: set[Path] = set()
    own = ROOT / f"tasks/{stage}.py"
    todo = [own if own.exists() else ROOT / "tasks/__main__.py"]
    if (settings := STAGES[stage].settings) is not None:  # train.py finds what it minimises by this path
        todo.append(module_file(settings.OBJECTIVE.rpartition(".")[0]))
    while todo:
        file = todo.pop()
        name = file.relative_to(ROOT).as_posix()
        if file in seen or name in PLUMBING or any(name == x or name.startswith(f"{x}/") for x in left_out):
            continue
        seen.add(file)
        todo += imported(file)
    return {file.relative_to(ROOT).as_posix() for file in seen}


@pytest.mark.parametrize("name", list(SPEC["stages"]))
def test_a_stage_lists_all_code_that_it_runs(name: str) -> None:
    item = f"{name}@x" if "@" not in name and SPEC["stages"][name].get("foreach") else name
    listed = load_stage(Project.at(ROOT), item, PARAMS).code
    for path in listed:
        assert (ROOT / path).exists(), f"{name} lists {path}, which is not there"
    missing = {
        file
        for file in closure(name) - CONFIG - {f"tasks/{name}.py", "tasks/__main__.py"}  # the commands
        if not any(file == path or file.startswith(f"{path}/") for path in listed) and not file.endswith("__init__.py")
    }
    assert not missing, f"{name} runs, but does not list: {sorted(missing)}"


def test_a_key_that_params_yaml_of_before_lacks_is_told_before_anything_starts() -> None:
    require_keys(SPEC, PARAMS)
    old = PARAMS | {"evaluate": {key: value for key, value in PARAMS["evaluate"].items() if key != "speed"}}
    with pytest.raises(
        ConfigError, match=r"lacks evaluate\.speed, .* evaluate: add `speed: null` to its block evaluate"
    ):
        require_keys(SPEC, old)


@pytest.mark.parametrize("name", list(SPEC["stages"]))
def test_a_stage_lists_no_code_that_it_does_not_run(name: str) -> None:
    item = f"{name}@x" if SPEC["stages"][name].get("foreach") else name
    listed = [ROOT / path for path in load_stage(Project.at(ROOT), item, PARAMS).code if path not in READ_AS_DATA]
    files = {file for path in listed for file in (path.rglob("*.py") if path.is_dir() else [path])}
    names = {file.relative_to(ROOT).as_posix() for file in files if file.name != "__init__.py"}
    assert names - closure(name) - PLUMBING == TOO_WIDE.get(name, set())


@pytest.mark.parametrize("stage", STAGES.values(), ids=lambda stage: stage.name)
def test_a_stage_of_the_table_is_dvc_yamls(stage: Stage) -> None:
    spec = SPEC["stages"][stage.name]
    body = spec.get("do", spec)
    assert body["cmd"] == f"python -m {program_of(stage.name)}" + " ${item}" * stage.each
    assert bool(spec.get("foreach")) == stage.each
    assert any(key.partition(".")[0] == stage.block for key in body["params"])
    if stage.settings is not None:
        assert {"seed", stage.block} <= set(body["params"])
        assert [*body["outs"], *body["metrics"]] == [
            f"models/{stage.name}",
            {f"reports/training/{stage.name}.json": {"cache": False}},
        ]
        assert tuple(path for path in body["deps"] if path.startswith("data/")) == stage.inputs
        fresh = "model" in body["params"]  # it begins with a new model, else with the one that its settings name
        assert fresh != (f"models/${{{stage.name}.init_from}}" in body["deps"])
        assert callable(function_at(stage.settings.OBJECTIVE, "objective"))
        assert stage.settings.ROWS in FORMATS


def test_dvc_yaml_and_the_table_name_the_same_stages() -> None:
    assert list(SPEC["stages"]) == list(STAGES)


def test_the_parts_of_the_data_are_those_of_the_formats() -> None:
    kinds = {name: get_args(field.annotation) for name, field in DataParams.model_fields.items()}
    parts = {name for name, args in kinds.items() if args and issubclass(args[0], PartParams)}
    assert parts == FORMATS.keys() <= PuzzleCounts.model_fields.keys()


def test_the_table_imports_no_torch() -> None:
    program = "import sys, tasks.stages, tasks.project; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_a_stage_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="stages lists 'sfx', which is none; did you mean 'sft'"):
        Params.parse({"name": "x", "stages": ["sfx"]}, "params.yaml")


def test_the_default_run_is_dvc_yaml_as_it_is() -> None:
    pruned = prune(yaml.safe_load((ROOT / "dvc.yaml").read_text()), PARAMS)
    assert set(pruned["stages"]) == set(PARAMS["stages"])
    for name, stage in pruned["stages"].items():
        body, written = (s.get("do", s) for s in (stage, SPEC["stages"][name]))
        source = f"models/{lookup(PARAMS, f'{name}.init_from')}"
        filled = {source if path.endswith(".init_from}") else path for path in written["deps"]}
        assert set(body["deps"]) == filled, name
        assert body["params"] == written["params"], f"{name}: params.yaml lacks a key that dvc.yaml lists"


def test_settings_of_sampling_touch_no_training() -> None:
    for stage in ("pretrain", "sft", "sft_control"):
        assert not any("sampling" in path for path in load_stage(Project.at(ROOT), stage, PARAMS).code)
    assert not any(
        key.startswith("launch") for s in TRAINING_STAGES for key in load_stage(Project.at(ROOT), s, PARAMS).params
    )


def models_of(root: Path, *names: str) -> list[str]:
    return with_sources({"evaluate": {"models": list(names)}}, Project.at(root))["evaluate"]["models"]


def test_models_of_an_evaluation_are_stages_or_labelled_folders(tmp_path: Path) -> None:
    for name in ("one/grpo", "lr=3/grpo", "my model"):
        (tmp_path / name).mkdir(parents=True)
    found = models_of(tmp_path, "sft", "one/grpo", "old=lr=3/grpo", "my model", "lr=3/")
    assert [name.partition("=")[0] for name in found] == ["sft", "grpo", "old", "my-model", "lr-3"]
    assert [Path(name.partition("=")[2]) for name in found[1:]] == [
        tmp_path / name for name in ("one/grpo", "lr=3/grpo", "my model", "lr=3")
    ]
    assert models_of(tmp_path, *found) == found  # a workspace's params.yaml is read once more by every stage


@pytest.mark.parametrize("names", [["one/grpo", "two/grpo"], ["grpo", "one/grpo"], ["sft", "sft"], ["a=one", "a=two"]])
def test_models_that_would_overwrite_each_other_are_refused(tmp_path: Path, names: list[str]) -> None:
    for name in ("one/grpo", "two/grpo"):
        (tmp_path / name).mkdir(parents=True)
    with pytest.raises(
        ConfigError, match=r"would both be '\w+' in tables; (list it once|label one of them, such as other=\w+)"
    ):
        models_of(tmp_path, *names)


def test_a_label_for_a_stage_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="write 'sft'"):
        models_of(tmp_path, "mine=sft")


def test_a_training_stage_needs_no_program_of_its_own() -> None:
    assert program_of("sft") == "tasks.sft"
    assert program_of("distil") == "tasks distil"
    command = [sys.executable, "-m", "tasks"]
    told = subprocess.run([*command, "sft", "--help"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert "Makes this stage's outputs" in told
    done = subprocess.run([*command, "stf"], cwd=ROOT, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (2, "error: no training stage 'stf'; did you mean 'sft'?")
