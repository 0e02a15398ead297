"""The mask predictor: LLaDA dense and mixture-of-experts, and any transformers masked-LM, behind one call.

The names below are fetched when first used, so that a module that only needs a config does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llada_core.modeling.adapters import add_lora, merge_adapter
    from llada_core.modeling.cache import KVCache
    from llada_core.modeling.config import LLaDAConfig, LLaDAMoEConfig
    from llada_core.modeling.create import new_model
    from llada_core.modeling.load import load_config, load_model
    from llada_core.modeling.masked_lm import MaskedLM
    from llada_core.modeling.model import LLaDAModelLM, LLaDAMoEModelLM
    from llada_core.modeling.predictor import MaskPredictor, Prediction
    from llada_core.modeling.save import save_model

_HOMES = {
    "KVCache": "cache",
    "LLaDAConfig": "config",
    "LLaDAMoEConfig": "config",
    "LLaDAMoEModelLM": "model",
    "LLaDAModelLM": "model",
    "MaskPredictor": "predictor",
    "MaskedLM": "masked_lm",
    "Prediction": "predictor",
    "add_lora": "adapters",
    "load_config": "load",
    "load_model": "load",
    "merge_adapter": "adapters",
    "new_model": "create",
    "save_model": "save",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
