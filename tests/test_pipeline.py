"""The whole pipeline on the `smoke` profile, as a user runs it: data to a registered model that answers on the page."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.pipeline


def llada(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("LLADAFLOW", "MLFLOW_TRACKING"))}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    command = [sys.executable, "-m", "cli.main", *arguments]
    return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=500)


def clone(folder: Path) -> Path:
    """A git checkout in `folder` with the files of the project as they are now."""
    home = folder / "lladaflow"
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, home / name)
    (home / "dvc.lock").unlink(missing_ok=True)
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "clone"]):
        subprocess.run([*git, *arguments], cwd=home, check=True)
    return home


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone with `smoke` as its default run, run once."""
    home = clone(tmp_path_factory.mktemp("clone"))
    shutil.copy2(ROOT / "profiles" / "smoke.yaml", home / "params.yaml")
    done = llada(home, "run")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return home


def test_data_becomes_a_registered_champion_with_a_report(checkout: Path) -> None:
    registered = json.loads((checkout / "reports/registered.json").read_text())
    assert registered["name"] == "smoke"
    assert registered["champion"] == registered["version"]
    table = json.loads((checkout / "reports/table.json").read_text())
    assert table
    assert "sudoku" in (checkout / "reports/table.md").read_text()
    card = json.loads((checkout / "data/card.json").read_text())
    assert all(count == 0 for counts in card["overlap"].values() for count in counts.values())


def test_a_second_run_repeats_nothing(checkout: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (checkout / "models").rglob("*") if path.is_file()}
    done = llada(checkout, "run")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Running stage" not in done.stdout + done.stderr
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_git_shows_only_what_a_user_commits(checkout: Path) -> None:
    status = subprocess.run(["git", "status", "--porcelain"], cwd=checkout, capture_output=True, text=True, check=True)
    changed = {line[3:].split("/")[0] for line in status.stdout.splitlines()}
    assert changed <= {"dvc.lock", "reports", "params.yaml"}


def test_the_champion_answers_in_the_terminal(checkout: Path) -> None:
    done = llada(checkout, "sample", "Solve the sudoku 0103010000000230")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()


def test_a_mistyped_key_is_one_line(checkout: Path) -> None:
    done = llada(checkout, "run", "-S", "sft.learning_rat=1")
    assert done.returncode == 2
    assert "did you mean 'learning_rate'" in done.stderr
    assert "Traceback" not in done.stderr
