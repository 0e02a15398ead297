"""The library: masked-diffusion language models of the LLaDA family, from text to tokens to answers.

The names below are fetched when first used, so that importing the package loads nothing heavy.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llada_core.families import SpecialTokens
    from llada_core.likelihood import log_likelihood, log_likelihoods
    from llada_core.modeling import MaskPredictor, load_config, load_model, new_model, save_model
    from llada_core.sampling import Generation, SamplingParams, Step, generate, infill, stream, stream_infill
    from llada_core.tokenizer import Tokenizer, train_tokenizer

_HOMES = {
    "Generation": "sampling",
    "MaskPredictor": "modeling",
    "SamplingParams": "sampling",
    "SpecialTokens": "families",
    "Step": "sampling",
    "Tokenizer": "tokenizer",
    "generate": "sampling",
    "infill": "sampling",
    "load_config": "modeling",
    "load_model": "modeling",
    "log_likelihood": "likelihood",
    "log_likelihoods": "likelihood",
    "new_model": "modeling",
    "save_model": "modeling",
    "stream": "sampling",
    "stream_infill": "sampling",
    "train_tokenizer": "tokenizer",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
