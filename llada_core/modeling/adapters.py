"""Low-rank adapters on a mask predictor, through peft: added, stored, loaded, switched off, merged.

Knows which layers of a network are its linear ones; does not know training. peft is imported when first needed.
Stored adapters have peft's own format and the published parameter names.
"""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llada_core.config.training import LoraParams
from llada_core.modeling.masked_lm import MaskedLM
from llada_core.modeling.model import LLaDAMoEModelLM
from llada_core.modeling.names import own_name, published_name
from llada_core.modeling.predictor import MaskPredictor

_CONFIG, _WEIGHTS, _PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."


def add_lora(model: MaskPredictor, params: LoraParams, seed: int = 0) -> None:
    """Puts trainable low-rank adapters, random by `seed` alone, on the target layers and freezes everything else.

    targets: "all-linear" (every linear layer of the blocks, never head or router), a regular expression on whole
    module names, or module names. `ValueError` names a target that matches no linear layer.
    """
    from peft import LoraConfig, inject_adapter_in_model

    network = _network(model)
    config = LoraConfig(
        r=params.r,
        lora_alpha=params.alpha,
        lora_dropout=params.dropout,
        target_modules=_target_pattern(model, params.targets),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, network)
    network.peft_config = {"default": config}


def linear_layers(model: MaskPredictor) -> list[str]:
    """Names of the linear layers inside the blocks: what "all-linear" adapts; head and router are none of them."""
    network = _network(model)
    head = network.get_output_embeddings()
    body = [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and module is not head and re.search(r"\.\d+\.", name)
    ]
    return [name for name in body if not name.endswith("mlp.gate")]


def _target_pattern(model: MaskPredictor, targets: str | tuple[str, ...]) -> str:
    names = linear_layers(model)
    if targets == "all-linear":
        last = sorted({name.rpartition(".")[2] for name in names})
        return rf".*\.\d+\.(.*\.)?({'|'.join(last)})"
    patterns = [targets] if isinstance(targets, str) else [rf"(.*\.)?{re.escape(t)}" for t in targets]
    for target, pattern in zip([targets] if isinstance(targets, str) else targets, patterns, strict=True):
        if not any(re.fullmatch(pattern, name) for name in names):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
            raise ValueError(f"adapter target {target!r} matches no linear layer of the blocks; they are: {known}")
    # a bare name such as ff_out is the head's too: only layers of the blocks may match
    return rf"(?=.*\.\d+\.)({'|'.join(patterns)})"


def save_adapter(model: MaskPredictor, folder: str | Path, base: str | Path) -> None:
    """Writes the adapter, and the name of the model it belongs to, into `folder`."""
    from peft import get_peft_model_state_dict

    network, folder = _network(model), Path(folder)
    weights: dict[str, Tensor] = get_peft_model_state_dict(network)
    if isinstance(model, LLaDAMoEModelLM):
        weights = {published_name(k): v for k, v in weights.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({_PREFIX + k: v.contiguous() for k, v in weights.items()}, folder / _WEIGHTS, {"format": "pt"})
    config = network.peft_config["default"]
    config.base_model_name_or_path = str(base)
    config.inference_mode = True
    config.save_pretrained(str(folder))


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter rather than a model."""
    return (folder / _CONFIG).is_file()


def base_of(folder: Path) -> str:
    """The folder or Hub name of the model that an adapter belongs to; a relative path counts from the adapter."""
    base = json.loads((folder / _CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{folder / _CONFIG}: base_model_name_or_path is missing, so the adapter has no model")
    return str(folder / base) if (folder / base).is_dir() else str(base)


def load_adapter(model: MaskPredictor, folder: str | Path) -> None:
    """Puts the adapter of `folder` into its base model; `ValueError` unless every one of its weights has a place."""
    from peft import PeftConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict

    network, folder = _network(model), Path(folder)
    if not (folder / _WEIGHTS).is_file():
        raise FileNotFoundError(f"{folder}: no {_WEIGHTS} there")
    config = PeftConfig.from_pretrained(str(folder))
    sparse = isinstance(model, LLaDAMoEModelLM)
    if sparse and not isinstance(config.target_modules, str):
        config.target_modules = {"attn_out" if t == "o_proj" else t for t in config.target_modules}
    weights = {k.removeprefix(_PREFIX): v for k, v in load_file(folder / _WEIGHTS).items()}
    inject_adapter_in_model(config, network)
    named = {own_name(k): v for k, v in weights.items()} if sparse else weights
    places = {name: weight.shape for name, weight in get_peft_model_state_dict(network).items()}
    wrong = sorted(n for n in named.keys() | places.keys() if n not in named or places.get(n) != named[n].shape)
    if wrong:
        where = f"in {len(wrong)} places: {wrong[0]}"
        raise ValueError(f"{folder}: the adapter does not fit {type(network).__name__} {where}")
    set_peft_model_state_dict(network, named)
    network.peft_config = {"default": config}


@contextlib.contextmanager
def adapter_off(model: MaskPredictor) -> Iterator[None]:
    """Within, the model computes what it did before its adapter was added."""
    layers = _adapted(_network(model))
    for _, layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for _, layer in layers:
            layer.enable_adapters(True)


@torch.no_grad()
def merge_adapter(model: MaskPredictor) -> None:
    """Adds the adapter into the weights and removes it; `ArithmeticError` if that moved the logits of a probe.

    Allowed: 1e-3 of the largest logit in fp32, 5e-2 in lower precision, where the sum of weights is rounded.
    """
    network, training = _network(model), model.training
    model.eval()
    probe = torch.arange(min(16, model.max_length), device=model.device)[None] % model.vocab_rows
    before = model(probe).logits.float()
    for name, layer in _adapted(network):
        layer.merge(safe_merge=True)
        network.set_submodule(name, layer.get_base_layer())
    moved = (model(probe).logits.float() - before).abs().max() / before.abs().max().clamp(min=1e-6)
    if not moved < (1e-3 if model.dtype == torch.float32 else 5e-2):
        raise ArithmeticError(f"merging the adapter moved the logits by {float(moved):.1e} of the largest")
    model.train(training)


def _adapted(network: nn.Module) -> list[tuple[str, Any]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [(name, module) for name, module in network.named_modules() if isinstance(module, BaseTunerLayer)]


def _network(model: MaskPredictor) -> Any:
    return model.backbone if isinstance(model, MaskedLM) else model
