"""Two `llada eval` at once into one folder: each finds its model's result there, and neither loses the other's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llada_core.modeling import save_model
from tests.cli.test_evaluate import PARAMS, PUZZLE
from tests.tiny import tiny_pair

REPOSITORY = Path(__file__).resolve().parents[2]


def evaluations(place: Path, *models: str) -> list[subprocess.Popen]:
    """One process for each model, all into `out`, at the same time."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    environment |= {"MLFLOW_TRACKING_URI": f"sqlite:///{place}/mlflow.db", "LLADAFLOW_TRACKING": "off"}
    command = [sys.executable, "-c", "from cli.main import llada; llada()", "eval", "seats", "--out", "out", "--model"]
    how = {"cwd": place, "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return [subprocess.Popen([*command, model], **how) for model in models]


@pytest.mark.faults
@pytest.mark.parametrize("models", [("one", "two"), ("one", "one")], ids=["two models", "one model twice"])
def test_two_evaluations_into_one_folder_lose_nothing(tmp_path: Path, models: tuple[str, str]) -> None:
    for seed, name in enumerate(("one", "two")):
        save_model(tiny_pair(seed=seed)[0], tmp_path / name, tiny_pair()[1])
    (tmp_path / "data/eval").mkdir(parents=True)
    rows = [PUZZLE | {"id": str(number), "prompt": f"seats {number}"} for number in range(40)]
    (tmp_path / "data/eval/seats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "params.yaml").write_text(PARAMS)
    started = evaluations(tmp_path, *models)
    said = [process.communicate(timeout=600)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert json.loads((tmp_path / "out/seats.json").read_text())["models"].keys() == set(models)
    for name in set(models):
        samples = (tmp_path / f"out/seats/{name}.samples.jsonl").read_text().splitlines()
        assert [json.loads(line)["id"] for line in samples] == [str(number) for number in range(40)]
    table = json.loads((tmp_path / "out/table.json").read_text())  # of whoever ended last
    assert all(f'"{name}"' in json.dumps(table) for name in models)
