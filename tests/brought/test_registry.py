"""Models as people register them: what cannot be loaded or does not answer replaces no champion.

A new case from a bug report is a line of the table: its name, how the folder of the trained model is changed, settings of
`register` beside it, and a piece of the error.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llada_core.settings import ConfigError
from tasks.errors import StageError
from tasks.launch.status import COLUMNS, line_of, state_of
from tasks.launch.trial import try_out
from tasks.project import Project
from tasks.record.registry import (  # fmt: skip
    Version,
    keep,
    receipts,
    require_weights,
    resolve,
    store_folder,
    verified,
    versions,
    write_receipt,
)
from tasks.record.runs import all_runs
from tasks.work.register import promote, roll_back
from tests.tasks.test_registry import PARAMS, empty_database, register, root, saved, trained  # noqa: F401  (fixtures)


def cut_short(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def of_nan(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({k: torch.full_like(v, float("nan")) for k, v in weights.items()}, folder / "model.safetensors")


def one_weight_less(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights.pop(sorted(weights)[0])
    save_file(weights, folder / "model.safetensors")


def without(*names: str):
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return change


def written(name: str, text: str):
    return lambda folder: (folder / name).write_text(text)


def wider(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"d_model": 64}))


def as_it_is(folder: Path) -> None:
    pass


ADAPTER = '{"base_model_name_or_path": "sha256:' + "0" * 64 + '", "peft_type": "LORA"}'
LONG = {"sampling": {"max_new_tokens": 512, "block_length": 512, "steps": 512}}  # the tiny model takes 128 tokens
BROKEN = [
    ("cut short", cut_short, {}, "model.safetensors: damaged or cut short"),
    ("text", written("model.safetensors", "weights"), {}, "damaged or cut short"),
    ("no weights", without("model.safetensors"), {}, "neither model.safetensors nor"),
    ("no config", without("config.json"), {}, "no config.json there"),
    ("no tokenizer", without("tokenizer.json"), {}, "does not answer: .*tokenizer"),
    ("NaN", of_nan, {}, "does not answer: .*computes no numbers"),
    ("a weight less", one_weight_less, {}, "does not answer: .*missing"),
    ("another shape", wider, {}, "does not answer: "),
    ("config is no JSON", written("config.json", "{"), {}, "does not answer: .*config.json"),
    ("too long", as_it_is, LONG, "does not answer: .* longer than the model's 128"),
    ("no such device", as_it_is, {"device": "cuda:7"}, "does not answer: .*cuda:7"),
    ("adapter of nothing", written("adapter_config.json", ADAPTER), {}, "are in no store above it"),
]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project without a database: trials need none."""
    (tmp_path / "params.yaml").write_text(PARAMS)
    monkeypatch.delenv("LLADAFLOW_HOME", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def asked(project: Path, **settings: object) -> None:
    """What is asked of the trained model before an alias moves."""
    digest = keep(Project.at(project), project / "models/sft")
    write_receipt(Project.at(project), {"event": "version", "name": "toy", "hash": digest} | settings)
    require_weights(verified(Project.at(project), digest))
    try_out(Project.at(project), Version("toy", "2", digest))


@pytest.mark.parametrize(("name", "change", "changes", "line"), BROKEN)
def test_what_is_asked_before_an_alias_moves(project, name, change, changes, line) -> None:
    saved(project, "two", main=90, side=50)
    change(project / "models/sft")
    with pytest.raises((ValueError, OSError, StageError), match=line):
        asked(project, **changes)


@pytest.mark.parametrize(
    "change", [cut_short, written("model.safetensors", "weights"), without("model.safetensors"), without("config.json")]
)
def test_headers_are_seen_before_a_version_is_made(project, monkeypatch, change) -> None:
    """By the process that registers, before it asks for a job or writes a receipt."""
    saved(project, "two", main=90, side=50)
    change(project / "models/sft")
    monkeypatch.setattr("tasks.record.tracking.send_pending", lambda _: pytest.fail("it was not looked at"))
    with pytest.raises((ValueError, OSError), match=r"model.safetensors|config.json"):
        register(project)
    assert not list(receipts(Project.at(project)))


def test_a_trial_is_a_run_as_others_are(project, capsys) -> None:
    saved(project, "one", main=50, side=50)
    asked(project)
    (run,) = all_runs(Project.at(project))
    assert (run.stage, state_of(run), run.job) == ("trial", "done", None)
    assert "asked 'Hello', it answers" in capsys.readouterr().out
    assert len(line_of(run)) == len(COLUMNS)


@pytest.mark.faults
def test_a_trial_is_launched_as_evaluations_are(project) -> None:
    """Whatever other stages are, and alone, however many processes share an evaluation."""
    own = "{kind: local, cpu_processes: 2, shards: 2, restarts: 0}"
    (project / "params.yaml").write_text(PARAMS.replace("inline}", f"inline, stages: {{evaluate: {own}}}}}"))
    saved(project, "one", main=50, side=50)
    asked(project)
    of_nan(project / "models/sft")
    with pytest.raises(StageError, match=r"does not answer: \S+: the model computes no numbers .*`llada logs trial-"):
        asked(project)
    runs = list(all_runs(Project.at(project)))
    assert sorted((run.job_name.split()[0], run.succeeded) for run in runs) == [("local", False), ("local", True)]


def test_what_does_not_answer_replaces_no_champion(root) -> None:  # noqa: F811
    trained(root, "one", main=50, side=50)
    saved(root, "two", main=90, side=50)
    of_nan(root / "models/sft")
    with pytest.raises(StageError, match=r"toy version 2 does not become champion, .* computes no numbers"):
        register(root)
    with pytest.raises(StageError, match="does not become champion"):  # by a person neither
        promote(Project.at(root), "toy", "2", "by hand", try_out)
    assert [v.aliases for v in versions(Project.at(root), "toy")] == [("champion",), ("candidate",)]
    assert (resolve("toy@champion") / "label").read_text() == "one"
    assert (resolve("toy@candidate") / "label").read_text() == "two"


def test_a_champion_that_is_no_more_what_it_was_is_not_rolled_back_to(root) -> None:  # noqa: F811
    first = trained(root, "one", main=50, side=50)
    trained(root, "two", main=90, side=50)
    label = store_folder(Project.at(root), first["hash"]) / "label"
    label.unlink()
    label.write_text("other")
    with pytest.raises(ConfigError, match="was altered"):
        roll_back(Project.at(root), "toy", "rolled back", try_out)
    assert (resolve("toy@champion") / "label").read_text() == "two"
