"""The ranks of a run as one small value: who am I, agree on something, add numbers up.

Uses CPU tensors, so that agreeing never waits for an accelerator. Knows nothing of models.
"""

import os
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin, InitProcessGroupKwargs
from torch.distributed.fsdp import MixedPrecisionPolicy

from llada_core.config.dotted import require_package
from llada_core.config.training import TrainingParams

LOCAL_RANK = "LOCAL_RANK"  # set by torchrun and by accelerate's launcher of several ranks: which one of this node


def rank_device() -> torch.device:
    """The device that this rank computes on: the GPU of its place on the node, as accelerate counts them, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get(LOCAL_RANK, "0")) % torch.cuda.device_count())


class Ranks:
    """All processes that train together; one process needs no communication at all."""

    def __init__(self) -> None:
        running = dist.is_available() and dist.is_initialized()
        self.index = dist.get_rank() if running else 0
        self.count = dist.get_world_size() if running else 1

    @property
    def first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.index == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value added up over all ranks."""
        if self.count == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def all(self, value: bool) -> bool:
        """Whether every rank says yes."""
        return self.sum([float(value)])[0] == self.count

    def any(self, value: bool) -> bool:
        """Whether some rank says yes."""
        return self.sum([float(value)])[0] > 0

    def join(self, part: torch.Tensor, start: int, total: int) -> torch.Tensor:
        """Every rank's rows put together: mine are rows `start` onwards of `total`; CPU tensors, numbers below 2**53."""
        if self.count == 1:
            return part
        whole = torch.zeros((total, *part.shape[1:]), dtype=torch.float64)
        whole[start : start + len(part)] = part.to(torch.float64)
        dist.all_reduce(whole)
        return whole.to(part.dtype)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.sum([0.0])


def accelerator_for(params: TrainingParams, *, cpu: bool, block_classes: tuple[str, ...]) -> Accelerator:
    """The accelerate engine for the distribution asked for; raises ValueError when another one would run.

    `block_classes`: names of the module classes that FSDP shards one by one.
    """
    wanted = params.distribution
    group = InitProcessGroupKwargs(timeout=timedelta(minutes=wanted.timeout_minutes))
    if not cpu and LOCAL_RANK in os.environ:
        # Ranks agree through CPU tensors, so gloo beside NCCL. Only for launched processes: accelerate makes the group
        # where a launcher named the rank, but expects one to exist wherever it is given a backend.
        group = InitProcessGroupKwargs(backend="cpu:gloo,cuda:nccl", timeout=group.timeout)
    fsdp = deepspeed = None
    if wanted.kind == "fsdp":
        fsdp = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            reshard_after_forward=True,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=list(block_classes),
            state_dict_type="SHARDED_STATE_DICT",
            activation_checkpointing=params.activation_checkpointing,
            cpu_offload=wanted.offload,
            mixed_precision_policy=precision_policy(params),
        )
    if wanted.kind in ("zero2", "zero3"):
        require_package("deepspeed", "zero", f"distribution {wanted.kind}")
        from accelerate import DeepSpeedPlugin

        deepspeed = DeepSpeedPlugin(
            zero_stage=int(wanted.kind[-1]),
            gradient_clipping=params.clip,
            offload_optimizer_device="cpu" if wanted.offload else "none",
        )
        # Rows per forward and rank, which DeepSpeed asks for and only its own data loaders would use.
        deepspeed.deepspeed_config["train_micro_batch_size_per_gpu"] = params.micro_batch_size or 1
    engine = Accelerator(
        cpu=cpu,
        mixed_precision="bf16" if params.precision == "bf16" else "no",
        fsdp_plugin=fsdp,
        deepspeed_plugin=deepspeed,
        kwargs_handlers=[group],
    )
    _assert_distribution(params, engine)
    return engine


def precision_policy(params: TrainingParams) -> MixedPrecisionPolicy:
    """Autocast's precision: products in bf16, residuals, losses and the sums of gradients in fp32 (accelerate: all bf16)."""
    low = torch.bfloat16 if params.precision == "bf16" else None
    return MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)


def _assert_distribution(params: TrainingParams, engine: Accelerator) -> None:
    wanted = params.distribution
    runs = engine.distributed_type.value
    allowed = {
        "auto": ("NO", "MULTI_CPU", "MULTI_GPU"),
        "none": ("NO",),
        "ddp": ("MULTI_CPU", "MULTI_GPU"),
        "fsdp": ("FSDP",),
        "zero2": ("DEEPSPEED",),
        "zero3": ("DEEPSPEED",),
    }[wanted.kind]
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if runs not in allowed or engine.num_processes != launched:
        raise ValueError(
            f"distribution {wanted.kind!r} was asked for, but {runs} runs with {engine.num_processes} of "
            f"{launched} launched processes; launch with torchrun or accelerate, or change distribution.kind"
        )
    if wanted.processes is not None and wanted.processes != engine.num_processes:
        raise ValueError(f"distribution.processes is {wanted.processes}, but {engine.num_processes} run")
