"""`llada export`: a folder that stands on its own."""

import json
from pathlib import Path

import pytest
import torch

import llada_core
from llada_core.modeling import add_lora
from llada_core.modeling.adapters import save_adapter
from llada_core.modeling.families import LoraParams
from tasks.folders import content_hash
from tests.tiny import tiny_tokenizer

NAME = "model.transformer.blocks.0.q_proj.weight"


@pytest.fixture
def adapter(tiny, tmp_path):
    """An adapter of the tiny model that does something, and names it by a path."""
    model = llada_core.load_model(tiny)
    add_lora(model, LoraParams(r=2))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.05
    save_adapter(model, tmp_path / "adapter", tiny, tiny_tokenizer())
    (tmp_path / "adapter/training.json").write_text('{"stage": "sft", "steps": 7}')
    return tmp_path / "adapter"


def rename_base(adapter, name):
    file = adapter / "adapter_config.json"
    file.write_text(file.read_text().replace(str(json.loads(file.read_text())["base_model_name_or_path"]), name))


def test_an_adapter_is_merged_when_asked(call, tiny, adapter):
    result = call("export", "merged", "--merge", "-m", str(adapter))
    assert result.exit_code == 0, result.stderr
    merged, stored = llada_core.load_model("merged"), llada_core.load_model(adapter)
    assert all(torch.equal(weight, stored.state_dict()[name]) for name, weight in merged.state_dict().items())
    assert not torch.equal(merged.state_dict()[NAME], llada_core.load_model(tiny).state_dict()[NAME])
    assert {"tokenizer.json", "training.json", "config.json", "README.md"} <= {p.name for p in Path("merged").iterdir()}
    assert not list(Path("merged").glob("adapter*"))
    assert "library_name: transformers" in Path("merged/README.md").read_text()
    refused = call("export", "again", "--merge", "-m", "merged")
    assert refused.exit_code == 2
    assert "no adapter to merge; leave out --merge" in refused.stderr


def test_an_adapter_alone_is_exported_where_its_base_can_be_found(call, tiny, adapter):
    rename_base(adapter, "owner/name")
    assert call("export", "alone", "-m", str(adapter)).exit_code == 0
    assert "base_model: owner/name" in Path("alone/README.md").read_text()
    Path("store").mkdir()
    Path("store", content_hash(Path(tiny))).symlink_to(tiny)
    rename_base(adapter, f"sha256:{content_hash(Path(tiny))}")
    refused = call("export", "other", "-m", str(adapter))
    assert refused.exit_code == 2
    assert "an adapter of weights that only this project has" in refused.stderr
    assert "--merge makes a model of both" in refused.stderr
    assert not Path("other").exists()
    assert call("export", "other", "--merge", "-m", str(adapter)).exit_code == 0


def test_an_export_is_self_contained_and_loads(call, tiny):
    Path(tiny, "training.json").write_text('{"stage": "sft", "steps": 7, "run": "x"}')
    result = call("export", "mine/exported", "-m", tiny)
    assert result.exit_code == 0, result.stderr
    folder = Path("mine/exported")
    model = llada_core.load_model(folder)
    assert model.special_tokens == llada_core.load_model(tiny).special_tokens
    card = (folder / "README.md").read_text()
    assert "- **fine-tuning**: 7 steps" in card
    assert "## How to use it" in card
    shown, _, hidden = card.partition("<details>")
    assert "**run**" not in shown
    assert "**run**: x" in hidden
    assert not any(path.is_symlink() for path in folder.rglob("*"))
    assert [p.name for p in Path("mine").iterdir()] == ["exported"]


def test_an_export_does_not_overwrite_unless_told(call, tiny):
    Path("out").mkdir()
    Path("out/precious").write_text("x")
    refused = call("export", "out", "-m", tiny)
    assert refused.exit_code == 2
    assert "--overwrite" in refused.stderr
    assert Path("out/precious").exists()
    for here in ("", ".", ".."):
        assert "is where this runs" in call("export", here, "-m", tiny, "--overwrite").stderr
    assert call("export", "out", "-m", tiny, "--overwrite").exit_code == 0
    assert not Path("out/precious").exists()


def test_a_folder_that_is_no_model_is_not_exported(call, tmp_path):
    (tmp_path / "empty").mkdir()
    result = call("export", "out", "-m", "empty")
    assert result.exit_code == 2
    assert "no config.json" in result.stderr
    assert not Path("out").exists()


def test_an_export_is_pushed_when_asked(call, tiny, monkeypatch):
    sent = []
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda self, name, **k: sent.append((name, k["private"])))
    monkeypatch.setattr(
        "huggingface_hub.HfApi.upload_folder", lambda self, **k: sent.append(k["folder_path"]) or "there"
    )
    result = call("export", "out", "-m", tiny, "--push", "me/mine")
    assert result.exit_code == 0, result.stderr
    assert sent == [("me/mine", True), Path("out")]
    assert "and at there" in result.stdout
