"""Registration by reference, the gate, promotion, roll-back, a lost database, altered weights."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest

from llada_core.modeling import save_model
from llada_core.settings import ConfigError
from tasks import folders
from tasks.errors import StageError
from tasks.folders import content_hash, write_json
from tasks.launch.trial import try_out
from tasks.project import Params, Project
from tasks.record.registry import (
    _stored_versions,
    client,
    resolve,
    store_folder,
    trained_on,
    version_of,
    versions,
)
from tasks.record.tracking import send_pending
from tasks.record.versions import restore, restore_if_empty
from tasks.work import register as stage
from tasks.work.register import gate, promote, roll_back
from tests.tiny import tiny_pair

REPOSITORY = Path(__file__).parents[2]
PARAMS = """\
name: toy
stages: [register]
launch: {kind: inline}
register:
  name: toy
  model: sft
  gate: {better: [main], not_worse: [side], at_least: {main: 0.1}}
"""


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated mlflow.db, made once: making one takes seconds."""
    from mlflow.tracking import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_registered_models()
    return path


@pytest.fixture
def root(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project that has trained `models/sft`; nothing is registered yet."""
    (tmp_path / "params.yaml").write_text(PARAMS)
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def saved(root: Path, label: str, *, main: int, side: int, of: int = 100) -> None:
    """Pretend that a run has trained and measured a model with so many right answers."""
    folder = root / "models/sft"
    shutil.rmtree(folder, ignore_errors=True)
    save_model(tiny_pair()[0], folder, tiny_pair()[1])
    (folder / "label").write_text(label)
    (root / "data/sft").mkdir(parents=True, exist_ok=True)
    (root / "data/sft/rows").write_text("rows")
    inputs = {"data/sft": content_hash(root / "data/sft")}
    write_json(folder / "training.json", {"stage": "sft", "run": "sft-0", "inputs": inputs})
    for name, right in (("main", main), ("side", side)):
        lines = [json.dumps({"id": i, "score": float(i < right)}) for i in range(of)]
        path = root / f"reports/eval/{name}/sft.samples.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n")


def register(root: Path) -> dict:
    """Register what `saved` has made."""
    return stage.register(Project.at(root), Params.load(root / "params.yaml"), try_out, send_pending)


def trained(root: Path, label: str, *, main: int, side: int) -> dict:
    """Both."""
    saved(root, label, main=main, side=side)
    return register(root)


def test_accepted_within_noise_and_worse(root: Path) -> None:
    first = trained(root, "one", main=50, side=50)
    assert first["gate"] == {"passed": True, "reason": "there was no champion"}
    assert first["aliases"] == ["candidate", "champion"]
    noise = trained(root, "two", main=52, side=50)
    assert not noise["gate"]["passed"]
    assert "not better on main by more than noise" in noise["gate"]["reason"]
    assert noise["champion"] == "1"
    worse = trained(root, "three", main=90, side=30)
    assert "worse on side" in worse["gate"]["reason"]
    better = trained(root, "four", main=90, side=49)
    assert better["gate"]["passed"]
    assert better["champion"] == better["version"] == "4"
    low = trained(root, "five", main=5, side=50)
    assert "below the required 0.100" in low["gate"]["reason"]
    assert [v.aliases for v in versions(Project.at(root), "toy")] == [(), (), (), ("champion",), ("candidate",)]


def test_older_versions_still_load_and_roll_back(root: Path) -> None:
    trained(root, "one", main=50, side=50)
    trained(root, "two", main=90, side=50)
    assert (resolve("models:/toy/1") / "label").read_text() == "one"
    assert (resolve("toy@champion") / "label").read_text() == "two"
    assert roll_back(Project.at(root), "toy", "rolled back", try_out).number == "1"
    assert (resolve("models:/toy@champion") / "label").read_text() == "one"
    assert promote(Project.at(root), "toy", "candidate", "by hand", try_out).number == "2"
    record = json.loads(version_of(Project.at(root), "toy", "2").tags["champion.record"])
    assert record["why"] == "by hand"
    assert {"who", "when"} <= record.keys()


def test_registered_by_reference_and_once(root: Path) -> None:
    first = trained(root, "one", main=50, side=50)
    stored = store_folder(Project.at(root), first["hash"]) / "model.safetensors"
    assert stored.stat().st_ino == (root / "models/sft/model.safetensors").stat().st_ino
    again = trained(root, "one", main=50, side=50)
    assert again["version"] == first["version"] == "1"
    shutil.rmtree(root / "models/sft")
    assert stored.is_file()
    artifacts = [p for p in (root / "mlartifacts").rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in artifacts) < 100_000


def test_a_served_version_lies_where_it_was_registered_to(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.models import get_model_info

    from tasks.record.mlflow_model import ChatModel

    save_model(tiny_pair()[0], root / "weights", tiny_pair()[1])
    (root / "params.yaml").write_text(PARAMS + "  device: cuda:5\n  bits: 8\n")
    with pytest.raises(StageError, match=r"toy version 1 does not become champion, .* device cuda:5: no CUDA GPU"):
        trained(root, "one", main=50, side=50)
    assert versions(Project.at(root), "toy")[0].aliases == ("candidate",)
    config = get_model_info("models:/toy/1").flavors["python_function"]["config"]
    assert (config["device"], config["bits"]) == ("cuda:5", 8)
    config |= {"path": str(root / "weights"), "hash": content_hash(root / "weights")}

    def served(**changes: object) -> ChatModel:
        model = ChatModel()
        model.load_context(SimpleNamespace(model_config=config | changes))
        return model

    with pytest.raises(ValueError, match="device cuda:5: no CUDA GPU is visible"):
        served()
    del config["device"], config["bits"]  # a version of old
    assert served().model.device.type == "cpu"
    monkeypatch.setenv("LLADAFLOW_DEVICE", "mps")
    with pytest.raises(ValueError, match="device mps"):
        served()
    assert served(device="cpu").model.device.type == "cpu"


def lose(root: Path, empty_database: Path) -> None:
    """Empty the database in place: connections of this process would still read a file that was put away."""
    with closing(sqlite3.connect(empty_database)) as empty, closing(sqlite3.connect(root / "mlflow.db")) as database:
        empty.backup(database)


def test_a_lost_database_is_filled_again_from_receipts(root: Path, empty_database: Path) -> None:
    trained(root, "one", main=50, side=50)
    trained(root, "two", main=90, side=50)
    roll_back(Project.at(root), "toy", "rolled back", try_out)
    lose(root, empty_database)
    with pytest.raises(
        ConfigError, match=r"has lost model 'toy'; `llada restore` registers it anew from .*receipts.jso"
    ):
        resolve("toy@champion")
    assert versions(Project.at(root), "toy") == []  # reading has changed nothing
    assert restore(Project.at(root)) == ["toy"]
    assert (resolve("toy@champion") / "label").read_text() == "one"
    assert [(v.number, v.aliases) for v in versions(Project.at(root), "toy")] == [
        ("1", ("champion",)),
        ("2", ("candidate",)),
    ]
    assert restore(Project.at(root)) == []
    lose(root, empty_database)
    restore_if_empty(Project.at(root))  # after a pipeline
    assert [v.aliases for v in versions(Project.at(root), "toy")] == [("champion",), ("candidate",)]


def test_a_run_that_registers_fills_a_lost_registry_first(root: Path, empty_database: Path) -> None:
    trained(root, "one", main=50, side=50)
    trained(root, "two", main=90, side=50)
    lose(root, empty_database)
    worse = trained(root, "three", main=20, side=50)
    assert (worse["version"], worse["champion"]) == ("3", "2")


def test_altered_or_missing_weights_are_refused(root: Path) -> None:
    digest = trained(root, "one", main=50, side=50)["hash"]
    file = store_folder(Project.at(root), digest) / "model.safetensors"
    file.unlink()
    file.write_text("altered")
    with pytest.raises(ConfigError, match="was altered"):
        resolve("toy@champion")
    shutil.rmtree(store_folder(Project.at(root), digest))
    with pytest.raises(ConfigError, match="is gone"):
        resolve("toy@champion")


def test_lineage_leads_back(root: Path) -> None:
    trained(root, "one", main=50, side=50)
    tags = version_of(Project.at(root), "toy", "champion").tags
    assert json.loads(tags["stage_runs"]) == {"sft": "sft-0"}
    digest = content_hash(root / "data/sft")
    assert json.loads(tags["inputs"]) == {"data/sft": digest}
    assert [version.number for version in trained_on(Project.at(root), "data/sft")] == ["1"]
    assert trained_on(Project.at(root), digest[:12]) == trained_on(Project.at(root), "data/sft")
    assert trained_on(Project.at(root), "0000") == []
    assert tags["environment"].startswith("python 3")
    assert {"git_commit", "dvc_lock", "params", "content_hash"} <= tags.keys()


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("toy@nothing", "no version 'nothing'; it has: 1"),
        ("other@champion", "no model 'other' is registered; `make run`"),
        ("./nowhere", "give a folder, models:/NAME@alias, or a Hub name"),
        ("models:/we?ird@x", "give a folder, models:/NAME@alias"),
        ("models:/toy's@x", "give a folder, models:/NAME@alias"),
    ],
)
def test_unknown_names(root: Path, name: str, line: str) -> None:
    trained(root, "one", main=50, side=50)
    with pytest.raises(ConfigError, match=line.replace("?", r"\?")):
        resolve(name)


def test_a_gate_on_what_nobody_measured(root: Path) -> None:
    (root / "params.yaml").write_text(PARAMS.replace("not_worse: [side]", "not_worse: [sidee]"))
    with pytest.raises(ValueError, match="'sidee'; measured are: main, side"):
        trained(root, "one", main=50, side=50)


def test_the_gate_before_a_promotion(root: Path) -> None:
    trained(root, "one", main=50, side=50)
    trained(root, "two", main=90, side=30)
    assert "worse on side" in gate(Project.at(root), "toy", "candidate").reason
    assert gate(Project.at(root), "toy", "1").passed
    with pytest.raises(ConfigError, match="no gate for model 'other'; promote without it"):
        gate(Project.at(root), "other", "1")


def test_an_odd_name_is_told_as_such(root: Path) -> None:
    with pytest.raises(ConfigError, match="is no name of a model; use letters"):
        promote(Project.at(root), "toy' or '1", "1", "why not", try_out)


def test_a_database_that_is_locked_damaged_or_gone(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "PATIENCE", 0.1)
    with sqlite3.connect(root / "mlflow.db", isolation_level=None) as other:
        other.execute("begin exclusive")
        with pytest.raises(OSError, match="database is locked; another program is writing; try again, or use Postgre"):
            versions(Project.at(root), "toy")
    other.close()
    (root / "mlflow.db").write_text("no database" * 100)
    with pytest.raises(OSError, match="not a database; move it away"):
        versions(Project.at(root), "toy")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:secret@127.0.0.1:9/mlflow")
    with pytest.raises(
        OSError, match=r"postgresql://me:\*\*\*@127.0.0.1:9/mlflow: .*refused; start it, or point MLFLOW_TR"
    ):
        versions(Project.at(root), "toy")


AS_IN_A_TERMINAL = """
import sys
from cli.main import llada

sys.argv = ["llada", "sample", "12", "--model", sys.argv[1], "--max-new-tokens", "4"]
try:
    llada()
finally:
    heavy = {"mlflow", "sqlalchemy", "pandas", "gradio", "prefect", "datasets", "lm_eval", "dvc", "matplotlib", "fastapi"}
    assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
"""


def test_a_terminal_reads_mlflows_tables_itself_and_asks_its_client_where_they_are_others(root: Path) -> None:
    trained(root, "one", main=50, side=50)
    trained(root, "two", main=90, side=50)
    talk = client(Project.at(root))
    found = versions(Project.at(root), "toy")
    assert [dict(talk.get_model_version("toy", v.number).tags) for v in found] == [v.tags for v in found]
    assert [v.aliases for v in found] == [(), ("candidate", "champion")]
    for name in ("toy@champion", "models:/toy/1"):
        code = [sys.executable, "-c", AS_IN_A_TERMINAL, name]
        done = subprocess.run(
            code, cwd=root, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
    talk.delete_model_version("toy", "1")
    assert [v.number for v in versions(Project.at(root), "toy")] == ["2"]
    with closing(sqlite3.connect(root / "mlflow.db")) as database:
        database.execute("alter table model_version_tags rename column value to words")
        database.commit()
    assert _stored_versions(Project.at(root), "toy") is None
