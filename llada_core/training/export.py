"""The weights of a model before and after training: fp32 masters and adapters in, one published-layout folder out.

Knows sharded parameters and adapters; does not know steps, losses or checkpoints.
"""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from llada_core.config.training import TrainingParams
from llada_core.modeling import MaskPredictor, merge_adapter, save_model
from llada_core.modeling.adapters import add_lora, save_adapter
from llada_core.modeling.masked_lm import MaskedLM
from llada_core.modeling.model import LLaDAModelLM, LLaDAMoEModelLM
from llada_core.tokenizer import Tokenizer
from llada_core.training.ranks import Ranks


def prepare_weights(model: MaskPredictor, params: TrainingParams) -> None:
    """Adapters, if asked for, and fp32 for every weight that trains: in bf16 small updates would round away."""
    if params.lora is not None:
        add_lora(model, params.lora)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def export(
    model: MaskPredictor,
    folder: Path,
    tokenizer: Tokenizer,
    params: TrainingParams,
    ranks: Ranks,
    *,
    dtype: torch.dtype,
) -> None:
    """Write the trained model in the dtype it came in, or its adapter; every rank must call this."""
    if params.lora is not None and not params.lora.merge:
        if ranks.first:
            save_adapter(model, folder, params.init_from or "")
            tokenizer.save(folder)
        return
    if params.lora is not None:
        merge_adapter(model)
    weights = whole_weights(model, dtype, ranks)
    if ranks.first:
        save_model(_plain(model), folder, tokenizer, weights=weights)


def _plain(model: MaskPredictor) -> MaskPredictor:
    """The model, or while it is sharded (which changes its class, and with it the names it saves) an empty one like it."""
    split = any(isinstance(p, DTensor) or _split_by_zero(p) for p in model.parameters())
    if not split or not isinstance(model, LLaDAModelLM):
        return model
    with torch.device("meta"):
        return (LLaDAMoEModelLM if isinstance(model, LLaDAMoEModelLM) else LLaDAModelLM)(model.config)  # type: ignore[arg-type]


def whole_weights(model: MaskPredictor, dtype: torch.dtype, ranks: Ranks) -> dict[str, Tensor]:
    """Every stored tensor of the network, put together from its shards, on the first rank's CPU (empty elsewhere)."""
    network = model.backbone if isinstance(model, MaskedLM) else model
    weights = {}
    for name, tensor in network.state_dict(keep_vars=True).items():
        with _gathered(tensor):
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if ranks.first:
                weights[name] = whole.detach().to(
                    "cpu", dtype if whole.is_floating_point() else whole.dtype, copy=_split_by_zero(tensor)
                )
    return weights


def _split_by_zero(parameter: Tensor) -> bool:
    return hasattr(parameter, "ds_id")


def _gathered(parameter: Tensor) -> AbstractContextManager[object]:
    """While it lasts the parameter is whole, also under DeepSpeed's ZeRO-3."""
    if not _split_by_zero(parameter):
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters  # type: ignore[import-not-found]

    return GatheredParameters([parameter])
