"""Low-rank adapters through peft, put into the model in place. Knows which layers are the model's own linear ones."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from llada_core.config.training import LoraParams
from llada_core.modeling import MaskPredictor


def add_lora(model: MaskPredictor, params: LoraParams) -> list[str]:
    """Freeze the model and add adapters; returns the names of the adapted layers.

    Raises ValueError when a target matches no linear layer. The head is adapted only if a target names it in full.
    """
    from peft import LoraConfig, inject_adapter_in_model  # takes seconds to import

    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    head = model.get_output_embeddings()
    inner = [name for name in linear if model.get_submodule(name) is not head]
    targets = (params.targets,) if isinstance(params.targets, str) else params.targets
    chosen: list[str] = []
    for target in targets:
        found = (
            inner
            if target == "all-linear"
            else [n for n in inner if n.endswith("." + target) or re.fullmatch(target, n)]
        )
        found = found or [n for n in linear if n == target]
        if not found:
            endings = sorted({name.rpartition(".")[2] for name in inner})
            raise ValueError(
                f"lora.targets: {target!r} matches no linear layer; there are: all-linear, {', '.join(endings)}"
            )
        chosen += [name for name in found if name not in chosen]
    config = LoraConfig(
        r=params.r, lora_alpha=params.alpha, lora_dropout=params.dropout, target_modules=chosen, bias="none"
    )
    inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return chosen


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The model as it was before adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
