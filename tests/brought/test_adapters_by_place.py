"""Adapters as people bring them: they name their base by a place of a machine, which is not there tomorrow.

A new case from a bug report is a line of PLACES: how an adapter in models/sft names the folder `base` beside models/.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cli.models import exportable
from llada_core.modeling import add_lora, load_model, save_model
from llada_core.modeling.adapters import save_adapter
from llada_core.modeling.families import LoraParams
from llada_core.modeling.folder import base_name
from llada_core.settings import ConfigError
from tasks.folders import content_hash
from tasks.graph import load_stage
from tasks.launch.program import run_stage
from tasks.launch.trial import try_out
from tasks.launch.workspace import with_sources
from tasks.project import Params, Project
from tasks.record.registry import keep, lasting_name, model_hash, resolve, store_folder, verified, versions
from tasks.record.runs import RunFolder, StageContext, StageRequest, fingerprint, open_run, request_of, stage_params
from tasks.record.tracking import send_pending
from tasks.work import evaluate, training
from tasks.work.register import register
from tests.tasks.test_registry import PARAMS, empty_database, root  # noqa: F401  (fixtures)
from tests.tiny import tiny_pair
from tests.training.data import write_data

REPOSITORY = Path(__file__).resolve().parents[2]

PLACES: tuple[tuple[str, Callable[[Path], str]], ...] = (
    ("beside the adapter", lambda place: "../../base"),
    ("a whole path", lambda place: str(place / "base")),
    ("a whole path with an end", lambda place: f"{place / 'base'}/"),
    ("from the working directory", lambda place: "base"),
    ("from the working directory, spelled out", lambda place: "./base"),
)


def adapter(folder: Path, base: str, seed: int = 1) -> Path:
    """An adapter of the tiny model that does something."""
    model, tokenizer = tiny_pair()
    add_lora(model, LoraParams(r=2), seed=seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.05 * seed
    save_adapter(model, folder, base, tokenizer)
    return folder


def base(folder: Path, seed: int = 0) -> Path:
    model, tokenizer = tiny_pair(seed=seed)
    save_model(model, folder, tokenizer)
    return folder


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_model(folder)(torch.arange(10, 30)[None]).logits


def ungated(project: Path) -> dict:
    (project / "params.yaml").write_text(PARAMS.partition("  gate:")[0] + "  gate: {}\n")
    return register(Project.at(project), Params.load(project / "params.yaml"), try_out, send_pending)


@pytest.mark.parametrize(("name", "place"), PLACES, ids=[name for name, _ in PLACES])
def test_a_kept_adapter_brings_the_base_that_it_names_by_its_place(tmp_path, monkeypatch, name, place) -> None:
    monkeypatch.chdir(tmp_path)
    base(tmp_path / "base")
    brought = adapter(tmp_path / "models/sft", place(tmp_path))
    known, before = logits(brought), content_hash(brought)
    digest = keep(Project.at(tmp_path), brought)
    assert content_hash(brought) == before  # what a person brought is not altered
    for folder in ("base", "models"):
        shutil.rmtree(tmp_path / folder)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert torch.equal(logits(verified(Project.at(tmp_path), digest)), known)


def test_a_registered_adapter_is_tried_and_loads_although_its_base_is_gone(root) -> None:  # noqa: F811
    base(root / "base")
    known = logits(adapter(root / "models/sft", "../../base"))
    first, again = ungated(root), ungated(root)
    assert first["aliases"] == ["candidate", "champion"]
    assert (first["version"], first["hash"]) == (again["version"], again["hash"])
    shutil.rmtree(root / "base")
    base(root / "base", seed=1)
    assert ungated(root)["hash"] != first["hash"]
    assert len(versions(Project.at(root), "toy")) == 2
    shutil.rmtree(root / "base")
    assert torch.equal(logits(resolve("models:/toy/1", Project.at(root))), known)


def test_an_adapter_of_an_adapter_brings_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base(tmp_path / "base")
    adapter(tmp_path / "first", "../base")
    second = adapter(tmp_path / "second", "../first", seed=2)
    known = logits(second)
    digest = keep(Project.at(tmp_path), second)
    for folder in ("base", "first", "second"):
        shutil.rmtree(tmp_path / folder)
    assert torch.equal(logits(verified(Project.at(tmp_path), digest)), known)
    assert sorted(p.name for p in (tmp_path / "store").iterdir() if p.name != digest) == sorted(
        {
            base_name(store_folder(Project.at(tmp_path), digest)).removeprefix("sha256:"),
            content_hash(base(tmp_path / "base")),
        }
    )


def test_a_copy_of_the_hub_that_is_named_by_its_place_goes_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cached = base(tmp_path / "hub/models--owner--name/snapshots" / ("0" * 39 + "a"))
    kept = store_folder(Project.at(tmp_path), keep(Project.at(tmp_path), adapter(tmp_path / "one", str(cached))))
    assert base_name(kept) == f"owner/name@{'0' * 39}a"
    assert [p.name for p in (tmp_path / "store").iterdir()] == [kept.name]


@pytest.mark.parametrize("place", ["../gone", "/gone/base", "gone", "./gone", "a/b/c"])
def test_a_base_that_is_not_at_its_place_is_told_at_once(tmp_path: Path, monkeypatch, place: str) -> None:
    monkeypatch.chdir(tmp_path)
    brought = adapter(tmp_path / "one", place)
    for use in (lambda: keep(Project.at(tmp_path), brought), lambda: resolve("one", Project.at(tmp_path))):
        with pytest.raises(ConfigError, match=r"one: its base, '\S+', is no folder that lies there"):
            use()
    assert not list(tmp_path.glob("store/*"))


def test_other_names_stay_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    digest = keep(Project.at(tmp_path), base(tmp_path / "base"))
    for number, name in enumerate(("owner/name@main", f"sha256:{digest}")):
        brought = adapter(tmp_path / f"adapter-{number}", name)
        assert keep(Project.at(tmp_path), brought) == content_hash(brought)
    assert lasting_name(brought, "digest") == "sha256:digest"


GRAPH = (REPOSITORY / "dvc.yaml").read_text()
MEASURED = """\
name: toy
stages: [evaluate]
evaluate: {benchmarks: [sudoku], models: [brought=outside/adapter]}
launch: {kind: inline}
"""


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project, and outside of it an adapter that names the base beside it by its place."""
    folder = tmp_path / "project"
    write_data(folder / "data", rows=16)
    (folder / "data/eval").mkdir(exist_ok=True)
    for package in ("tasks", "llada_core"):
        (folder / package).symlink_to(REPOSITORY / package)
    (folder / "dvc.yaml").write_text(GRAPH)
    (folder / "outside").symlink_to(tmp_path / "outside")
    base(tmp_path / "outside/base")
    adapter(tmp_path / "outside/adapter", "../base")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("LLADAFLOW_TRACKING", "off")
    monkeypatch.delenv("LLADAFLOW_HOME", raising=False)
    return folder


def measuring(checkout: Path) -> tuple[StageRequest, RunFolder]:
    """What the evaluation of the adapter asks for, and its run folder."""
    (checkout / "params.yaml").write_text(MEASURED)
    params = with_sources(stage_params(Project.at(checkout), []), Project.at(checkout))
    stage = load_stage(Project.at(checkout), "evaluate@sudoku", params)
    asked = request_of(Project.at(checkout), stage, params)
    return asked, open_run(Project.at(checkout), stage, params, asked)


def in_place(folder: Path) -> None:
    """Other weights, as large and as old as those before."""
    file = folder / "model.safetensors"
    stat = file.stat()
    base(folder, seed=1)
    assert file.stat().st_size == stat.st_size
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_an_evaluation_is_done_again_when_the_base_was_changed_in_place(checkout: Path, tmp_path: Path) -> None:
    (first, run), (same, _) = measuring(checkout), measuring(checkout)
    assert fingerprint(first) == fingerprint(same)
    outside = str((tmp_path / "outside/base").resolve())
    assert outside in first["inputs"]  # and so in what DVC looks at
    in_place(tmp_path / "outside/base")
    now, other = measuring(checkout)
    assert fingerprint(now) != fingerprint(first)
    assert other.path != run.path
    assert not (other.path / "answers").exists()  # kept answers lie in the run's folder


@pytest.mark.parametrize("changed", ["base", "adapter"])
def test_a_job_that_waited_measures_nothing_that_has_changed_since(checkout: Path, tmp_path: Path, changed) -> None:
    _, run = measuring(checkout)
    if changed == "base":
        in_place(tmp_path / "outside/base")
    else:
        adapter(tmp_path / "outside/adapter", "../base", seed=2)
    work = StageContext(Params.parse(run.request["all_params"], "test"), run, "evaluate", "sudoku")
    with pytest.raises(ConfigError, match=r"outside/adapter has changed since this job was submitted"):
        evaluate.run(work)


def test_the_hash_of_a_model_is_that_of_all_of_it(checkout: Path, tmp_path: Path) -> None:
    """Also of one inside the project, which no graph names the base of."""
    whole = model_hash(tmp_path / "outside/adapter")
    assert whole != content_hash(tmp_path / "outside/adapter")
    assert keep(Project.at(checkout), tmp_path / "outside/adapter") == whole
    in_place(tmp_path / "outside/base")
    assert model_hash(tmp_path / "outside/adapter") != whole
    kept = store_folder(Project.at(checkout), whole)
    assert model_hash(kept) == content_hash(kept) == whole
    file = tmp_path / "outside/base/config.json"
    assert model_hash(file) == content_hash(file)


def test_what_is_trained_from_such_an_adapter_loads_without_it(checkout: Path, tmp_path: Path) -> None:
    lora = "{r: 2, merge: false}"
    block = f"max_steps: 3, batch_size: 8, init_from: outside/adapter, samples: 0, warmup: 1, lora: {lora}"
    (checkout / "params.yaml").write_text(f"name: toy\nstages: [sft]\nsft: {{{block}}}\nlaunch: {{kind: inline}}\n")
    run_stage(Project.at(checkout), "sft", [], training.train_stage)
    known = logits(Path("models/sft"))
    shutil.rmtree(tmp_path / "outside")
    assert torch.equal(logits(Path("models/sft")), known)


def test_an_adapter_is_not_exported_without_the_folder_that_it_names(checkout: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is an adapter of .*outside/base, .*; --merge makes a model of both"):
        exportable(tmp_path / "outside/adapter", merge=False)
    assert exportable(tmp_path / "outside/adapter", merge=True)[0] == "transformers"
