"""A benchmark as lm-eval's tasks: stock definitions pointed at local files, ours, and puzzles of a data folder.

Only the folder that defines a task is indexed (lm-eval's own index of all tasks takes 20 s).
"""

import hashlib
import json
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import cache, partial
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import yaml
from datasets.exceptions import DatasetsError
from jinja2 import TemplateError
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from lm_eval.utils import env as templates

from llada_core import files as json_lines
from llada_core.data import puzzles as generated
from llada_core.data.contamination import question_in, value_of
from llada_core.evaluation.definitions import opencompass
from llada_core.evaluation.recipes import Recipe
from llada_core.files import FileError
from llada_core.settings import ConfigError
from llada_core.verifiers.answers import verify

OURS = Path(__file__).parent / "definitions"
STOCK = Path(lm_eval.__file__).parent / "tasks"
FILTERS = (opencompass.FirstOption, opencompass.LastNumber)  # importing them is what makes their names known
PUZZLE_FIELDS = ("id", "task", "prompt", "answer")
FEWSHOT_SEED = 1234  # lm-eval's own default
Tasks = dict[str, Any]


def tasks_of(recipe: Recipe, root: Path | None = None) -> Tasks:
    """What lm-eval evaluates for a recipe, from files below `root` where they are, else from the Hub.

    Raises `ConfigError` in one line: files absent or damaged, another version of the task than the recipe pins, a
    missing package.
    """
    folder = OURS if recipe.definition == "ours" else STOCK / recipe.definition
    files = local_files(recipe, root)
    if files is None and not recipe.hub:
        raise ConfigError(f"{recipe.name}: its files are not on the Hub; give a data root with a folder for them")
    random.seed(0)  # some definitions shuffle choices while they are read
    with tempfile.TemporaryDirectory() as temporary:
        (Path(temporary) / "group.yaml").write_text(yaml.safe_dump(_group(recipe, files)), encoding="utf-8")
        manager = TaskManager(include_path=[folder, temporary], include_defaults=False)
        try:
            loaded = manager.load([_group_name(recipe)])
        except (OSError, ValueError, KeyError, DatasetsError, TemplateError) as error:
            where = files or "the Hub"
            raise ConfigError(f"{recipe.name}: no questions from {where}: {_first_line(error)}") from error
        except ImportError as error:
            raise ConfigError(f"{recipe.name}: {_first_line(error)}") from error
    _check_version(recipe, loaded)
    return _prepared(dict(loaded), recipe.shots)


def drift(recipe: Recipe, tasks: Tasks) -> list[str]:
    """A sentence for each way in which these tasks are not the ones that the recipe's figure was measured with."""
    measured, loaded = recipe.measured_with, tasks.get("tasks", {})
    if measured is None:
        return []
    found: dict[str, list[str]] = {}
    for name, task in loaded.items():
        version = next((v for pattern, v in measured.versions.items() if fnmatch(name, pattern)), None)
        if version is not None and float(task.VERSION) != version:
            found.setdefault(f"version {task.VERSION} for {version}", []).append(name)
        delimiter = task.config.target_delimiter
        if measured.target_delimiter not in (None, delimiter):
            found.setdefault(f"target delimiter {delimiter!r} for {measured.target_delimiter!r}", []).append(name)
    why = f"; {measured.same}" if measured.same else ""
    return [f"{_named(names)}: {what} of {measured.by}{why}" for what, names in found.items()]


def _named(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def question_value(task: Any, document: Mapping[str, Any]) -> int:
    """The value of what a task's document asks, to be looked up among the values of training questions."""
    text = task.doc_to_text(document)
    return value_of(question_in(document, text if isinstance(text, str) else None) or str(text))


def question_values(tasks: Tasks) -> list[int]:
    """The value of every question that these tasks measure."""
    with compiled_once():
        return [question_value(task, document) for task in tasks["tasks"].values() for document in task.eval_docs]


@contextmanager
def compiled_once() -> Iterator[None]:
    """lm-eval compiles a task's templates anew for every question, which is most of the time a prompt takes."""
    compiling = templates.from_string
    templates.from_string = cache(compiling)
    try:
        yield
    finally:
        templates.from_string = compiling


def local_files(recipe: Recipe, root: Path | None) -> Path | None:
    """The folder with a recipe's files, if it is there."""
    if root is None or recipe.local is None:
        return None
    folder = (root / recipe.local.folder).absolute()
    return folder if folder.is_dir() else None


def puzzles(name: str, rows: list[dict[str, str | bool]]) -> Tasks:
    """Questions (id, task, prompt, answer as JSON text), right or wrong by `llada_core.verifiers.answers.verify`."""
    task = ConfigurableTask(
        config={
            "task": name,
            "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(rows)},
            "output_type": "generate_until",
            "test_split": "test",
            "doc_to_text": "{{prompt}}",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": [], "do_sample": False},
            "process_results": _verified,
            "metric_list": [{"metric": "correct", "aggregation": "mean", "higher_is_better": True}],
            "metadata": {"version": 1.0},
        }
    )
    return _prepared({"tasks": {name: task}, "groups": {}, "group_map": {}}, 0)


def read_puzzles(path: Path) -> list[dict[str, str | bool]]:
    """The rows of a puzzle file, `answer` as JSON text; raises `ConfigError` with file and line."""
    try:
        numbered = list(json_lines.numbered(path))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; run the stage prepare, or name a recipe") from None
    except FileError as error:
        raise ConfigError(str(error)) from None
    if not numbered:
        raise ConfigError(f"{path}: empty; expected one puzzle a line")
    rows: list[dict[str, str | bool]] = []
    for number, row in numbered:
        try:
            answer = row["answer"] if isinstance(row["answer"], str) else json.dumps(row["answer"], sort_keys=True)
            texts = {key: str(row[key]) for key in ("id", "task", "prompt")}
            rows.append({**texts, "answer": answer, "in_training": bool(row.get("in_training", False))})
        except (KeyError, TypeError):
            expected = ", ".join(PUZZLE_FIELDS)
            raise ConfigError(f"{path}, line {number}: expected a JSON object with {expected}") from None
    return rows


def puzzle_wordings(rows: Sequence[Mapping[str, Any]]) -> dict[str, Callable[[Mapping[str, Any]], str]]:
    """Wording -> a row's puzzle asked in it: those that training uses; none where the rows are of several tasks."""
    tasks = {row["task"] for row in rows}
    return {each: partial(_worded, each) for each in generated.wordings(tasks.pop())} if len(tasks) == 1 else {}


def _worded(wording: str, row: Mapping[str, Any]) -> str:
    return generated.worded(wording, json.loads(row["answer"]))


def _prepared(loaded: Tasks, shots: int) -> Tasks:
    for task in loaded["tasks"].values():
        task.set_config("num_fewshot", shots)
        task.set_fewshot_seed(FEWSHOT_SEED)
    return loaded


def _verified(document: Mapping[str, Any], replies: list[str]) -> dict[str, float]:
    return {"correct": float(verify(document["task"], replies[0], json.loads(document["answer"])))}


def _group_name(recipe: Recipe) -> str:
    return f"llada/{recipe.name}"


def _group(recipe: Recipe, files: Path | None) -> dict[str, Any]:
    """lm-eval merges what a group says beside its task list into every member."""
    group: dict[str, Any] = {"group": _group_name(recipe), "task": [recipe.task], **recipe.change}
    if files is not None and recipe.local is not None:
        change = dict(recipe.local.change)
        inner = change.get("dataset_kwargs")
        if isinstance(inner, dict):
            change["dataset_kwargs"] = {k: str(files / str(v)) for k, v in inner.items()}
        else:
            group |= {"dataset_path": str(files), "dataset_kwargs": {"cache_dir": _cache_of(files)}}
        group |= change
    return group


def _cache_of(files: Path) -> str:
    """A cache of these very files: by itself `datasets` does not see that a folder's files are others than before."""
    seen = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(files.rglob("*")) if f.is_file()]
    digest = hashlib.sha256(repr(seen).encode()).hexdigest()[:16]
    return str(Path(datasets.config.HF_DATASETS_CACHE) / f"local-{digest}")


def _check_version(recipe: Recipe, loaded: Mapping[str, Any]) -> None:
    group = loaded["groups"].get(recipe.task)
    found = loaded["tasks"][recipe.task].VERSION if group is None else (group.metadata or {}).get("version")
    if found is None or float(found) != recipe.version:
        raise ConfigError(
            f"{recipe.name}: pinned to version {recipe.version} of {recipe.task}, installed is {found};"
            " its figures cannot be compared"
        )


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]
