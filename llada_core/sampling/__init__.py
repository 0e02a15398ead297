"""Generation by iterative unmasking: one loop over replaceable values.

The names below are fetched when first used, so that a module that only needs the settings does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llada_core.sampling.canvas import Step
    from llada_core.sampling.params import SamplingParams
    from llada_core.sampling.sampler import Generation, generate, infill, stream, stream_infill

_NAMES = {
    "canvas": ("Step",),
    "params": ("SamplingParams",),
    "sampler": ("Generation", "generate", "infill", "stream", "stream_infill"),
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names}
__all__ = [*_HOMES]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
