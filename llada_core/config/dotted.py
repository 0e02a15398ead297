"""Finds a function that a user names by its dotted path, `package.module.function`, and packages that are optional.

Does not know what they are for.
"""

import importlib
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llada_core.config.base import ConfigError, nearest


def require_package(name: str, extra: str, what: str) -> None:
    """Raises `ConfigError` with the command that installs the package `name`, unless it is there; `what` needs it."""
    if find_spec(name) is None:
        raise ConfigError(f"{what} needs the package {name}: pip install 'lladaflow[{extra}]'")


def function_at(path: str, what: str) -> Callable[..., Any]:
    """The function at a dotted path, which may lie in the working directory; `what` opens the error's text."""
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise ConfigError(f"{what} {path!r}: write it as package.module.function")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{what} {path!r}: no module named {error.name!r}") from None
    found = vars(module).get(name)
    if not callable(found):
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ConfigError(f"{what} {path!r}: {module_name} has no function {name!r}{nearest(name, functions)}")
    function: Callable[..., Any] = found
    return function
