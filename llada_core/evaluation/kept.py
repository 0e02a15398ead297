"""What kept answers belong to: the content of the whole model, the settings, and the code that evaluation depends on.

An answer is found again only by a model and code that would give it again; prompts are told apart by each request's own key.
Knows model folders, the Hub's cache and dvc.yaml's list of code; does not know answers.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import snapshot_download

from llada_core.modeling.folder import base_of, is_adapter

ROOT = Path(__file__).resolve().parents[2]


def whole_model(name: str) -> list[Path]:
    """The folders that a model on this machine is made of: its own, for an adapter its base's too, and so on."""
    found = [_folder(name)]
    while is_adapter(found[-1]):
        found.append(_folder(base_of(found[-1])))
    return found


def _folder(name: str) -> Path:
    """A folder, or the Hub's cached copy of a repository, which loading has fetched."""
    if Path(name).is_dir():
        return Path(name)
    repository, _, revision = name.partition("@")
    return Path(snapshot_download(repository, revision=revision or None, local_files_only=True))


def code_of_evaluation() -> list[Path]:
    """The files and folders of code that dvc.yaml lists for `evaluate`; without that file all of llada_core."""
    listed = ROOT / "dvc.yaml"
    if not listed.is_file():
        return [ROOT / "llada_core"]
    deps = yaml.safe_load(listed.read_text(encoding="utf-8"))["stages"]["evaluate"]["do"]["deps"]
    return [ROOT / path for path in deps if path.partition("/")[0] in ("llada_core", "tasks")]


def key_of_answers(name: str, settings: dict[str, Any]) -> str:
    """16 hex digits for all that determines what a model answers, beside the prompt."""
    weights = [_content(folder) for folder in whole_model(name)]
    code = {str(path.relative_to(ROOT)): _content(path) for path in code_of_evaluation()}
    text = json.dumps([weights, code, settings], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _content(path: Path) -> list[tuple[str, str]]:
    return [(file.relative_to(path).as_posix(), _digest(file)) for file in _files(path)]


def _files(path: Path) -> Iterable[Path]:
    found = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return (file for file in found if file.suffix != ".pyc")


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
