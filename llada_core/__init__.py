"""The library: masked-diffusion language models of the LLaDA family, from text to tokens to answers.

The names below are fetched when first used, so that importing the package loads nothing heavy.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llada_core.likelihood import log_likelihood, log_likelihoods
    from llada_core.modeling import MaskPredictor, load_config, load_model, new_model, save_model
    from llada_core.sampling import Generation, SamplingParams, Step, generate, infill, stream, stream_infill
    from llada_core.tokenizer import SpecialTokens, Tokenizer, train_tokenizer

_NAMES = {
    "likelihood": ("log_likelihood", "log_likelihoods"),
    "modeling": ("MaskPredictor", "load_config", "load_model", "new_model", "save_model"),
    "sampling": ("Generation", "SamplingParams", "Step", "generate", "infill", "stream", "stream_infill"),
    "tokenizer": ("SpecialTokens", "Tokenizer", "train_tokenizer"),
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names}
__all__ = [*_HOMES]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
