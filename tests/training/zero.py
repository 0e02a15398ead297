"""ZeRO-2 and ZeRO-3 for real, on two CPU ranks: `python -m tests.training.zero FOLDER`, where the package deepspeed is.

Trains the same tiny model in one process and under each, undisturbed and stopped and resumed, and prints how far losses
and exported weights lie apart. By hand only: accelerate has no ZeRO on a CPU, so a rank tells it that it is a GPU.
"""

import json
import os
import sys
from pathlib import Path
from subprocess import run

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import load_file

import llada_core.training.train as stages
from llada_core.training.params import PretrainParams
from llada_core.training.train import RunPaths, train
from tests.tiny import tiny_pair
from tests.training.data import write_data

SETTINGS = {
    "max_steps": 6, "batch_size": 4, "log_every": 1, "save_every": 3, "samples": 0, "validation_rows": 2,
}  # fmt: skip


def rank(kind: str, folder: Path, stop: str) -> None:
    """One rank of one run; with `stop` it asks to stop after the third step."""
    torch.set_num_threads(1)
    if kind != "none":
        import deepspeed  # noqa: F401
        import deepspeed.comm.torch as communication

        communication.build_shm_op = lambda: None  # would compile a kernel
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.DEEPSPEED
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        real = stages.accelerator_for
        stages.accelerator_for = lambda params, *, cpu, block_classes: real(
            params, cpu=False, block_classes=block_classes
        )

    def follow(line: dict) -> None:
        if stop and line["step"] == 3 and "loss" in line:
            (folder / "STOP").touch()

    params = PretrainParams(**SETTINGS, micro_batch_size=2, distribution={"kind": kind})
    train(params, *tiny_pair(), RunPaths(folder.parent / "data", folder, folder / "model"), seed=1, follow=follow)


def main(root: Path) -> None:
    """Runs everything and prints one line per run."""
    write_data(root / "data")
    for kind, parts in (
        ("none", [""]),
        ("zero2", [""]),
        ("zero2", ["stop", ""]),
        ("zero3", [""]),
        ("zero3", ["stop", ""]),
    ):
        folder = root / f"{kind}{'-resumed' if len(parts) > 1 else ''}"
        for stop in parts:
            torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29517"]
            command = [sys.executable, *(torchrun if kind != "none" else [])]
            environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
            done = run(
                [*command, "-m", "tests.training.zero", kind, str(folder), stop],
                env=environment, capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr[-3000:]
        found, plain = load_file(folder / "model/model.safetensors"), load_file(root / "none/model/model.safetensors")
        apart = max(float((found[name] - plain[name]).abs().max()) for name in plain)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        print(
            f"{folder.name}: weights {apart:.1e} from one process, losses", *(x["loss"] for x in lines if "loss" in x)
        )


if __name__ == "__main__":
    if len(sys.argv) > 2:
        rank(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
    else:
        main(Path(sys.argv[1]))
