"""Ranks, precision, accelerate, the optimiser and its learning-rate curve."""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from llada_core.modeling.predictor import MaskPredictor
from llada_core.settings import require_package
from llada_core.training.params import TrainingParams

# Uses CPU tensors, so that agreeing never waits for an accelerator.

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

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor on any device, of one shape on all ranks, added up over them in place; no rank waits for its device."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

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
        # Zeros where others have their rows, then one sum: works with any backend and unequal parts, and float64 holds every
        # token id and float32 exactly.
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


@contextmanager
def buffers_apart(model: nn.Module) -> Iterator[None]:
    """While a model is prepared: accelerate takes what FSDP stores for shards, and buffers, such as a router's bias, are none.

    So they pass for what is not stored, which it keeps on every rank, and are stored again afterwards.
    """
    kept = [
        (module, name)
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if buffer is not None and name not in module._non_persistent_buffers_set
    ]
    for module, name in kept:
        module._non_persistent_buffers_set.add(name)
    try:
        yield
    finally:
        for module, name in kept:
            module._non_persistent_buffers_set.discard(name)


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


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are made orthogonal (Jordan et al., 2024): `torch.optim.Muon`, its work shared by the ranks.

    Ranks hold whole parameters and equal gradients; each makes every n-th matrix orthogonal and tells the others, so
    that the result does not depend on their number.
    Updates are scaled to AdamW's root mean square: 0.2 sqrt(max(rows, columns)) (arXiv:2502.16982, section 2.2).
    """

    def __init__(
        self, params: Sequence[nn.Parameter], *, lr: float, weight_decay: float, momentum: float = 0.95
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        ranks = Ranks()
        for group in self.param_groups:
            # By size, so that ranks which wait for each other do the same work; sorting keeps the order of equals.
            trained = sorted((p for p in group["params"] if p.grad is not None), key=lambda p: -p.numel())
            for start in range(0, len(trained), ranks.count):
                self._one_each(trained[start : start + ranks.count], group, ranks)

    def _one_each(self, params: list[nn.Parameter], group: dict[str, Any], ranks: Ranks) -> None:
        """Update at most one matrix a rank. Beside the model a rank holds its own update and the one it is told, no more:
        with hundreds of ranks all of theirs together would be a second model."""
        mine = params[ranks.index] if ranks.index < len(params) else None
        own = None if mine is None else orthogonal(self._ahead(mine, group["momentum"]))
        for i, param in enumerate(params):
            if param is not mine:
                self._remember(param, group["momentum"])
            update = own if own is not None and param is mine else torch.empty_like(param)
            if ranks.count > 1:
                dist.broadcast(update, src=i)
            # An orthogonal (R, C) matrix has a root mean square of 1 / sqrt(max(R, C)); AdamW's updates have about 0.2.
            rate = group["lr"] * 0.2 * math.sqrt(max(param.shape))
            param.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)

    def _remember(self, param: nn.Parameter, momentum: float) -> Tensor:
        """The running mean of gradients, with this one; every rank keeps all of them, as every checkpoint does."""
        gradient, state = param.grad, self.state[param]
        assert gradient is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        return state["momentum_buffer"].lerp_(gradient, 1 - momentum)

    def _ahead(self, param: nn.Parameter, momentum: float) -> Tensor:
        """That mean, looked ahead of as Nesterov does."""
        mean, gradient = self._remember(param, momentum), param.grad
        assert gradient is not None
        return gradient.lerp(mean, momentum)


def orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """Nearly the nearest orthogonal matrix to (R, C): its singular values go to between 0.5 and 1.5. In bfloat16.

    Each step is the quintic a x + b x^3 + c x^5 of the singular values, written as products of the matrix with itself;
    its coefficients make small values grow fastest (Jordan et al., 2024).
    """
    # Not the coefficients that converge to 1: these rise steepest at 0 and then wander between 0.5 and 1.5, which training
    # does not notice and which saves half of the steps.
    a, b, c = 3.4445, -4.7750, 2.0315
    # The iteration needs only x x^T, and of a matrix and its transpose one of the two Grams is smaller.
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.bfloat16()
    x = x.T if tall else x  # the Gram matrix is the small one
    x = x / x.norm().clamp(min=1e-7)  # no singular value beyond 1
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).to(matrix.dtype, memory_format=torch.contiguous_format)


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024) for the matrices inside the blocks, AdamW for everything else, as one optimiser.

    Muon's steps are scaled to AdamW's root mean square (arXiv:2502.16982), so one learning rate serves both.
    """

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self._parts = tuple(parts)
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        groups = iter(self.param_groups)
        for part in self._parts:
            part.state = self.state
            part.param_groups = [next(groups) for _ in part.param_groups]

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for part in self._parts:
            part.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()


def optimiser_for(model: MaskPredictor, params: TrainingParams) -> torch.optim.Optimizer:
    """The optimiser that `params.optimiser` names, over the parameters that train; norms and biases do not decay."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    hidden = _hidden_matrices(model) if params.optimiser == "muon" else set()
    matrices = [p for p in trainable if p.ndim >= 2 and p not in hidden]
    groups = [
        {"params": matrices, "weight_decay": params.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]  # of adapters all weights are matrices inside the blocks
    adamw = [torch.optim.AdamW(groups, lr=params.learning_rate, betas=params.betas, fused=True)] if groups else []
    if not hidden:
        return adamw[0]
    chosen = [p for p in trainable if p in hidden]
    muon = Muon(chosen, lr=params.learning_rate, weight_decay=params.weight_decay)
    return MuonAndAdamW([muon, *adamw])


def _hidden_matrices(model: MaskPredictor) -> set[nn.Parameter]:
    outer = {id(m.weight) for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None}
    # Rows of the vocabulary's tables are not a map between spaces whose directions should count alike; AdamW keeps them.
    return {p for p in model.parameters() if p.requires_grad and p.ndim == 2 and id(p) not in outer}


def learning_rate(params: TrainingParams, step: int, progress: float) -> float:
    """The learning rate of update number `step` (from 0) when `progress` in [0, 1] of the run is done.

    `progress` rather than a last step, because a run may end after a given number of FLOPs. The paper's curve is wsd:
    linear warm-up, constant, linear decay to `final_ratio`; or any `phases`, each a straight line.
    """
    if params.schedule == "phases":
        return _on_phases(params, step)
    if step < params.warmup >= 1:
        return params.learning_rate * (step + 1) / params.warmup
    if progress < params.warmup < 1:
        return params.learning_rate * max(progress / params.warmup, 0.01)
    start = params.warmup if params.warmup < 1 else 0.0
    # The curve begins where warm-up ends, so that it is whole whatever the warm-up's length.
    done = min(max((progress - start) / (1 - start), 0.0), 1.0)
    return params.learning_rate * _shape(params, progress, done)


def _shape(params: TrainingParams, progress: float, done: float) -> float:
    low = params.final_ratio
    if params.schedule == "cosine":
        return low + (1 - low) * (1 + math.cos(math.pi * done)) / 2
    if params.schedule == "linear":
        return 1 - (1 - low) * done
    if params.schedule == "wsd" and params.decay and progress > 1 - params.decay:
        return 1 - (1 - low) * min((progress - (1 - params.decay)) / params.decay, 1.0)
    return 1.0


def _on_phases(params: TrainingParams, step: int) -> float:
    for phase in params.phases:
        if step < phase.steps:
            return phase.start + (phase.end - phase.start) * step / phase.steps
        step -= phase.steps
    return params.phases[-1].end
