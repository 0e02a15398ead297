"""A folder with a tiny model, and the command run in this process."""

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cli.main import llada
from llada_core.modeling import save_model
from tests.tiny import tiny_pair


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model, tokenizer = tiny_pair()
    save_model(model, folder, tokenizer)
    return str(folder)


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`llada ARGUMENTS` in an empty folder; stdout and stderr apart."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, stdin: str = "") -> Result:
        return CliRunner().invoke(llada, list(arguments), input=stdin)

    return run
