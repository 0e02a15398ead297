"""The mask predictor: LLaDA dense and mixture-of-experts, and any transformers masked-LM, behind one call.

Importing this package registers the LLaDA classes with transformers' Auto classes.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from llada_core.modeling.cache import KVCache
from llada_core.modeling.config import LLaDAConfig, LLaDAMoEConfig
from llada_core.modeling.create import new_model
from llada_core.modeling.load import load_config, load_model
from llada_core.modeling.masked_lm import MaskedLM
from llada_core.modeling.model import LLaDAModelLM, LLaDAMoEModelLM
from llada_core.modeling.names import register_names
from llada_core.modeling.predictor import MaskPredictor, Prediction
from llada_core.modeling.save import save_model

register_names()
AutoConfig.register("llada", LLaDAConfig, exist_ok=True)
for _auto in (AutoModel, AutoModelForCausalLM):
    _auto.register(LLaDAConfig, LLaDAModelLM, exist_ok=True)
    _auto.register(LLaDAMoEConfig, LLaDAMoEModelLM, exist_ok=True)

__all__ = [
    "KVCache",
    "LLaDAConfig",
    "LLaDAMoEConfig",
    "LLaDAMoEModelLM",
    "LLaDAModelLM",
    "MaskPredictor",
    "MaskedLM",
    "Prediction",
    "load_config",
    "load_model",
    "new_model",
    "save_model",
]
