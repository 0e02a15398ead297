"""Every path and command that the Markdown files name exists."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
TEXT = {page: page.read_text(encoding="utf-8") for page in PAGES}
# What a run makes is named in the docs but absent from a fresh clone.
MADE_BY_A_RUN = (
    "data",
    "models",
    "runs",
    "reports",
    "store",
    "workspaces",
    "mlruns",
    "mlflow.db",
    ".venv",
    "my-",
    "export",
)
ROOMS = "llada_core|tasks|flows|app|cli|tests|benchmarks|docs|profiles"


def _code(text: str) -> list[str]:
    """Inline code and the lines of fenced blocks."""
    fenced = re.findall(r"```[^\n]*\n(.*?)```", text, flags=re.DOTALL)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return inline + [line.strip().removeprefix("$ ") for block in fenced for line in block.splitlines()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)", TEXT[page])
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing, f"broken links: {missing}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_of_our_rooms_exist(page: Path) -> None:
    named = {
        match for code in _code(TEXT[page]) for match in re.findall(rf"(?<![\w/.-])((?:{ROOMS})/[\w./-]*\w)", code)
    }
    missing = sorted(name for name in named if not (ROOT / name).exists() and not name.startswith(MADE_BY_A_RUN))
    assert not missing, f"paths that do not exist: {missing}"


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = {
        m
        for text in TEXT.values()
        for code in _code(text)
        for m in re.findall(r"(?:^|[;&] *)make ([a-z][a-z-]*)", code)
    }
    assert named <= targets, f"no such make targets: {named - targets}"


def test_llada_commands_exist() -> None:
    named = {
        m
        for text in TEXT.values()
        for code in _code(text)
        for m in re.findall(r"(?:^|[;&|] *)llada ([a-z][a-z-]+)", code)
    }
    result = subprocess.run(
        [sys.executable, "-m", "cli.main", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    missing = {name for name in named if not re.search(rf"\b{name}\b", result.stdout)}
    assert not missing, f"no such llada commands: {missing}"


def test_modules_named_with_dash_m_exist() -> None:
    named = {
        m
        for text in TEXT.values()
        for code in _code(text)
        for m in re.findall(r"-m ((?:tasks|flows|app|cli|benchmarks)[\w.]*)", code)
    }
    missing = [
        m for m in named if not any((ROOT / (m.replace(".", "/") + end)).exists() for end in (".py", "/__main__.py"))
    ]
    assert not missing, f"no such modules: {missing}"
