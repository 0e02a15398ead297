"""Adapters without merging, through stages, store, registry and export: what they adapt is found wherever they go."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from app.models import opened
from cli.options import model_folder
from llada_core.modeling import load_model, save_model
from llada_core.modeling.folder import base_name
from llada_core.settings import ConfigError
from llada_core.training.objectives import DiffusionObjective
from llada_core.usage import Usage
from tasks.errors import StageError
from tasks.folders import content_hash
from tasks.launch import status
from tasks.launch.program import run_stage
from tasks.launch.trial import try_out
from tasks.project import Params, Project
from tasks.record.registry import hold_base, keep, keep_base, lasting_name, resolve, store_folder, verified
from tasks.record.tracking import send_pending
from tasks.work import training
from tasks.work.register import register
from tests.tiny import tiny_pair
from tests.training.data import write_data

REPOSITORY = Path(__file__).resolve().parents[2]
PARAMS = """\
name: toy
stages: [sft, sft_control]
sft: {max_steps: 3, batch_size: 8, init_from: pretrain, samples: 0, warmup: 1, lora: {r: 2, merge: false}}
sft_control: {max_steps: 3, batch_size: 8, init_from: sft, samples: 0, warmup: 1, lora: {r: 2, merge: false}}
register: {name: toy, model: sft_control, gate: {}}
launch: {kind: inline}
"""


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A project with prepared data and models/pretrain; the working directory is in it."""
    folder = tmp_path / "project"
    write_data(folder / "data", rows=16)
    for package in ("tasks", "llada_core"):
        (folder / package).symlink_to(REPOSITORY / package)
    graph = (REPOSITORY / "dvc.yaml").read_text().splitlines(keepends=True)
    (folder / "dvc.yaml").write_text("".join(line for line in graph if "- models/grpo/training.json" not in line))
    (folder / "params.yaml").write_text(PARAMS)
    model, tokenizer = tiny_pair()
    save_model(model, folder / "models/pretrain", tokenizer)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("LLADAFLOW_TRACKING", "off")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("LLADAFLOW_HOME", raising=False)
    return folder


def logits(model):
    with torch.no_grad():
        return model(torch.arange(10, 30)[None]).logits


def test_an_adapter_is_found_a_base_by_every_later_stage_and_wherever_it_is_moved(root, tmp_path, monkeypatch):
    for stage in ("sft", "sft_control"):
        run_stage(Project.at(root), stage, [], training.train_stage)
        text = (root / "models" / stage / "adapter_config.json").read_text()
        assert str(tmp_path) not in text
        before = {"sft": "pretrain", "sft_control": "sft"}[stage]
        assert base_name(root / "models" / stage) == f"sha256:{content_hash(root / 'models' / before)}"
    first, last = (logits(load_model(f"models/{stage}")) for stage in ("pretrain", "sft_control"))
    assert not torch.equal(first, last)
    digest = keep(Project.at(root), root / "models/sft_control")  # as `register` does
    assert torch.equal(logits(load_model(verified(Project.at(root), digest))), last)
    versions = SimpleNamespace(search_model_versions=lambda **_: [SimpleNamespace(tags={"content_hash": digest})])
    monkeypatch.setattr(status, "client", lambda root: versions)
    assert not [item.path for item in status.candidates(Project.at(root)) if item.path.parent.name == "store"]

    moved = tmp_path / "moved"
    shutil.move(root, moved)
    monkeypatch.chdir(moved)
    torch.testing.assert_close(logits(opened("", model_folder("models/sft_control"), Usage()).model), last)
    monkeypatch.chdir(tmp_path)
    assert torch.equal(logits(load_model(moved / "store" / digest)), last)

    clone = tmp_path / "clone"  # as after `dvc pull`: models without a store
    shutil.copytree(moved / "models", clone / "models")
    assert torch.equal(logits(load_model(resolve("models/sft_control", Project.at(clone)))), last)
    shutil.copytree(moved / "models/sft", tmp_path / "alone")
    with pytest.raises(ConfigError, match=r"are in no store above it; copy store/\w+ .* LLADAFLOW_HOME"):
        resolve("alone", Project.at(tmp_path))
    monkeypatch.setenv("LLADAFLOW_HOME", str(moved))
    assert resolve("alone", Project.at(tmp_path)) == tmp_path / "alone"


def test_a_base_that_was_altered_or_is_gone_is_told_before_anything_is_made_of_it(root):
    run_stage(Project.at(root), "sft", [], training.train_stage)
    base = store_folder(Project.at(root), base_name(root / "models/sft").removeprefix("sha256:"))
    file = base / "config.json"
    text = file.read_text()
    file.unlink()
    file.write_text(text + " ")
    for use in (
        lambda: resolve("models/sft"),
        lambda: run_stage(Project.at(root), "sft_control", [], training.train_stage),
    ):
        with pytest.raises(ConfigError, match=r"was altered: its files no longer have the registered hash"):
            use()
    shutil.rmtree(base)
    shutil.rmtree(root / "models/pretrain")
    (root / "params.yaml").write_text(PARAMS.replace("model: sft_control", "model: sft"))
    with pytest.raises(ConfigError, match="are in no store above it"):
        register(Project.at(root), Params.load(root / "params.yaml"), try_out, send_pending)


def test_receipts_that_fail_are_written_by_the_same_command_without_training(root, monkeypatch):
    def broken(lines, path):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(training, "draw_curves", broken)
        with pytest.raises(StageError, match=r"receipts failed: .* writes them without training again"):
            run_stage(Project.at(root), "sft", [], training.train_stage)
    monkeypatch.setattr(DiffusionObjective, "work", None)  # no step is taken
    run_stage(Project.at(root), "sft", [], training.train_stage)
    assert (root / "reports/training/sft.png").is_file()
    assert json.loads((root / "models/sft/training.json").read_text())["steps"] == 3
    assert json.loads((root / "models/sft/usage.json").read_text())["sampling"]["stop_at_eos"]


def test_a_model_of_the_hub_goes_by_its_name_and_commit(tmp_path):
    cached = tmp_path / "hub/models--GSAI-ML--LLaDA-8B-Base/snapshots" / ("0" * 39 + "a")
    cached.mkdir(parents=True)
    name = lasting_name(cached, "digest")
    assert name == f"GSAI-ML/LLaDA-8B-Base@{'0' * 39}a"
    keep_base(Project.at(tmp_path), cached, name)
    assert not (tmp_path / "store").exists()
    hold_base(Project.at(tmp_path), cached)


def test_an_adapter_of_nothing_is_refused(root):
    with pytest.raises(ConfigError, match=r"sft.lora adapts a model, and sft.init_from names none"):
        run_stage(
            Project.at(root), "sft", ["sft.init_from=null", "model={d_model: 32, n_layers: 1}"], training.train_stage
        )


def test_a_commit_of_a_model_of_the_hub(tmp_path, monkeypatch):
    asked = []

    def download(name, revision, allow_patterns):
        asked.append((name, revision))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    for name in ("owner/name@0a1b", "owner/name"):
        assert resolve(name, Project.at(tmp_path)) == tmp_path
    assert asked == [("owner/name", "0a1b"), ("owner/name", None)]
