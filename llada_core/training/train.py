"""A stage's block, a model and data in; a trained, exported model out."""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llada_core.modeling import MaskPredictor, merge_adapter, save_model
from llada_core.modeling.adapters import add_lora, save_adapter
from llada_core.settings import ConfigError, function_at
from llada_core.tokenizer import Tokenizer
from llada_core.training.accelerator import (
    Ranks,
    accelerator_for,
    buffers_apart,
    optimiser_for,
    same_precision,
    tied_table_last,
)
from llada_core.training.balance import RouterBalance
from llada_core.training.loop import Loop, TrainingState
from llada_core.training.objectives import Objective, stored_rows
from llada_core.training.params import GRPOParams, TrainingParams
from llada_core.training.progress import Follower, MetricsFile, active_parameters
from llada_core.training.rollouts import specimens_of, write_samples


@dataclass(frozen=True)
class RunPaths:
    """Where a run reads and writes."""

    data: Path
    run: Path
    export: Path | None = None  # the trained model, in the published layout
    base: str = ""  # how an exported adapter names the model it belongs to (see `base_of`)

    def check(self, params: TrainingParams) -> None:
        """Raises ValueError where an adapter could not be loaded again after training."""
        if self.export is not None and params.lora is not None and not params.lora.merge and not self.base:
            raise ValueError("an adapter alone is exported (lora.merge: false): say whose it is, Place(base=...)")


def by_blocks(model: MaskPredictor, params: TrainingParams) -> MaskPredictor:
    """The model that attends by the blocks that are asked for; ValueError where there is none, or nobody says how long."""
    if params.blocks is None:
        return model
    if params.blocks.length is None and model.block_length is None:
        raise ValueError(f"a model of kind {model.kind} has no blocks yet: say how long they shall be, blocks.length")
    made = model if params.blocks.length is None else model.by_blocks(params.blocks.length)
    if made is not model and params.lora is not None and not params.lora.merge:
        raise ValueError(
            "an adapter alone would be put on a model that does not attend by blocks: set lora.merge: true"
        )
    return made


def prepare_weights(model: MaskPredictor, params: TrainingParams) -> None:
    """Adapters, if asked for, and fp32 for every weight that trains: in bf16 small updates would round away."""
    if params.attn_implementation is not None:
        model.choose_attention(params.attn_implementation)
    if params.lora is not None:
        whole = params.lora.bias != "none" or params.lora.modules_to_save
        if whole and model.dtype != torch.float32 and params.precision == "fp32":
            raise ValueError(
                "lora.bias and lora.modules_to_save train in fp32 beside frozen weights in "
                f"{str(model.dtype).removeprefix('torch.')}, which autocast brings together: set precision: bf16"
            )
        add_lora(model, params.lora)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def export(
    model: MaskPredictor,
    place: RunPaths,
    tokenizer: Tokenizer,
    params: TrainingParams,
    ranks: Ranks,
    *,
    dtype: torch.dtype,
) -> None:
    """Write the trained model in the dtype it came in, or its adapter; every rank must call this.

    What fails here (a full disk, a wrong merge) loses nothing: the last checkpoint is complete, and the run goes on
    from it, that is, makes its export again without a step of training. Raises OSError that says so.
    """
    assert place.export is not None
    kept = f"{place.run / 'checkpoints'}"
    try:
        if params.lora is None:
            _export_model(model, place.export, tokenizer, ranks, dtype=dtype)
            return
        adapter = place.run / "adapter" if params.lora.merge else place.export
        _export_adapter(model, adapter, place.base, tokenizer, ranks)
        if params.lora.merge:
            kept = f"{adapter} (`llada export FOLDER --merge -m {adapter}` makes a model of it) and {kept}"
            merge_adapter(model)
            _export_model(model, place.export, tokenizer, ranks, dtype=dtype)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise OSError(
            f"trained to the end, but the export failed: {' '.join(str(error).split())}; nothing is lost: the weights are "
            f"in {kept}, and the same command exports them without training again"
        ) from error


def _export_model(
    model: MaskPredictor, folder: Path, tokenizer: Tokenizer, ranks: Ranks, *, dtype: torch.dtype
) -> None:
    weights = whole_weights(model, ranks, dtype=dtype)
    if ranks.first:
        save_model(_plain(model), folder, tokenizer, weights=weights)


def _export_adapter(model: MaskPredictor, folder: Path, base: str, tokenizer: Tokenizer, ranks: Ranks) -> None:
    weights = whole_weights(model, ranks, only_trained=True)
    if ranks.first:
        save_adapter(model, folder, base, tokenizer, weights=weights)


def _plain(model: MaskPredictor) -> MaskPredictor:
    """The model, or while it is sharded (which changes its class, and with it the names it saves) an empty one like it."""
    split = any(isinstance(p, DTensor) or _split_by_zero(p) for p in model.parameters())
    if not split:
        return model
    with torch.device("meta"):
        return model.family.network_class.of_config(model.network.config, model.special_tokens)


def whole_weights(
    model: MaskPredictor, ranks: Ranks, *, dtype: torch.dtype | None = None, only_trained: bool = False
) -> dict[str, Tensor]:
    """Every stored tensor of the network, put together from its shards, on the first rank's CPU (empty elsewhere).

    dtype: of floating-point tensors; None: their own. only_trained: without what is frozen.
    """
    weights = {}
    for name, tensor in model.network.state_dict(keep_vars=True).items():
        if only_trained and not tensor.requires_grad:
            continue
        with _gathered(tensor):
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if ranks.first:
                # A buffer, such as a router's bias, is not trained and stays as it came.
                rounded = dtype is not None and isinstance(tensor, nn.Parameter) and whole.is_floating_point()
                kind = dtype if rounded else whole.dtype
                weights[name] = whole.detach().to("cpu", kind, copy=_split_by_zero(tensor))
    return weights


def _split_by_zero(parameter: Tensor) -> bool:
    return hasattr(parameter, "ds_id")


def _gathered(parameter: Tensor) -> AbstractContextManager[object]:
    """While it lasts the parameter is whole, also under DeepSpeed's ZeRO-3."""
    if not _split_by_zero(parameter):
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters  # type: ignore[import-not-found]

    return GatheredParameters([parameter])


@dataclass(frozen=True)
class Receipt:
    """What a training run cost and how it ended; `finished` is false after a stop request."""

    finished: bool
    steps: int
    tokens: float
    flops: float
    seconds: float
    parameters: int
    fingerprint: str


def train(
    params: TrainingParams,
    model: MaskPredictor,
    tokenizer: Tokenizer,
    place: RunPaths,
    *,
    seed: int = 0,
    follow: Follower | None = None,
) -> Receipt:
    """Train in the run folder, or go on where it stopped; export when finished.

    `follow` is called with every line of metrics.jsonl. Raises ValueError for data or a run folder that do not fit,
    `DivergedError` when the loss cannot be saved, OSError when the last checkpoint or the export cannot be written.
    """
    place.check(params)
    model = by_blocks(model, params)
    place.run.mkdir(parents=True, exist_ok=True)
    cpu = not torch.cuda.is_available()
    params = params.settled(gpu=not cpu, published=params.init_from is not None)
    engine = accelerator_for(params, cpu=cpu, block_classes=block_classes(model))
    parameters, stored = active_parameters(model), next(model.parameters()).dtype
    prepare_weights(model, params)
    model.computes_in = torch.bfloat16 if params.precision == "bf16" else None
    ranks = Ranks()
    metrics = MetricsFile(place.run / "metrics.jsonl", ranks, follow)
    objective = objective_for(params, model, tokenizer, place.data, seed=seed)
    _speed(params, model)
    with tied_table_last(model), buffers_apart(model):
        prepared, optimiser = engine.prepare(model, optimiser_for(model, params))
    same_precision(prepared, params, engine)
    # Of the model where it lies now: loads are counted beside the biases.
    balance = RouterBalance(model, params.router_bias_rate) if params.router_bias_rate else None
    fingerprint = fingerprint_of(params, place.data, seed)
    parts = TrainingState(engine, prepared, optimiser, objective, parameters, fingerprint, balance)
    loop = Loop(parts, params, place.run, seed=seed, metrics=metrics, sampler=_sampler(params, tokenizer, place.data))
    with _tf32(params):
        progress, finished = loop.run(), not loop.stopped
    receipt = Receipt(
        finished,
        progress.step,
        progress.tokens,
        progress.flops,
        progress.seconds,
        parameters,
        parts.fingerprint["configuration"],
    )
    if finished and place.export is not None:
        export(model, place, tokenizer, params, ranks, dtype=stored)
    ranks.barrier()
    return receipt


@contextmanager
def _tf32(params: TrainingParams) -> Iterator[None]:
    """With bf16, what products remain in fp32 run on a GPU's tensor cores, with ten bits of mantissa."""
    before = torch.get_float32_matmul_precision()
    if params.precision == "bf16":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _speed(params: TrainingParams, model: MaskPredictor) -> None:
    """What changes time and memory but no number: activations computed again, each kind of block compiled once."""
    if params.activation_checkpointing:  # never accelerate's for FSDP, which would drop out other units the second time
        model.network.gradient_checkpointing_enable({"use_reentrant": False})
    if params.compile:
        for layers in (module for module in model.modules() if isinstance(module, nn.ModuleList)):
            for layer in layers:
                layer.compile()


def block_classes(model: MaskPredictor) -> tuple[str, ...]:
    """Class names of the model's repeated layers, which are sharded one by one."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return tuple(sorted({type(layer).__name__ for layers in lists for layer in layers}))


def objective_for(
    params: TrainingParams, model: MaskPredictor, tokenizer: Tokenizer, data: Path, *, seed: int
) -> Objective:
    """What a stage with these settings minimises, on the prepared data in `data`; raises `ConfigError` for a wrong path, or a
    shift that the model makes itself."""
    if params.right_shift and model.shifted:
        raise ConfigError("right_shift: this model moves its predictions to their own places itself; leave it out")
    make = function_at(params.OBJECTIVE, "objective")
    objective: Objective = make(params, model, tokenizer, data / params.ROWS, seed=seed)
    return objective


def _sampler(params: TrainingParams, tokenizer: Tokenizer, data: Path) -> Callable[[Any], list[dict[str, Any]]]:
    """Writes the same few held-out texts at every validation."""
    settings = longest = None
    if isinstance(params, GRPOParams):
        settings, longest = params.validation or replace(params.sampling, temperature=0.0), params.max_prompt_length
    specimens = specimens_of(stored_rows(data / params.ROWS / "validation"), params.samples, longest)
    return lambda model: write_samples(model, tokenizer, specimens, settings)


def fingerprint_of(params: TrainingParams, data: Path, seed: int) -> dict[str, str]:
    """What must be the same for a checkpoint to be gone on from: configuration, length of the run, data.

    The data is that of this stage: what `prepare` wrote for another one changes nothing here.
    """
    fixed: dict[str, Any] = params.determining() | {"seed": seed}
    length = {name: fixed.pop(name) for name in params.LENGTH}
    del fixed["extend"]  # how a run came to its length
    cards = [data / params.ROWS / "card.json", data / "tokenizer" / "tokenizer.json"]
    parts = [hashlib.sha256(card.read_bytes()).hexdigest() if card.exists() else "none" for card in cards]
    return {"configuration": _digest(fixed), "length": _digest(length), "data": _digest(parts)}


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
