"""Whether training can fit into the memory that a cluster job asks for: a lower bound, told before submission.

Counts weights, gradients and the optimiser's moments, never activations. Needs no torch.
"""

import json
import math
from pathlib import Path

from llada_core.config.base import ConfigError
from llada_core.config.launch import LaunchParams
from llada_core.config.model import ModelParams
from llada_core.config.params import TRAINING_STAGES, Params
from llada_core.config.training import TrainingParams
from tasks.launch_script import ranks_per_node


def require_fit(stage: str, params: Params, launch: LaunchParams, root: Path) -> None:
    """Raises `ConfigError` when the state of a training stage alone is larger than what each rank will have."""
    slurm = launch.slurm
    training = params.training(stage) if stage in TRAINING_STAGES else None
    ranks = ranks_per_node(training, launch, slurm=True)
    room, key = launch.gpu_gigabytes, "launch.gpu_gigabytes"
    if not slurm.gpus_per_node:
        room, key = _gigabytes(slurm.memory) / ranks if slurm.memory else None, "launch.slurm.memory"
    if training is None or room is None or training.distribution.offload:
        return
    needed = state_bytes(training, parameters(training, params.model, root), ranks * slurm.nodes) / 2**30
    if needed > room:
        raise ConfigError(
            f"{stage} cannot fit: weights, gradients and optimiser take {needed:.1f} GiB of each rank, which has {room:.1f} "
            f"({key}); use distribution.kind: fsdp over more ranks, lora, or a smaller model"
        )


def state_bytes(training: TrainingParams, count: int, ranks: int) -> float:
    """Bytes on each rank: fp32 weights, gradients and moments, split as the distribution splits them."""
    if training.lora is not None:
        return 2.0 * count  # adapters are small; frozen weights may be bf16
    moments = 4 if training.optimiser == "muon" else 8
    split = {"fsdp": 8 + moments, "zero3": 8 + moments, "zero2": 4 + moments}.get(training.distribution.kind, 0)
    return count * ((8 + moments - split) + split / ranks)


def parameters(training: TrainingParams, model: ModelParams | None, root: Path) -> int:
    """How many weights the blocks of a new model have, or a folder's safetensors; 0 where nobody knows yet."""
    if training.init_from is not None and training.init_from not in TRAINING_STAGES:
        return sum(_stored(path) for path in (root / training.init_from).glob("*.safetensors"))
    if model is None or model.kind == "masked_lm":
        return 0
    attention = 2 * model.d_model**2 * (1 + (model.n_kv_heads or model.n_heads) / model.n_heads)
    hidden = model.mlp_hidden_size if model.kind == "llada" else model.num_experts * model.expert_hidden_size
    return int(model.n_layers * (attention + 3 * model.d_model * hidden))


def _stored(path: Path) -> int:
    with path.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")


def _gigabytes(memory: str) -> float:
    unit = memory[-1] if memory[-1].isalpha() else "M"
    return float(memory.rstrip("KMGT")) * 1024.0 ** ("KMGT".index(unit) - 2)
