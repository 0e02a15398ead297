"""The house rules that a linter does not know: few rooms of one idea, small functions, a purpose on top of each file."""

import ast
import io
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("llada_core", "tasks", "flows", "app", "cli")
FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
SKIPPED = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
# What the house holds, files with code and their lines. Who adds a room or a feature raises these and says why; who takes
# one away lowers them.
MOST_FILES, MOST_LINES = 158, 23_496
# Under 40 lines, for a framework names them: DVC's commands, Prefect's deployments, MLflow's stored model, packages' faces
# (and the start of a wheel).
FRAMEWORKS = {
    *(f"tasks/{name}.py" for name in ("prepare", "pretrain", "sft", "grpo", "sft_control", "preference", "evaluate")),
    *("tasks/report.py", "tasks/register.py", "tasks/trial.py", "tasks/lm_eval.py", "tasks/record/mlflow_model.py"),
    *("tasks/__main__.py", "flows/__init__.py", "flows/promote.py", "cli/main.py", "cli/wheel/__init__.py"),
    *(f"llada_core/{name}__init__.py" for name in ("", "sampling/", "modeling/", "training/rewards/")),
}
SMALL = {
    "llada_core/evaluation/command.py",
    "llada_core/data/contamination.py",
    "llada_core/training/reference.py",
    "llada_core/training/balance.py",
    "llada_core/sampling/graph.py",
}


def lines_of_code(path: Path) -> int:
    """Lines that hold a token, without comments and docstrings."""
    source, found = path.read_text(encoding="utf-8"), set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in SKIPPED:
            found.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and ast.get_docstring(node):
            found.difference_update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(found)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_is_one_idea_with_its_purpose_on_top(path: Path) -> None:
    source = path.read_text()
    tree = ast.parse(source)
    assert ast.get_docstring(tree) or not source.strip(), "say in a sentence or two what the file is"
    assert lines_of_code(path) <= 350, "find the missing noun and split the file"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= 60, f"{node.name} has {length} lines: a function fits a screen"


def test_the_house_grows_only_on_purpose() -> None:
    counts = {path.relative_to(ROOT).as_posix(): lines_of_code(path) for path in FILES}
    with_code = {name: lines for name, lines in counts.items() if lines}
    assert len(with_code) <= MOST_FILES, len(with_code)
    assert sum(with_code.values()) <= MOST_LINES, sum(with_code.values())
    small = {name for name, lines in with_code.items() if lines < 40}
    assert small <= FRAMEWORKS | SMALL, "join what has no idea of its own to the room that uses it"
    assert small >= SMALL, "take it off the list"


# Packages that are optional, take seconds to import, or are not on every system: imported where they are first needed.
INSIDE = {
    *("accelerate", "datasets", "deepspeed", "dvc", "huggingface_hub", "math_verify", "matplotlib", "mlflow", "peft"),
    *(
        "psutil",
        "pyarrow",
        "pytest",
        "requests",
        "resource",
        "safetensors",
        "sqlalchemy",
        "torch",
        "transformers",
        "urllib",
        "uvicorn",
    ),
}
# Files whose own imports may stand inside: commands, and what has to answer before torch or MLflow could be read.
LIGHT = {
    *(f"cli/{name}.py" for name in ("measure", "models", "options", "runs", "serve", "talk")),
    *("app/__main__.py", "flows/evaluate.py", "tasks/lm_eval.py"),
    *(f"tasks/launch/{name}.py" for name in ("plan", "plan_memory", "program", "trial", "workspace")),
    *("tasks/record/mlflow_model.py", "tasks/record/registry.py"),
    *(f"tasks/work/{name}.py" for name in ("evaluate", "measure", "prepare", "report", "training")),
}


def imports_inside(path: Path) -> set[str]:
    """The modules that a file imports inside of its functions."""
    functions = [
        n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    nodes = [node for function in functions for node in ast.walk(function)]
    named = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return named | {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_stand_on_top_but_for_slow_packages(path: Path) -> None:
    inside = {name.partition(".")[0] for name in imports_inside(path)}
    allowed = INSIDE | (set(ROOMS) if path.relative_to(ROOT).as_posix() in LIGHT else set())
    assert inside <= allowed, f"on top with {sorted(inside - allowed)}, or say why not in this list"
