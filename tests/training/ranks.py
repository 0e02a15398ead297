"""One rank of a training run on the CPU, started by torchrun: `ranks.py SCENARIOS.json`.

accelerate does not shard on the CPU by itself; telling it that the ranks are GPUs, before it builds an engine, makes it
use the same FSDP2 path (only here: it is a private detail of accelerate).
"""

import json
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

import llada_core.training.checkpoint as checkpoint_module
from llada_core.modeling import save_model
from llada_core.training.checkpoint import Stored
from llada_core.training.loop import Loop
from llada_core.training.params import GRPOParams, PretrainParams, SFTParams
from llada_core.training.train import RunPaths, train
from tests.tiny import tiny_pair

STAGES = {"pretrain": PretrainParams, "sft": SFTParams, "grpo": GRPOParams}
SHARDED = {}


def note_sharding(run):
    """How many parameters of the prepared model are sharded, before it trains."""

    def wrapped(loop):
        parameters = list(loop.parts.model.parameters())
        SHARDED["sharded"] = sum(isinstance(p, DTensor) and p.to_local().numel() < p.numel() for p in parameters)
        SHARDED["dtypes"] = sorted({str(p.dtype) for p in parameters})
        SHARDED["all"] = len(parameters)
        return run(loop)

    return wrapped


def stopping(folder, step):
    """Asks for a stop once `step` has been logged."""

    def follow(line):
        if line["step"] == step:
            (folder / "STOP").touch()

    return follow


def hanging(run):
    """The last rank stops answering at its second step."""

    def wrapped(loop):
        if loop.progress.step == 1 and not loop.ranks.first:
            signal.pause()
        return run(loop)

    return wrapped


def counting_reads(counts):
    """Notes which files of a checkpoint this rank hashes, and how many bytes of which tensors it reads."""
    hash_of, parts = checkpoint_module.file_hash, Stored._parts

    def hashed(path):
        if path.parent.name.startswith("step-"):  # not one that is being written
            counts["hashed"].append(path.name)
        return hash_of(path)

    def read(stored, name, start, stop):
        for place, part in parts(stored, name, start, stop):
            counts["read"] += part.nbytes
            yield place, part

    checkpoint_module.file_hash, Stored._parts = hashed, read


def main(path):
    torch.set_num_threads(1)
    Loop.run = note_sharding(Loop.run)
    scenarios = json.loads(Path(path).read_text())
    # The group is made here, before the product would make it: so is its timeout.
    minutes = scenarios[0]["params"].get("distribution", {}).get("timeout_minutes", 30.0)
    state = PartialState(cpu=True, timeout=timedelta(minutes=minutes))
    real = state.distributed_type
    for scenario in scenarios:
        params = STAGES[scenario["stage"]].model_validate(scenario["params"], strict=False)
        AcceleratorState._reset_state()
        kind = DistributedType.MULTI_GPU if params.distribution.kind == "fsdp" else real
        PartialState._shared_state["distributed_type"] = kind
        model, tokenizer = tiny_pair(scenario.get("model", "llada"), **scenario.get("shape", {}))
        folder = Path(scenario["run"])
        if scenario.get("hang"):
            Loop._step = hanging(Loop._step)
        if scenario.get("count"):
            counts = {"hashed": [], "read": 0}
            counting_reads(counts)
        if params.lora is not None and state.process_index == 0:
            save_model(model, folder / "base")
        place = RunPaths(Path(scenario["data"]), folder, folder / "model", base="../base")
        train(params, model, tokenizer, place, seed=1, follow=stopping(folder, scenario.get("stop")))
        if scenario.get("count"):
            (folder / f"reads-{state.process_index}.json").write_text(json.dumps(counts))
        if state.process_index == 0:
            (folder / "sharding.json").write_text(json.dumps(SHARDED))
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
