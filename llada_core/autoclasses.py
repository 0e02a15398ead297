"""Tells transformers' `AutoConfig` of LLaDA the moment it is imported, and not before.

`import llada_core` must be enough for `AutoModelForCausalLM.from_pretrained`, and must not cost the seconds that torch
and transformers take. Knows when to register; the model classes follow with the first config (modeling/config.py).
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_HOLDS_AUTO_CONFIG = "transformers.models.auto.configuration_auto"


class _ThenRegister(Loader):
    """Runs a module as its own loader would, then registers LLaDA's configurations."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _register(module)


class _AutoConfigFinder(MetaPathFinder):
    """Finds the module that holds `AutoConfig` where it is, with `_ThenRegister` around its loader."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname == _HOLDS_AUTO_CONFIG else None
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


def _register(auto: ModuleType) -> None:
    config = importlib.import_module("llada_core.modeling.config")
    auto.AutoConfig.register("llada", config.LLaDAConfig, exist_ok=True)


def register_when_imported() -> None:
    """Registers at once if `AutoConfig` is there already, else when it comes."""
    if _HOLDS_AUTO_CONFIG in sys.modules:
        _register(sys.modules[_HOLDS_AUTO_CONFIG])
    else:
        sys.meta_path.insert(0, _AutoConfigFinder())
