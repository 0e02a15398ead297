"""Real training over two nodes of the throw-away cluster: the weights of one process, also after a killed rank."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tasks.project import Project
from tasks.record.runs import RunFolder, all_runs
from tests.slurm.cluster import Cluster
from tests.slurm.recovery import Recovery
from tests.tasks.test_runs import finish, program
from tests.waiting import processes, wait_for

pytestmark = pytest.mark.faults
ROOT = Path(__file__).resolve().parents[2]

PARAMS = """\
name: nodes
seed: 3
stages: [pretrain]
model: {d_model: 32, n_layers: 2, n_heads: 4, mlp_hidden_size: 64, max_sequence_length: 128}
pretrain: {max_steps: 8, batch_size: 8, learning_rate: 1.0e-3, save_every: 2, log_every: 1, distribution: {kind: none}}
launch:
  kind: inline
  threads: 1
  poll_seconds: 0.3
  slurm: {nodes: 2, cpus_per_task: 1, memory: 2G}
"""
# accelerate shards on the CPU only if it takes the ranks for GPUs (a private detail of it; only in tests).
SHARDING = """\
import os
if "RANK" in os.environ:
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
"""


@pytest.fixture
def training(tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with the real stage, a tiny model and counting sequences."""
    from tests.training.data import write_data

    cluster.reset()
    root = tmp_path / "project"
    for package in ("tasks", "llada_core"):
        shutil.copytree(ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "dvc.yaml", root / "dvc.yaml")
    (root / "params.yaml").write_text(PARAMS)
    write_data(root / "data")
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook/sitecustomize.py").write_text(SHARDING)
    monkeypatch.chdir(root)
    for name, value in {"SLURM_CONF": str(cluster.conf), "LLADAFLOW_TRACKING": "off", "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    return root


def train(root: Path, kind: str, *overrides: str) -> dict:
    """Train on two nodes with this distribution; returns the weights."""
    hook = f"launch.env.PYTHONPATH={root.parent / 'hook'}" if kind == "fsdp" else "launch.env={}"
    nodes = ["launch.kind=slurm", f"pretrain.distribution.kind={kind}", hook, *overrides] if kind != "none" else []
    finish(program("tasks.pretrain", *nodes))
    return load_file(root / "models/pretrain/model.safetensors")


def furthest(one: dict, two: dict) -> float:
    assert one.keys() == two.keys()
    return max((one[name] - two[name]).abs().max().item() for name in one)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_nodes_make_the_weights_of_one_process(training: Path, kind: str) -> None:
    alone = train(training, "none")
    for made in ("models", "runs"):  # how a run is distributed does not name it: the finished one would be the result
        shutil.rmtree(training / made)
    assert furthest(alone, train(training, kind)) < 1e-5
    assert "--num_machines 2" in (slurm_runs(training)[0].path / "job.sh").read_text()


def test_a_killed_rank_costs_no_more_than_a_checkpoint_interval(
    training: Path, cluster: Cluster, cost: Callable[[str, str], Recovery]
) -> None:
    recovery = cost("kill -9 of one rank of two nodes, in training", "the next step, in the same job")
    undisturbed = train(training, "ddp", "pretrain.max_steps=60")
    cluster.reset()  # success is known before the job has left
    for made in ("models", "runs"):
        shutil.rmtree(training / made)
    process = program("tasks.pretrain", "pretrain.max_steps=60", "launch.kind=slurm", "pretrain.distribution.kind=ddp")
    wait_for("a checkpoint", lambda: list(training.glob("runs/*/checkpoints/step-*")))
    run = slurm_runs(training)[0]
    (training / "tasks/accelerate/ddp.yaml").write_text("the restart reads the snapshot's")
    os.kill(ranks_of(run)[-1], signal.SIGKILL)
    recovery.struck()
    assert "restart 1 of 2" in finish(process)
    assert furthest(undisturbed, load_file(training / "models/pretrain/model.safetensors")) == 0
    events = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    resumed = [i for i, line in enumerate(events) if line.get("event") == "resumed"]
    assert len(resumed) == 1
    lost = events[resumed[0] - 1]["step"] - events[resumed[0]]["step"]
    assert 0 <= lost <= 2  # one checkpoint interval
    recovery.over(lost, next(line["time"] for line in events[resumed[0] :] if "loss" in line))


def ranks_of(run: RunFolder) -> list[int]:
    """The processes that train for a run."""
    mark = f"LLADAFLOW_RUN={run.path}".encode()
    found = ((pid, values) for pid, values in processes("environ") if mark in values)
    return [pid for pid, values in found if any(value.startswith(b"LOCAL_RANK=") for value in values)]


def slurm_runs(root: Path) -> list[RunFolder]:
    return [run for run in all_runs(Project.at(root)) if (run.job or {}).get("launcher") == "slurm"]
