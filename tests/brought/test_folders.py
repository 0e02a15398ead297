"""Folders and machines as people bring them: odd names, moved and copied checkouts, every state that git may be in.

A new case is a line of NAMES (a folder's name) or a function of GIT_STATES (what was done to a checkout before).
"""

import os
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from llada_core.settings import ConfigError
from tasks.folders import git, prune_worktrees, require, sqlite_file, sqlite_uri, write_json
from tasks.graph import load_stage
from tasks.launch.local import LocalLauncher
from tasks.launch.program import reproduce
from tasks.launch.slurm import SlurmLauncher
from tasks.launch.workspace import configure_workspace, open_workspace
from tasks.project import LaunchParams, Project
from tasks.record.runs import RunFolder, all_runs, open_run, stage_params
from tests.tasks.conftest import DVC, PARAMS, REPOSITORY, project  # noqa: F401  (a fixture)

NAMES = (
    "run #2", "what? now", "run%20one", "job %j of %u", "a: b", "Grüße", "it's $HOME", 'say "hi"', "a=b,c;d", "[x]*{y}",
    "50%", "back\\slash", "-dash", "end ", "日本 🙂", "a&b|c", "~tilde", "!bang", "${name}", "file:", "a@b",
)  # fmt: skip


def made(folder: Path) -> Path:
    """A checkout with one commit at `folder`, of the few files that a workspace needs."""
    for name, text in {
        "params.yaml": PARAMS,
        "dvc.yaml": DVC,
        "tasks/pretrain.py": "first",
        "llada_core/__init__.py": "",
        "inputs/text": "hello",
        "README.md": "read me",
        ".dvc/config": "[core]\n    analytics = false\n",
        ".dvc/.gitignore": "/config.local\n/tmp\n/cache\n",
        ".gitignore": (REPOSITORY / ".gitignore").read_text(),
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    for command in ("init -q", "add -A", "-c user.name=a -c user.email=a@b commit -qm first"):
        subprocess.run(["git", *command.split()], cwd=folder, check=True)
    return folder


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A committed checkout, which is the working directory."""
    monkeypatch.delenv("LLADAFLOW_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))  # no identity, no settings
    root = made(tmp_path / "checkout")
    monkeypatch.chdir(root)
    return root


def run_of(root: Path) -> RunFolder:
    params = stage_params(Project.at(root), [])
    return open_run(Project.at(root), load_stage(Project.at(root), "pretrain", params), params)


@pytest.mark.parametrize("name", NAMES)
def test_everything_of_a_project_stays_in_its_folder(name: str, tmp_path: Path) -> None:
    import sqlalchemy
    from dvc.config import Config

    root = tmp_path / name
    file, place = root / "mlflow.db", root / "workspaces" / "toy-1"
    (place / ".dvc").mkdir(parents=True)
    (root / ".dvc").mkdir()
    (root / ".dvc/config").write_text("['remote \"near\"']\n    url = ../remote\n")

    uri = sqlite_uri(file)
    if uri.startswith("sqlite:///"):  # MLflow makes the folder that such an address spells, without decoding it
        assert Path(uri.removeprefix("sqlite:///")) == file
    with sqlalchemy.create_engine(uri).connect() as database:
        database.execute(sqlalchemy.text("create table t (x)"))
    assert file.exists()
    assert sqlite_file(uri) == file
    require("MLflow", uri, "MLFLOW_TRACKING_URI")

    configure_workspace(root, place)
    settings = Config(str(place / ".dvc"))
    assert Path(settings["cache"]["dir"]).resolve() == root / ".dvc" / "cache"
    assert Path(settings["remote"]["near"]["url"]).resolve() == root / "remote"
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("name", NAMES)
def test_a_job_starts_from_any_folder(name: str, tmp_path: Path) -> None:
    root = tmp_path / name
    shutil.copytree(REPOSITORY / "llada_core/verifiers", root / "llada_core/verifiers")
    run = run_of(made(root))
    script = SlurmLauncher(LaunchParams()).script(run)
    options = [shlex.split(line[1:]) for line in script.splitlines() if line.startswith("#SBATCH")]
    assert ["SBATCH", f"--output={run.log}".replace("%", "%%")] in options
    assert all(len(option) == 2 for option in options)
    shown = "\n".join(
        line
        for line in LocalLauncher(LaunchParams()).script(run).splitlines()
        if line.startswith(("run=", "cd ", "export"))
    )
    asked = f'{shown}\nprintf "%s" "$PYTHONPATH"'
    paths = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, check=True).stdout.split(":")
    assert [(run.tree / path).resolve() for path in paths] == [run.tree, root]


def test_a_project_with_an_odd_name_runs_and_goes_on_where_it_was_moved_to(project: Path) -> None:  # noqa: F811
    odd = project.rename(project.with_name("run #2 what? 1%20%j: ü"))
    os.chdir(odd)
    first = open_workspace(Project.at(odd), overrides=["sft.max_steps=2", "launch.kind=inline"])
    reproduce(first, ["sft"])
    assert os.listdir(odd.parent) == [odd.name]
    runs = sorted(run.key for run in all_runs(Project.at(odd)))

    moved = odd.rename(odd.with_name("elsewhere #3"))
    os.chdir(moved)
    again = open_workspace(Project.at(moved), overrides=["sft.max_steps=2", "launch.kind=inline"])
    assert again.root == moved / "workspaces" / first.root.name
    shutil.rmtree(again.root / "models")
    reproduce(again, ["sft"])
    assert (again.root / "models/sft/weights").read_text().endswith("sft 2 first")
    assert sorted(run.key for run in all_runs(Project.at(moved))) == runs
    assert all(run.root in (moved, again.root) for run in all_runs(Project.at(moved)))
    assert os.listdir(moved.parent) == [moved.name]


def stand(folder: Path) -> dict[str, bytes]:
    """Every file of a folder with its content."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("how", ["cp -r", "cp -a", "rsync -a", "mv"])
def test_a_copy_never_writes_into_the_original(checkout: Path, how: str) -> None:
    if not shutil.which(how.split()[0]):
        pytest.skip(f"no {how}")
    workspace, overrides = open_workspace(Project.at(checkout), overrides=["seed=2"]), ["seed=2"]
    run = run_of(workspace.root)
    before, other = stand(checkout), checkout.with_name("other place")
    source = f"{checkout}/" if how.startswith("rsync") else str(checkout)
    subprocess.run([*how.split(), source, str(other)], check=True)
    os.chdir(other)

    again = open_workspace(Project.at(other), overrides=overrides)
    assert again.root == other / "workspaces" / workspace.root.name
    assert Project.at(again.root).home == other
    assert run_of(again.root).path == other / "runs" / run.key
    assert run_of(again.root).root == again.root
    assert Path(git(again.root, "rev-parse", "--git-common-dir")).resolve() == other / ".git"
    (other / "tasks/pretrain.py").write_text("second")  # a new workspace lets git forget what is gone
    assert open_workspace(Project.at(other), overrides=overrides).root != again.root
    assert git(again.root, "status", "--porcelain", "params.yaml") == "M params.yaml"
    prune_worktrees(other, other / "workspaces")
    assert len(git(other, "worktree", "list").splitlines()) == 3
    if how != "mv":
        assert stand(checkout) == before


def test_a_copy_has_no_part_in_the_originals_job(checkout: Path) -> None:
    run, launcher = run_of(checkout), LocalLauncher(LaunchParams())
    own = os.getpid()
    from tasks.launch.local import start_time

    run.note_job({"launcher": "local", "pid": own, "start": start_time(own), "log_start": 0})
    assert launcher.state(run) == "alive"
    other = Path(shutil.copytree(checkout, checkout.with_name("copy")))
    copy = RunFolder(other / "runs" / run.key)
    assert launcher.state(copy) == "gone"
    assert copy.job_name == run.job_name
    checkout.rename(checkout.with_name("moved"))
    assert launcher.state(RunFolder(checkout.with_name("moved") / "runs" / run.key)) == "alive"
    assert launcher.state(copy) == "gone"
    write_json(copy.path / "job.json", copy.last_job | {"host": "elsewhere", "folder": str(copy.path)})
    assert launcher.state(copy) == "gone"  # brought from another machine that has it at the same place


def test_a_machine_that_was_started_anew_has_no_old_jobs(checkout: Path) -> None:
    from tasks.launch.local import start_time

    run = run_of(checkout)
    run.note_job({"launcher": "local", "pid": os.getpid(), "start": start_time(os.getpid()), "boot": "before"})
    assert LocalLauncher(LaunchParams()).state(run) == "gone"


def test_a_workspace_that_left_its_project_is_refused(checkout: Path) -> None:
    workspace = open_workspace(Project.at(checkout), overrides=["seed=2"])
    alone = workspace.root.rename(checkout.with_name("alone"))
    with pytest.raises(ValueError, match=r"alone is a workspace outside of its project; move it back to .*workspaces"):
        _ = Project.at(alone).home


def test_workspaces_on_another_disk(checkout: Path) -> None:
    disk = checkout.with_name("disk")
    disk.mkdir()
    (checkout / "workspaces").symlink_to(disk)
    workspace = open_workspace(Project.at(checkout), overrides=["seed=2"])
    assert Project.at(workspace.root.resolve()).home == checkout
    other = checkout.with_name("copy")
    shutil.copytree(checkout, other, symlinks=True)
    with pytest.raises(ConfigError, match=r"belongs to .*checkout; remove the link .*copy/workspaces"):
        open_workspace(Project.at(other), overrides=["seed=2"])


def test_a_home_that_would_change_with_the_folder_is_refused(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLADAFLOW_HOME", "here")
    with pytest.raises(
        ValueError, match=r"LLADAFLOW_HOME=here counts from a folder that changes; give a whole path, /"
    ):
        _ = Project.at(checkout).home


def _shell(root: Path, text: str) -> None:
    subprocess.run(["bash", "-ec", text], cwd=root, check=True)


def _touched(root: Path) -> Path:
    os.utime(root / "README.md")
    return root


def _edited(root: Path) -> Path:
    (root / "tasks/pretrain.py").write_text("edited")
    return root


def _staged(root: Path) -> Path:
    _shell(_edited(root), "git add tasks/pretrain.py; echo unstaged > README.md")
    return root


def _new_and_staged(root: Path) -> Path:
    _shell(root, "echo new > tasks/new.py; git add tasks/new.py")
    return root


def _intended(root: Path) -> Path:
    _shell(root, "echo new > tasks/new.py; git add -N tasks/new.py")
    return root


def _deleted(root: Path) -> Path:
    (root / "README.md").unlink()
    return root


def _without_commit(root: Path) -> Path:
    _shell(root, "rm -rf .git; git init -q; git add -A")
    return root


def _shallow(root: Path) -> Path:
    _shell(
        root,
        "git -c user.name=a -c user.email=b commit -q --allow-empty -m two; git clone -q --depth 1 file://$PWD ../shallow",
    )
    return _edited(root.with_name("shallow"))


def _worktree(root: Path) -> Path:
    _shell(root, "git worktree add -q ../tree")
    return root.with_name("tree")


def _submodule(root: Path) -> Path:
    _shell(
        root,
        "mkdir ../above; cd ../above; git init -q; git -c protocol.file.allow=always submodule --quiet add ../checkout inside",
    )
    return root.with_name("above") / "inside"


def _with_submodule(root: Path) -> Path:
    _shell(
        root,
        "git init -q ../part; git -C ../part -c user.name=a -c user.email=b commit -q --allow-empty -m p; "
        "git -c protocol.file.allow=always submodule --quiet add ../part part",
    )
    return root


def _detached(root: Path) -> Path:
    _shell(root, "git checkout -q --detach")
    return root


def _failing_hooks(root: Path) -> Path:
    _shell(root, "printf '#!/bin/sh\\nexit 1\\n' > .git/hooks/post-checkout; chmod +x .git/hooks/post-checkout")
    return root


def _below_another_repository(root: Path) -> Path:
    _shell(root, "rm -rf .git; cd ..; git init -q")
    return root


def _no_repository(root: Path) -> Path:
    _shell(root, "rm -rf .git")
    return root


def _index_in_use(root: Path) -> Path:
    (root / ".git/index.lock").touch()  # an editor asks for the status
    return _edited(root)


GIT_STATES: tuple[Callable[[Path], Path], ...] = (
    _touched, _edited, _staged, _new_and_staged, _intended, _deleted, _without_commit, _shallow, _worktree, _submodule,
    _with_submodule, _detached, _failing_hooks, _below_another_repository, _no_repository, _index_in_use,
)  # fmt: skip


@pytest.mark.parametrize("state", GIT_STATES, ids=lambda state: state.__name__.strip("_"))
def test_whatever_state_git_is_in_a_workspace_holds_the_files_as_they_are(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, state: Callable[[Path], Path]
) -> None:
    root = state(checkout)
    monkeypatch.chdir(root)
    status = subprocess.run(
        ["git", "--no-optional-locks", "status", "--porcelain"], capture_output=True, check=False
    ).stdout
    workspace = open_workspace(Project.at(root), overrides=["seed=2"])
    for name in ("tasks/pretrain.py", "tasks/new.py", "README.md"):
        ours, theirs = root / name, workspace.root / name
        assert ours.exists() == theirs.exists()
        assert not ours.exists() or ours.read_text() == theirs.read_text()
    assert open_workspace(Project.at(root), overrides=["seed=2"]).root == workspace.root
    assert (
        subprocess.run(["git", "--no-optional-locks", "status", "--porcelain"], capture_output=True, check=False).stdout
        == status
    )
    assert not list(root.glob(".git/lladaflow-index*"))


def test_without_the_program_git(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(checkout))
    workspace = open_workspace(Project.at(checkout), overrides=["seed=2"])
    assert (workspace.root / "tasks/pretrain.py").read_text() == "first"
    assert "no_scm" in (workspace.root / ".dvc/config.local").read_text()


def test_called_from_a_hook_of_another_repository(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = made(checkout.with_name("other"))
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(other / ".git/index"))
    before = stand(other)
    workspace = open_workspace(Project.at(_edited(checkout)), overrides=["seed=2"])
    assert (workspace.root / "tasks/pretrain.py").read_text() == "edited"
    assert stand(other) == before


def test_a_copied_worktree_is_refused_and_a_lost_repository_named(checkout: Path) -> None:
    tree = _worktree(checkout)
    copy = Path(shutil.copytree(tree, tree.with_name("copy")))
    before = stand(checkout / ".git")
    with pytest.raises(ConfigError, match=r"copy is a copy of the git worktree .*tree; remove its file \.git"):
        open_workspace(Project.at(copy), overrides=["seed=2"])
    assert stand(checkout / ".git") == before
    checkout.rename(checkout.with_name("moved"))
    with pytest.raises(ConfigError, match=r"not a git repository: .*; after a move `git worktree repair '.*tree'`"):
        open_workspace(Project.at(tree), overrides=["seed=2"])
