"""The ranks of a run as one small value: who am I, agree on something, add numbers up.

Uses CPU tensors, so that agreeing never waits for an accelerator. Knows nothing of models.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, InitProcessGroupKwargs
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from llada_core.modeling.predictor import MaskPredictor
from llada_core.settings import require_package
from llada_core.training.params import TrainingParams

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
    """Weights are sent in bf16 and their gradients summed over ranks in fp32 (accelerate by itself: all in bf16)."""
    low = torch.bfloat16 if params.precision == "bf16" else None
    return MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)


@contextmanager
def tied_table_last(model: MaskPredictor) -> Iterator[None]:
    """While a model is prepared: accelerate does not shard a tied table of token vectors on its own.

    On its own it would be put away after the first layer, and be missing where it is the vocabulary projection. It goes
    to FSDP's outermost unit instead, which is whole from the beginning of a pass to its end.
    """
    if model.get_output_embeddings() is not None:
        yield
        return
    model.get_input_embeddings = lambda: None  # type: ignore[method-assign, assignment, return-value]
    try:
        yield
    finally:
        del model.get_input_embeddings


def same_precision(model: nn.Module, params: TrainingParams, engine: Accelerator) -> None:
    """Let a prepared model compute under autocast however its ranks share the work; accelerate leaves FSDP2 without.

    So in bf16 one rank, DDP and FSDP2 have the same of each: weights rounded to bf16 in the forward pass and products in
    bf16; the residual stream, norms, routers' probabilities, losses, gradients' sums and the weights that are updated in
    fp32. DeepSpeed keeps its own order: all of the forward pass in bf16.
    """
    if params.precision == "bf16" and engine.distributed_type == DistributedType.FSDP:
        model.forward = torch.autocast(engine.device.type, torch.bfloat16)(model.forward)


def loading_device(params: TrainingParams) -> torch.device:
    """Where a rank puts the weights that it starts from: on its own device, except where each keeps only a part.

    Those are cut up from a copy on the CPU, block by block; 4-bit weights cannot be cut up and lie whole on the device.
    """
    four_bit = params.lora is not None and params.lora.four_bit
    cut = params.distribution.kind in ("fsdp", "zero3") and not four_bit
    return torch.device("cpu") if cut else rank_device()


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
