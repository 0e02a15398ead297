"""Files of one's own that parameters name: a map, a reward, an unmasking rule as FILE.py:FUNCTION, a benchmark's questions.

Beside a profile, or in the project, tracked by git or not: a workspace gets copies, and whatever reads the setting depends
on the file. A benchmark is a file of questions and answers in any shape that training takes, or a recipe (.yaml).
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llada_core.data.shapes import prompt
from llada_core.data.sources import Row, RowError, UnusableRow, rows_of
from llada_core.files import line_of, stem, suffix
from llada_core.settings import ConfigError
from llada_core.verifiers.answers import unfit, verifiable, verify
from tasks.folders import content_hash

KEYS = ("map", "reward", "rule")  # settings that name a function, in whatever block
FUNCTION = re.compile(r"(?P<file>[^:]+\.py):(?P<name>\w+)")
FOLDER = "own"  # of a workspace, with the copies
QUESTIONS = "questions"  # the setting of a benchmark that is a file
TABLES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".ndjson")  # of questions and answers
KEPT = (".py", ".yaml")  # what is copied as it is


def with_benchmarks(values: dict[str, Any]) -> dict[str, Any]:
    """The settings with each benchmark that is a file called by its stem, and the file in `evaluate.overrides`."""
    block = values.get("evaluate")
    # What is of another shape is told where settings are read.
    if not isinstance(block, dict) or not isinstance(block.get("benchmarks"), list | tuple):
        return values
    listed, over = block["benchmarks"], block.get("overrides") or {}
    files = [str(name) for name in listed if is_benchmark(str(name))]
    if not files or not isinstance(over, dict) or not all(isinstance(own, dict | None) for own in over.values()):
        return values
    overrides = dict(over)
    for file in files:
        if not re.fullmatch(r"[\w-]+", stem(Path(file))):
            raise ConfigError(
                f"evaluate.benchmarks: {file!r} names a benchmark; use letters, digits, _ and - before the dot"
            )
        overrides[stem(Path(file))] = {**(overrides.get(stem(Path(file))) or {}), QUESTIONS: file}
    names = [stem(Path(name)) if name in files else name for name in listed]
    return values | {"evaluate": block | {"benchmarks": names, "overrides": overrides}}


def is_benchmark(text: str) -> bool:
    """Whether a benchmark's name is that of a file: of questions and answers, packed or not, or of a recipe."""
    return suffix(text) in TABLES or Path(text).suffix == ".yaml"


def files_of(values: Any) -> list[str]:
    """The files that these settings name, as paths from the project's folder, each once."""
    return list(dict.fromkeys(os.path.normpath(file) for _, file in _named(values)))


def texts_of(values: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Each text in these settings, behind the name of its setting."""
    if isinstance(values, Mapping):
        for name, value in values.items():
            yield from texts_of(value, str(name))
    elif isinstance(values, list | tuple):
        for value in values:
            yield from texts_of(value, key)
    elif isinstance(values, str):
        yield key, values


def _named(values: Any) -> Iterator[tuple[str, str]]:
    """Each setting that names a file, as written, and the file."""
    for key, text in texts_of(values):
        if file := _file(key, text):
            yield text, file


def _file(key: str, value: str) -> str | None:
    if key == QUESTIONS:
        return value
    match = FUNCTION.fullmatch(value) if key in KEYS else None
    return None if match is None else match["file"]


def found(values: Any, places: list[Path]) -> dict[str, Path]:
    """Path as written -> the file, looked for in `places` in turn; raises `ConfigError` for one that is nowhere."""
    files: dict[str, Path] = {}
    for setting, file in _named(values):
        written = Path(file).expanduser()
        whole = [place / written for place in places if (place / written).is_file()]
        if not whole:
            looked = " or ".join(str(place) for place in dict.fromkeys(places))
            raise ConfigError(f"{setting!r}: there is no file {file} in {looked}")
        files[file] = whole[0].resolve()
    names = [copy_of(file) for file in set(files.values())]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"two files of one's own are called {Path(twice[0]).name}; name them apart")
    return files


def copy_of(file: Path) -> str:
    """Where a workspace has its copy: questions as a file of their rows."""
    return f"{FOLDER}/{file.name if file.suffix in KEPT else f'{stem(file)}.jsonl'}"


def moved(values: Any, files: Mapping[str, Path], key: str = "") -> Any:
    """The settings with every such file named as its copy in a workspace."""
    if isinstance(values, Mapping):
        return {name: moved(value, files, str(name)) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [moved(value, files, key) for value in values]
    if isinstance(values, str) and (file := _file(key, values)):
        return copy_of(files[file]) + values.removeprefix(file)
    return values


def hashes(files: Mapping[str, Path]) -> list[list[str]]:
    """What the files hold, as part of a workspace's name."""
    return sorted([file.name, content_hash(file)] for file in set(files.values()))


def copies(files: Mapping[str, Path]) -> dict[str, bytes]:
    """Each copy of a workspace and what it holds; raises `ConfigError` as `questions`."""
    return {
        copy_of(file): file.read_bytes() if file.suffix in KEPT else questions(file).encode()
        for file in set(files.values())
    }


def put(held: Mapping[str, bytes], place: Path) -> None:
    """Writes the copies into a workspace; one that is there already keeps its time."""
    for name, content in held.items():
        copied = place / name
        copied.parent.mkdir(exist_ok=True)
        if not copied.is_file() or copied.read_bytes() != content:
            copied.write_bytes(content)


def questions(file: Path) -> str:
    """The rows of a file, in any shape that training takes, as lines of a benchmark's file.

    An answer is right if it says the same words, or as the verifier says that a row names (`task`). Raises `ConfigError`
    for a file without rows, and a row that is not one question with an answer that can be judged.
    """
    lines = [line_of(_question(number, row, file)) for number, row in rows_of(file)]
    if not lines:
        raise ConfigError(f"{file}: no rows; expected a question with its answer in each")
    return "".join(lines)


def _question(number: int, row: Row | UnusableRow, file: Path) -> dict[str, Any]:
    try:
        if isinstance(row, UnusableRow):
            raise RowError(row.told)
        read, _ = prompt(row)
        said, task, answer = read["prompt"], read["task"], read["answer"]
        messages = [{"role": "user", "content": said}] if isinstance(said, str) else said
        if [message["role"] for message in messages] != ["user"]:
            raise RowError("expected one question and its answer, without turns before or a system prompt")
        if not verifiable(task):
            verify(task, "", {})  # says which tasks there are
        if isinstance(answer, str):  # as a table has it
            answer = json.loads(answer)
        if not isinstance(answer, dict):
            raise RowError(f"answer {answer!r}: the verifier of {task!r} compares with an object of fields")
        if lacking := unfit(task, answer):
            raise RowError(f"answer {answer!r}: {lacking}")
        return {"id": str(number), "task": task, "prompt": messages[0]["content"], "answer": answer}
    except KeyError as error:
        raise ConfigError(f"{file}, row {number}: the field {error} is missing") from None
    except ValueError as error:
        raise ConfigError(f"{file}, row {number}: {error}") from None
