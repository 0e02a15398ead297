"""The weights of a model before and after training: fp32 masters and adapters in, one published-layout folder out.

Knows sharded parameters and adapters; does not know steps, losses or checkpoints.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.tensor import DTensor

from llada_core.modeling import MaskPredictor, merge_adapter, save_model
from llada_core.modeling.adapters import add_lora, save_adapter
from llada_core.modeling.network import LLaDAModelLM, LLaDAMoEModelLM, MaskedLM, choose_attention
from llada_core.tokenizer import Tokenizer
from llada_core.training.params import TrainingParams
from llada_core.training.ranks import Ranks


@dataclass(frozen=True)
class Place:
    """Where a run reads and writes."""

    data: Path
    run: Path
    export: Path | None = None  # the trained model, in the published layout
    base: str = ""  # how an exported adapter names the model it belongs to (see `base_of`)

    def check(self, params: TrainingParams) -> None:
        """Raises ValueError where an adapter could not be loaded again after training."""
        if self.export is not None and params.lora is not None and not params.lora.merge and not self.base:
            raise ValueError("an adapter alone is exported (lora.merge: false): say whose it is, Place(base=...)")


def prepare_weights(model: MaskPredictor, params: TrainingParams) -> None:
    """Adapters, if asked for, and fp32 for every weight that trains: in bf16 small updates would round away."""
    if params.attn_implementation is not None:
        choose_attention(model, params.attn_implementation)
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
    place: Place,
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
    if not split or not isinstance(model, LLaDAModelLM):
        return model
    with torch.device("meta"):
        return (LLaDAMoEModelLM if isinstance(model, LLaDAMoEModelLM) else LLaDAModelLM)(model.config)  # type: ignore[arg-type]


def whole_weights(
    model: MaskPredictor, ranks: Ranks, *, dtype: torch.dtype | None = None, only_trained: bool = False
) -> dict[str, Tensor]:
    """Every stored tensor of the network, put together from its shards, on the first rank's CPU (empty elsewhere).

    dtype: of floating-point tensors; None: their own. only_trained: without what is frozen.
    """
    network = model.backbone if isinstance(model, MaskedLM) else model
    weights = {}
    for name, tensor in network.state_dict(keep_vars=True).items():
        if only_trained and not tensor.requires_grad:
            continue
        with _gathered(tensor):
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if ranks.first:
                kind = dtype if dtype is not None and whole.is_floating_point() else whole.dtype
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
