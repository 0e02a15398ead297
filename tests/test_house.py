"""The house rules that a linter does not know: small files, small functions, a purpose on top of each file."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("llada_core", "tasks", "flows", "app", "cli")
FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_is_one_small_idea_with_its_purpose_on_top(path: Path) -> None:
    source = path.read_text()
    tree = ast.parse(source)
    assert ast.get_docstring(tree) or not source.strip(), "say what the file is and what it does not know"
    assert len(source.splitlines()) <= 350, "find the missing noun and split the file"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= 60, f"{node.name} has {length} lines: a function fits a screen"
