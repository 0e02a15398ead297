"""The package as somebody installs it: a wheel, away from the checkout, beside packages with the names of our rooms."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from cli.wheel import new_project
from llada_core.modeling import save_model
from llada_core.settings import ConfigError
from tests.test_pipeline import clean_environment, clone
from tests.tiny import tiny_pair

pytestmark = pytest.mark.slow
ROOMS = ("tasks", "flows", "app", "cli")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    home = clone(folder)
    words = ["wheel", str(home), "--no-deps", "--no-build-isolation", "-q", "-w", str(folder / "dist")]
    subprocess.run([sys.executable, "-m", "pip", *words], cwd=folder, check=True)
    (built,) = (folder / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def llada(wheel: Path, tmp_path_factory: pytest.TempPathFactory):
    """`llada ARGUMENTS` of an environment that has our dependencies, the wheel, and strangers named as our rooms."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = str(folder / "bin" / "python")
    words = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-compile", "-q", str(wheel)]
    subprocess.run(words, check=True)
    for room in ROOMS:
        (site / room).mkdir()
        (site / room / "__init__.py").write_text("raise RuntimeError('a stranger')\n")
    environment = {name: value for name, value in clean_environment().items() if name != "PYTHONPATH"}
    environment["PATH"] = f"{folder}/bin:{environment['PATH']}"

    def run(*arguments: str, cwd: Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
        command = [str(folder / "bin" / "llada"), *arguments]
        return subprocess.run(command, cwd=cwd, env=environment, input=stdin, capture_output=True, text=True)

    return run


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_model(tiny_pair()[0], tmp_path / "model", tiny_pair()[1])
    return tmp_path / "model"


def test_a_wheel_takes_two_names_of_site_packages(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names} - {wheel.stem.rpartition("-py3")[0] + ".dist-info"} == {
        "llada_core",
        "lladaflow",
    }
    for name in ("params.yaml", ".dvc/config", "profiles/smoke.yaml", "tasks/accelerate/ddp.yaml", "app/page.css"):
        assert f"lladaflow/project/{name}" in names
    assert not [name for name in names if "tests" in name]


def test_a_model_answers_without_a_project(llada, model: Path, tmp_path: Path) -> None:
    asked = llada("sample", "12 + 3", "--model", "model", "--max-new-tokens", "4", "--json", cwd=tmp_path)
    assert asked.returncode == 0, asked.stderr
    assert '"prompt": "12 + 3"' in asked.stdout or '"prompt":"12 + 3"' in asked.stdout
    talked = llada("chat", "--model", str(model), "--max-new-tokens", "4", cwd=tmp_path, stdin="hi\n/quit\n")
    assert talked.returncode == 0, talked.stderr
    assert "4 forwards" in talked.stdout


def test_a_folder_that_git_refuses_is_told_in_its_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a container's root meets a volume of somebody else's."""
    (tmp_path / "bin").mkdir()
    git = tmp_path / "bin" / "git"
    git.write_text("#!/bin/sh\n[ $1 = init ] || { echo 'fatal: detected dubious ownership' >&2; exit 128; }\n")
    git.chmod(0o755)
    monkeypatch.setenv("PATH", f"{git.parent}:{os.environ['PATH']}")
    with pytest.raises(ConfigError, match=r"git does not take .*mine: fatal: detected dubious ownership"):
        new_project(tmp_path / "mine")


def test_what_needs_a_project_says_so_and_init_makes_one(llada, tmp_path: Path) -> None:
    refused = llada("status", cwd=tmp_path)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "is no project" in refused.stderr
    made = llada("init", "mine", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert llada("init", "mine", cwd=tmp_path).returncode == 2
    mine = tmp_path / "mine"
    status = subprocess.run(["git", "status", "--porcelain"], cwd=mine, capture_output=True, text=True, check=True)
    assert not status.stdout
    (mine / "cli" / "runs.py").write_text((mine / "cli" / "runs.py").read_text() + "\nprint('code of the project')\n")
    assert "code of the project" in llada("status", cwd=mine).stdout
    run = llada("run", "smoke", "--upto", "prepare", cwd=mine)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    assert list(mine.glob("workspaces/smoke-*/data/card.json"))
