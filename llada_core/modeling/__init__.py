"""The mask predictor: LLaDA dense and mixture-of-experts, and any transformers masked-LM, behind one call.

The names below are fetched when first used, so that a module that only needs a config does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llada_core.modeling.adapters import add_lora, merge_adapter
    from llada_core.modeling.configuration import LLaDA2Config, LLaDAConfig, LLaDAMoEConfig
    from llada_core.modeling.masked_lm import MaskedLM
    from llada_core.modeling.network import LLaDA2MoeModelLM, LLaDAModelLM, LLaDAMoEModelLM
    from llada_core.modeling.predictor import KVCache, MaskPredictor, Prediction
    from llada_core.modeling.pretrained import load_config, load_model, load_to_answer, new_model, save_model

_NAMES = {
    "adapters": ("add_lora", "merge_adapter"),
    "configuration": ("LLaDA2Config", "LLaDAConfig", "LLaDAMoEConfig"),
    "masked_lm": ("MaskedLM",),
    "network": ("LLaDA2MoeModelLM", "LLaDAMoEModelLM", "LLaDAModelLM"),
    "predictor": ("KVCache", "MaskPredictor", "Prediction"),
    "pretrained": ("load_config", "load_model", "load_to_answer", "new_model", "save_model"),
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names}
__all__ = [*_HOMES]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
