"""What `llada fetch` asks of the Hub for a profile, with a hub that answers from memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tasks.launch.workspace import fetch
from tasks.project import Params

PROFILE = {
    "name": "published",
    "stages": ["prepare", "sft", "evaluate"],
    "data": {
        "tokenizer": {"name": "GSAI-ML/LLaDA-8B-Base"},
        "sft": {"length": 64, "sources": [{"name": "alpaca"}, {"name": "own"}, {"name": "absent/rows"}]},
    },
    "sft": {"init_from": "GSAI-ML/LLaDA-8B-Base", "max_steps": 1},
    "evaluate": {
        "benchmarks": ["sudoku", "instruct_gsm8k", "base_piqa", "base_gpqa"],
        "models": ["GSAI-ML/LLaDA-8B-Base", "ours=GSAI-ML/LLaDA-1.5", "sft", "models:/puzzles@champion", "here"],
    },
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that has everything but `absent/rows` and gated questions, and remembers what it was asked for."""
    import datasets
    import huggingface_hub

    from llada_core.evaluation import taskset

    asked = []

    def load_dataset(name, config=None, **how):
        asked.append(name)
        if name == "absent/rows":
            raise datasets.exceptions.DatasetNotFoundError("no such data set\non the Hub")

    def tasks_of(recipe, root=None):
        asked.append(recipe.name)
        if "gpqa" in recipe.name:
            raise OSError("gated")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: asked.append(name) or str(tmp_path))
    monkeypatch.setattr(taskset, "tasks_of", tasks_of)
    monkeypatch.delenv("LLADAFLOW_DATA_ROOT", raising=False)
    return asked


def test_everything_a_profile_names_is_asked_for_once_and_failures_do_not_stop_it(tmp_path, hub):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "train.jsonl").write_text('{"messages": []}\n')
    (tmp_path / "data" / "piqa").mkdir(parents=True)  # below the data root: need not be fetched
    (tmp_path / "here").mkdir()
    profile = {**PROFILE, "evaluate": {**PROFILE["evaluate"], "root": "data"}}
    said = []
    failed = fetch(Params.parse(profile, "profile"), tmp_path, said.append)
    models = ["GSAI-ML/LLaDA-8B-Base", "GSAI-ML/LLaDA-1.5"]
    assert hub == [*models, "tatsu-lab/alpaca", "absent/rows", "instruct_gsm8k", "base_gpqa"]
    assert failed == ["data set absent/rows: no such data set on the Hub", "benchmark base_gpqa: gated"]
    assert len(said) == len(hub)


def test_the_command_points_the_hubs_packages_at_the_folder_and_fails_with_what_is_missing(tmp_path):
    """A process of its own: the packages read HF_HOME when they are imported. Offline, so that nothing is there."""
    alone = {key: value for key, value in PROFILE.items() if key != "data"} | {"stages": ["sft", "evaluate"]}
    (tmp_path / "published.yaml").write_text(yaml.safe_dump(alone))
    code = "import json, sys; from cli.main import llada\ntry: llada()\nfinally: " + (
        "from huggingface_hub import constants as c; print(json.dumps([c.HF_HOME, c.HF_HUB_OFFLINE]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "fetch", str(tmp_path / "published.yaml"), str(tmp_path / "hub")],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(__file__).parents[2]), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 1, done.stderr
    assert lines[0].startswith("failed   model GSAI-ML/LLaDA-8B-Base: there is no folder")
    assert json.loads(lines[-1]) == [str(tmp_path / "hub"), True]
