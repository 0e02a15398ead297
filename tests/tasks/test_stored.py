"""What the project wrote before its rebuild opens with the code of today: run folders, receipts, weights, an MLflow version.

`tests/golden/stored` was made by commit 840aeac with `llada run smoke`: three of its run folders without their trees, its
store, and the folder that MLflow keeps of the registered version (its code under a name that no linter reads).
"""

import shutil
from pathlib import Path

import pytest

from llada_core.training.progress import read_metrics
from tasks.folders import content_hash
from tasks.launch.status import state_of
from tasks.project import Params, Project
from tasks.record.registry import resolve, versions
from tasks.record.runs import RunFolder, differences
from tasks.record.versions import restore
from tests.reference import GOLDEN

HASH = "5b3843fb534f03d861dbea280e7c694fbdb3c14c738c3c9ff8090fcc210f0973"


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose store and runs are those of then, with no database."""
    for name in ("store", "runs"):
        shutil.copytree(GOLDEN / "stored" / name, tmp_path / name)
    (tmp_path / "params.yaml").write_text("name: smoke\nstages: []\n")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_run_folders_are_read_as_ever(stored: Path) -> None:
    runs = {folder.name.partition("-")[0]: RunFolder(folder) for folder in (stored / "runs").iterdir()}
    assert set(runs) == {"grpo", "sft", "report"}
    assert all(run.succeeded and state_of(run) == "done" for run in runs.values())
    params = Params.parse(runs["grpo"].request["all_params"], "then")
    assert params.training("grpo").max_steps == 4
    today = {"settings": {"grpo": {"max_steps": 4}}, "code": {}, "inputs": {}}
    assert differences(today, runs["grpo"].request)  # what a run of today changes of it is told
    assert read_metrics(runs["sft"].path / "metrics.jsonl")[-1]["step"] == 20


def test_a_lost_version_is_registered_anew_from_its_receipt(stored: Path) -> None:
    restore(Project.at(stored))
    (version,) = versions(Project.at(stored), "smoke")
    assert version.hash == HASH
    folder = resolve("models:/smoke@champion", Project.at(stored))
    assert content_hash(folder) == HASH


def test_the_stored_version_answers_by_its_own_code(stored: Path) -> None:
    import mlflow.pyfunc

    place = stored / "version"
    shutil.copytree(GOLDEN / "stored" / "version", place)
    (place / "mlflow_model.py.txt").rename(place / "mlflow_model.py")
    model = mlflow.pyfunc.load_model(str(place), model_config={"path": str(stored / "store" / HASH)})
    (answer,) = model.predict([{"messages": [{"role": "user", "content": "Solve the sudoku 1000020000300004"}]}])
    assert answer.role == "assistant"
    assert answer.content
