"""What a wheel adds to the code: its start, and `llada init`. A wheel installs this package as `lladaflow`.

`llada_core` lies in site-packages under its own name; tasks, flows, app and cli, whose names are anybody's, lie below
`lladaflow/project` with what else a project needs, and are found there by llada and what it starts alone
(docs/decisions/0009).
"""

import os
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

import llada_core
from llada_core.settings import ConfigError

HERE = Path(__file__).resolve().parent
ROOMS = ("tasks", "flows", "app", "cli", "profiles")
FILES = ("params.yaml", "dvc.yaml", "prefect.yaml", "Makefile", "pyproject.toml", "setup.py", "constraints.txt")
DOCUMENTS = ("README.md", "AGENTS.md", "CONTRIBUTING.md", "LICENSE", ".gitignore", ".dvcignore", ".dvc/config")


def main() -> None:
    """`llada` of a wheel: in a project with the project's code, elsewhere with the code that came with the wheel."""
    if (HERE / "project").is_dir():
        ours = Path.cwd() if is_project(Path.cwd()) else HERE / "project"
        sys.path.insert(0, str(ours))
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ours), os.environ.get("PYTHONPATH"))))
    import_module("cli.main").main()


def is_project(folder: Path) -> bool:
    """Whether a folder holds stages, their parameters and the code that they run."""
    return all((folder / name).exists() for name in ("dvc.yaml", "params.yaml", "tasks", "cli"))


def new_project(folder: Path) -> None:
    """Copy the code and what it reads into a new folder, as a git checkout where git is there.

    Raises FileExistsError for a folder that holds something, `ConfigError` with git's words where it refuses.
    """
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; give the name of a new folder")
    code = HERE.parents[1]  # this file is cli/wheel/__init__.py, in a checkout and below lladaflow/project
    library = Path(str(llada_core.__file__)).parent
    for source in (library, *(code / room for room in ROOMS)):
        shutil.copytree(source, folder / source.name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    for name in (*FILES, *DOCUMENTS):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(code / name, folder / name)
    if git := shutil.which("git"):
        quiet = ["-c", "user.name=llada init", "-c", "user.email=llada@localhost", "-c", "commit.gpgsign=false"]
        for words in (["init", "-q"], ["add", "-A"], [*quiet, "commit", "-q", "--no-verify", "-m", "llada init"]):
            done = subprocess.run([git, *words], cwd=folder, capture_output=True, text=True)
            if done.returncode:
                told = " ".join(done.stderr.split())
                raise ConfigError(f"git does not take {folder}: {told} (empty the folder before you call this again)")


def init(folder: Annotated[Path, typer.Argument(help="the new folder")]) -> None:
    """Make a project: the code, params.yaml, dvc.yaml and profiles in a new folder, where `llada run` works."""
    new_project(folder)
    print(f"{folder} is a project: cd {folder} && llada run smoke, or your own profile (README.md)")
