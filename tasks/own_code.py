"""Functions of one's own that parameters name as FILE.py:FUNCTION (a map, a reward, an unmasking rule): which files.

Beside a profile, or in the project, tracked by git or not: a workspace gets copies, and whatever reads the setting depends
on the file.
"""

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llada_core.settings import ConfigError
from tasks.folders import content_hash

KEYS = ("map", "reward", "rule")  # settings that name a function, in whatever block
FUNCTION = re.compile(r"(?P<file>[^:]+\.py):(?P<name>\w+)")
FOLDER = "own"  # of a workspace, with the copies


def files_of(values: Any) -> list[str]:
    """The files that these settings name, as paths from the project's folder, each once."""
    return list(dict.fromkeys(os.path.normpath(match["file"]) for match in _named(values)))


def _named(values: Any, key: str = "") -> Iterator[re.Match[str]]:
    if isinstance(values, Mapping):
        for name, value in values.items():
            yield from _named(value, str(name))
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _named(value, key)
    elif key in KEYS and isinstance(values, str) and (match := FUNCTION.fullmatch(values)):
        yield match


def found(values: Any, places: list[Path]) -> dict[str, Path]:
    """Path as written -> the file, looked for in `places` in turn; raises `ConfigError` for one that is nowhere."""
    files: dict[str, Path] = {}
    for match in _named(values):
        written = Path(match["file"]).expanduser()
        whole = [place / written for place in places if (place / written).is_file()]
        if not whole:
            looked = " or ".join(str(place) for place in dict.fromkeys(places))
            raise ConfigError(f"{match[0]!r}: there is no file {match['file']} in {looked}")
        files[match["file"]] = whole[0].resolve()
    names = [file.name for file in set(files.values())]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"two files of one's own are called {twice[0]}; name them apart")
    return files


def moved(values: Any, files: Mapping[str, Path], key: str = "") -> Any:
    """The settings with every such file named as its copy in a workspace."""
    if isinstance(values, Mapping):
        return {name: moved(value, files, str(name)) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [moved(value, files, key) for value in values]
    if key in KEYS and isinstance(values, str) and (match := FUNCTION.fullmatch(values)):
        return f"{FOLDER}/{files[match['file']].name}:{match['name']}"
    return values


def hashes(files: Mapping[str, Path]) -> list[list[str]]:
    """What the files hold, as part of a workspace's name."""
    return sorted([file.name, content_hash(file)] for file in set(files.values()))


def copy(files: Mapping[str, Path], place: Path) -> None:
    """Puts the files into a workspace."""
    for file in set(files.values()):
        (place / FOLDER).mkdir(exist_ok=True)
        if not (place / FOLDER / file.name).is_file() or content_hash(place / FOLDER / file.name) != content_hash(file):
            shutil.copyfile(file, place / FOLDER / file.name)
