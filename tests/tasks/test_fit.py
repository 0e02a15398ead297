"""A profile that cannot fit is refused before anything is submitted."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llada_core.config.base import ConfigError
from llada_core.config.launch import LaunchParams
from llada_core.config.model import ModelParams
from llada_core.config.training import TrainingParams
from tasks.fit import parameters, state_bytes
from tests.tasks.test_runs import program

LLADA_8B = ModelParams(d_model=4096, n_layers=32, n_heads=32, mlp_hidden_size=12288)


def training(**values: object) -> TrainingParams:
    return TrainingParams.parse({"max_steps": 1, **values}, "sft")


def test_what_is_counted(tmp_path: Path) -> None:
    count = parameters(training(), LLADA_8B, tmp_path)
    assert count == pytest.approx(8.02e9 - 2 * 126464 * 4096, rel=0.01)  # all but the embedding and the head
    assert state_bytes(training(), count, 8) == 16 * count
    assert state_bytes(training(distribution={"kind": "fsdp"}), count, 8) == 2 * count
    assert state_bytes(training(distribution={"kind": "zero2"}), count, 8) == (4 + 12 / 8) * count
    assert state_bytes(training(lora={}), count, 8) == 2 * count
    save_file({"a": torch.zeros(3, 5), "b": torch.zeros(7)}, tmp_path / "model.safetensors")
    assert parameters(training(init_from=str(tmp_path)), None, tmp_path) == 22


@pytest.mark.parametrize(
    ("slurm", "line"),
    [
        ("{memory: 40M}", "optimiser take 0.2 GiB of each rank, which has 0.0 (launch.slurm.memory)"),
        ("{gpus_per_node: 1}, gpu_gigabytes: 0.1", "has 0.1 (launch.gpu_gigabytes); use distribution.kind: fsdp"),
    ],
)
def test_it_is_refused_before_submission(project: Path, slurm: str, line: str) -> None:
    shape = "model={d_model: 256, n_layers: 12, n_heads: 4, mlp_hidden_size: 768}"
    process = program("tasks.pretrain", shape, f"launch={{kind: slurm, slurm: {slurm}}}", PATH="/nowhere")
    text = process.communicate(timeout=60)[0]
    assert process.returncode == 2
    assert line in text
    assert not list(project.glob("runs/*/job.json"))


def test_the_memory_of_a_gpu_is_a_launch_setting() -> None:
    with pytest.raises(ConfigError, match="gpu_gigabytes"):
        LaunchParams.parse({"gpu_gigabytes": 0}, "launch")
