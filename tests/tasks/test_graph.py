"""dvc.yaml as it is: what stages name is what they read, and the default run has every key that DVC looks up."""

import ast
from pathlib import Path

import pytest
import yaml

from llada_core.settings import ConfigError
from tasks.graph import load_stage, lookup, prune
from tasks.launch.workspace import with_sources
from tasks.project import TRAINING_STAGES

ROOT = Path(__file__).resolve().parents[2]
SPEC = yaml.safe_load((ROOT / "dvc.yaml").read_text())
PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())
# How runs are launched, told and kept; what composes and checks settings; what a stage imports of a room without using.
PLUMBING = {
    *(
        f"llada_core/{n}.py"
        for n in ("__init__", "settings", "modeling/__init__", "modeling/folder", "sampling/__init__")
    ),
    *(f"tasks/{n}.py" for n in ("__init__", "errors", "folders", "graph", "project", "work/__init__", "work/register")),
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
        "sampling/params",
        "training/params",
        "usage",
    )
}
RL = (
    *("sampling", "verifiers", "likelihood.py", "evaluation", "data/__init__.py"),
    *(f"training/{n}" for n in ("grpo.py", "reference.py", "rollouts.py", "rewards", "preference.py")),
)
NOT_READ = {  # imported only where another stage's objective is built
    "pretrain": RL,
    "sft": RL,
    "sft_control": RL,
    "preference": RL,
    "grpo": ("evaluation", "data/__init__.py", "training/preference.py"),
    "evaluate": ("diffusion.py", "data/__init__.py"),
    "prepare": ("evaluation",),
    "report": (),
    "register": (),
}


def module_file(name: str) -> Path | None:
    path = ROOT.joinpath(*name.split("."))
    return next((c for c in (path.with_suffix(".py"), path / "__init__.py") if c.exists()), None)


def imported(file: Path) -> set[Path]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {f for n in names if n.split(".")[0] in ("llada_core", "tasks") and (f := module_file(n))}


def closure(stage: str) -> set[str]:
    left_out = {f"llada_core/{name}" for name in NOT_READ[stage]}
    seen: set[Path] = set()
    todo = [ROOT / f"tasks/{stage}.py"]
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
    listed = load_stage(ROOT, item, PARAMS).code
    for path in listed:
        assert (ROOT / path).exists(), f"{name} lists {path}, which is not there"
    missing = {
        file
        for file in closure(name) - CONFIG - {f"tasks/{name}.py"}
        if not any(file == path or file.startswith(f"{path}/") for path in listed) and not file.endswith("__init__.py")
    }
    assert not missing, f"{name} runs, but does not list: {sorted(missing)}"


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
        assert not any("sampling" in path for path in load_stage(ROOT, stage, PARAMS).code)
    assert not any(key.startswith("launch") for s in TRAINING_STAGES for key in load_stage(ROOT, s, PARAMS).params)


def models_of(root: Path, *names: str) -> list[str]:
    return with_sources({"evaluate": {"models": list(names)}}, root)["evaluate"]["models"]


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
