"""`llada export`: a folder that stands on its own."""

from pathlib import Path

import llada_core


def test_an_export_is_self_contained_and_loads(call, tiny):
    Path(tiny, "training.json").write_text('{"stage": "sft", "steps": 7, "run": "x"}')
    result = call("export", "mine/exported", "-m", tiny)
    assert result.exit_code == 0, result.stderr
    folder = Path("mine/exported")
    model = llada_core.load_model(folder)
    assert model.special_tokens == llada_core.load_model(tiny).special_tokens
    card = (folder / "README.md").read_text()
    assert "training steps: 7" in card
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
