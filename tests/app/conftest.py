"""A tiny loaded model, a folder with a tiny model, and a page served from it."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.models import LoadedModel
from llada_core.modeling import save_model
from tasks.project import Project
from tests.ports import free_port
from tests.tiny import tiny_pair

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"


@pytest.fixture(scope="session")
def loaded() -> LoadedModel:
    model, tokenizer = tiny_pair(max_sequence_length=700)
    return LoadedModel("tiny", Path("nowhere"), model, tokenizer)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model, tokenizer = tiny_pair(max_sequence_length=700)
    save_model(model, folder, tokenizer)
    (folder / "training.json").write_text('{"stage": "sft", "steps": 3}')
    return folder


@pytest.fixture(scope="session")
def served_page(model_folder: Path) -> Iterator[Any]:
    from app import page
    from app.__main__ import options
    from app.models import AppState, ModelCache, ModelIndex

    index = ModelIndex(Project(model_folder.parent))
    state = AppState(ModelCache(index), index, str(model_folder), speed="instant")
    blocks = page.build_page(state)
    blocks.launch(server_port=free_port(), prevent_thread_lock=True, quiet=True, **options())
    yield blocks
    blocks.close()


@pytest.fixture(scope="session")
def page_url(served_page: Any) -> str:
    return served_page.local_url
