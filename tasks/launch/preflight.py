"""What can be told of a run's settings before anything of it is made: functions, benchmarks and sources that are not there.

No code of one's own is run, nothing is asked of the Hub, no file of rows is read.
"""

import ast
import re
from collections.abc import Iterator, Mapping
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llada_core.data.puzzle_rows import BENCHMARKS
from llada_core.data.sources import find
from llada_core.evaluation import recipes
from llada_core.settings import ConfigError, nearest
from llada_core.training.rewards import reward_named
from tasks import own_code
from tasks.project import Params, Project, source_roots


def check(values: Mapping[str, Any], params: Params, project: Project, places: list[Path], *, fresh: bool) -> None:
    """Raises `ConfigError`, or FileNotFoundError and `DataError` of `sources.find`, for what a stage would stop at.

    values: the settings as written, with the files of one's own looked for in `places`. fresh: nothing is made yet, so
    that the data's sources have to be there.
    """
    for key, path in own_code.texts_of(values):
        if key in own_code.KEYS:
            _require_function(key, path, places)
    if "evaluate" in params.stages:
        _require_benchmarks(values, params, places)
    if fresh and "prepare" in params.stages and params.data is not None:
        roots = source_roots(params.data.root, project.home)
        for stage, part in params.data.parts.items():
            for source in part.sources:
                find(source, stage, roots)


def _require_function(key: str, path: str, places: list[Path]) -> None:
    """A reward is called for the first time hours after its run began, so its name is looked for now."""
    own = own_code.FUNCTION.fullmatch(path)
    if own is not None:
        name, file = own["name"], own_code.found({key: path}, places)[own["file"]]
    elif key == "reward" and "." not in path:
        reward_named(path)
        return
    elif not re.fullmatch(r"\w+(\.\w+)+", path):
        raise ConfigError(f"{key} {path!r}: write it as ./file.py:function or package.module.function")
    else:
        module, _, name = path.rpartition(".")
        inside = _file_of(module, f"{key} {path!r}", places[-1])
        if inside is None:
            return
        file = inside
    try:
        tree = ast.parse(file.read_bytes(), file.name)
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"{key} {path!r}: {file} is not Python: {error}") from None
    # A name may be imported, assigned or defined under a condition: one that stands anywhere is taken for defined.
    words = {word for node in ast.walk(tree) for word in _names(node)}
    if "*" not in words and name not in words:
        functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
        raise ConfigError(f"{key} {path!r}: {file} has no function {name!r}{nearest(name, functions)}")


def _file_of(module: str, what: str, project: Path) -> Path | None:
    """The file of a module that is installed or in the project, found without importing its packages; None for one that
    is no Python text. Raises `ConfigError`, opened by `what`, where there is no such module."""
    top, *inner = module.split(".")
    spec = find_spec(top) or PathFinder.find_spec(top, [str(project)])
    for name in inner:
        if spec is None or spec.submodule_search_locations is None:  # os.path is a module of a file that holds none
            break
        spec = PathFinder.find_spec(name, list(spec.submodule_search_locations))
    if spec is None:
        ways = "a function of a file of your own is written ./my_file.py:function"
        raise ConfigError(f"{what}: no module named {module!r}; {ways}")
    origin = spec.origin or ""
    return Path(origin) if spec.name == (inner or [top])[-1] and origin.endswith(".py") else None


def _names(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.alias):
        yield node.asname or node.name
    elif isinstance(node, ast.Name):
        yield node.id


def _require_benchmarks(values: Mapping[str, Any], params: Params, places: list[Path]) -> None:
    """Benchmarks are measured last; a name that is none would be told after the training."""
    assert params.evaluate is not None
    for name in params.evaluate.benchmarks:
        own = params.evaluate.overrides.get(name)
        file = None if own is None or own.questions is None else own.questions
        if file is None and not recipes.exists(name):
            if "prepare" in params.stages and name not in BENCHMARKS:
                known = [*BENCHMARKS, *recipes.names()]
                raise ConfigError(f"evaluate.benchmarks: there is no benchmark {name!r}{nearest(name, known)}")
        elif file is None or Path(file).suffix == ".yaml":
            written = {own_code.QUESTIONS: file}
            recipe = recipes.find(name) if file is None else recipes.read(own_code.found(written, places)[file])
            if recipe.runs_code and not params.evaluate.run_code:
                how = "(in a sandbox); allow it with evaluate.run_code: true"
                raise ConfigError(f"evaluate.benchmarks: {name} runs programs that the model writes {how}")
