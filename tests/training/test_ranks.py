"""Two ranks are one process: losses, parameters, exports and resumes, with DDP and with FSDP2 really sharding."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llada_core.modeling import load_model
from llada_core.training.metrics import read_metrics
from tests.training.data import write_data

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


def scenario(data, run, stage="sft", model="llada", **changes):
    values = {
        "max_steps": 20,
        "batch_size": 16,
        "learning_rate": 3e-3,
        "log_every": 1,
        "save_every": 10,
        "warmup": 2,
        "samples": 0,
    }
    return {"data": str(data), "run": str(run), "stage": stage, "model": model, "params": {**values, **changes}}


def launch(folder, processes, scenarios):
    file = folder / f"scenarios-{processes}-{len(list(folder.iterdir()))}.json"
    file.write_text(json.dumps(scenarios))
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", f"--master-port={port}",
               "-m", "tests.training.ranks", str(file)]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def losses(folder):
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]


def weights(folder):
    return load_model(folder / "model").state_dict()


def same(one, other, tolerance=1e-5):
    torch.testing.assert_close(torch.tensor(losses(one)), torch.tensor(losses(other)), atol=tolerance, rtol=tolerance)
    mine, theirs = weights(one), weights(other)
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], atol=tolerance, rtol=tolerance, msg=name)


KINDS = [("llada", "ddp"), ("llada", "fsdp"), ("llada_moe", "ddp"), ("llada_moe", "fsdp")]


@pytest.fixture(scope="session")
def runs(data, tmp_path_factory):
    """All runs of this file: one launch per number of ranks."""
    folder = tmp_path_factory.mktemp("runs")
    alone = [scenario(data, folder / f"{model}-{n}", model=model, micro_batch_size=16 // n)
             for model in ("llada", "llada_moe") for n in (1, 2, 4)]  # fmt: skip
    pairs = [scenario(data, folder / f"{model}-{kind}", model=model, micro_batch_size=4, distribution={"kind": kind})
             for model, kind in KINDS]  # fmt: skip
    halves = [
        scenario(data, folder / f"half-{kind}", max_steps=10, distribution={"kind": kind}) for kind in ("ddp", "fsdp")
    ]
    launch(folder, 1, alone)
    launch(folder, 2, pairs + halves)
    return folder


@pytest.mark.parametrize("model", ["llada", "llada_moe"])
@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulation_changes_nothing(runs, model, accumulation):
    same(runs / f"{model}-{accumulation}", runs / f"{model}-1")


@pytest.mark.parametrize(("model", "kind"), KINDS)
def test_two_ranks_are_one(runs, model, kind):
    same(runs / f"{model}-{kind}", runs / f"{model}-1")
    found = json.loads((runs / f"{model}-{kind}" / "sharding.json").read_text())
    assert found["dtypes"] == ["torch.float32"]
    assert found["sharded"] == (found["all"] if kind == "fsdp" else 0)
