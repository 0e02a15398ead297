"""Workspaces: code and parameters as submitted, the shared cache, the pruned graph; DVC's own commands."""

import os
import shutil
import subprocess
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import yaml

from llada_core.settings import ConfigError
from tasks.graph import prune
from tasks.launch.program import dvc, reproduce
from tasks.launch.workspace import open_workspace, pipeline_lock
from tasks.project import Project

SFT_ONLY = """\
name: tuned
stages: [sft]
sft: {max_steps: 2, init_from: base}
launch: {kind: inline}
"""


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def weights(folder: Path, stage: str = "sft") -> str:
    return (folder / "models" / stage / "weights").read_text()


def test_overrides_make_a_workspace_and_leave_the_checkout_alone(project: Path) -> None:
    main = open_workspace(Project.at(project))
    assert main.root == project
    reproduce(main, ["sft"])
    assert weights(project) == "hello pretrain 4 first sft 3 first"
    before = run("git", "status", "--short", cwd=project)
    other = open_workspace(Project.at(project), overrides=["sft.max_steps=5"])
    reproduce(other, ["sft"])
    assert weights(other.root) == "hello pretrain 4 first sft 5 first"
    assert weights(project) == "hello pretrain 4 first sft 3 first"
    assert run("git", "status", "--short", cwd=project) == before
    assert len(list((project / "runs").glob("pretrain-*"))) == 1  # the shared cache gave the rest
    assert open_workspace(Project.at(project), overrides=["sft.max_steps=5"]).root == other.root
    assert open_workspace(Project.at(project), overrides=["sft.max_steps=5", "launch.restarts=0"]).root == other.root
    run("dvc", "repro", cwd=other.root)


def test_a_workspace_holds_the_code_as_it_was_submitted(project: Path) -> None:
    source = project / "tasks/sft.py"
    source.write_text(source.read_text().replace('"first"', '"edited"'))  # tracked, not committed
    first = open_workspace(Project.at(project), overrides=["sft.max_steps=1"])
    source.write_text(source.read_text().replace('"edited"', '"later"'))
    assert '"edited"' in (first.root / "tasks/sft.py").read_text()
    second = open_workspace(Project.at(project), overrides=["sft.max_steps=1"])
    assert second.root != first.root
    reproduce(first, ["sft"])
    assert weights(first.root).endswith("1 edited")


def test_a_profile_lists_its_stages_and_absent_ones_leave_no_node(project: Path) -> None:
    (project / "profiles").mkdir()
    (project / "profiles/tuned.yaml").write_text(SFT_ONLY)
    base = project / "base"
    base.mkdir()
    (base / "weights").write_text("theirs")
    (project / "tasks/sft.py").write_text(
        (project / "tasks/sft.py").read_text().replace("Path(SOURCE)", "Path(w.params.sft.init_from, 'weights')")
    )
    workspace = open_workspace(Project.at(project), "tuned")
    stages = yaml.safe_load((workspace.root / "dvc.yaml").read_text())["stages"]
    assert list(stages) == ["sft"]
    assert stages["sft"]["deps"] == ["tasks/sft.py", str(base)]
    reproduce(workspace, [])
    assert weights(workspace.root) == "theirs sft 2 first"
    with pytest.raises(ConfigError, match="no profile 'tunde'; did you mean 'tuned'"):
        open_workspace(Project.at(project), "tunde")


def test_a_source_that_no_stage_makes_is_refused(project: Path) -> None:
    spec = yaml.safe_load((project / "dvc.yaml").read_text())
    with pytest.raises(ConfigError, match=r"sft\.init_from is 'pretrain', which this run does not make"):
        prune(spec, {"stages": ["sft"], "sft": {"init_from": "pretrain"}})
    kept = prune(spec, {"stages": ["evaluate"]})
    assert kept["stages"]["evaluate"]["do"]["deps"] == []


def test_without_git_the_pipeline_still_works(project: Path) -> None:
    shutil.rmtree(project / ".git")
    reproduce(open_workspace(Project.at(project)), ["sft"])
    assert weights(project) == "hello pretrain 4 first sft 3 first"
    other = open_workspace(Project.at(project), overrides=["sft.max_steps=5"])
    reproduce(other, ["sft"])
    assert weights(other.root) == "hello pretrain 4 first sft 5 first"


def test_the_second_pipeline_says_who_holds_the_lock(project: Path) -> None:
    with (
        pipeline_lock(Project(project)),
        pytest.raises(ConfigError, match=f"running the pipeline in .* \\(process {os.getpid()}, since 2"),
        pipeline_lock(Project(project)),
    ):
        pass


@pytest.mark.slow
def test_dvc_commands_of_every_day(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLADAFLOW_YES", "1")
    reproduce(open_workspace(Project.at(project)), ["sft"])
    run("git", "add", "-A", cwd=project)
    run("git", "commit", "-qm", "run", cwd=project)
    assert "didn't change" in run("dvc", "repro", "sft", cwd=project)
    assert "sft" in run("dvc", "dag", "--mermaid", cwd=project)
    run("dvc", "remote", "add", "-d", "--local", "folder", str(tmp_path / "remote"), cwd=project)
    run("dvc", "push", "sft", "pretrain", cwd=project)
    shutil.rmtree(project / "models")
    shutil.rmtree(project / ".dvc/cache")
    run("dvc", "pull", "sft", "pretrain", cwd=project)
    assert weights(project) == "hello pretrain 4 first sft 3 first"
    run("dvc", "exp", "run", "-n", "two", "-S", "sft.max_steps=2", "sft", cwd=project)
    assert weights(project) == "hello pretrain 4 first sft 2 first"
    assert "sft.max_steps" in run("dvc", "params", "diff", cwd=project)
    assert dvc(Project(project), "repro", "nosuch") != 0


@pytest.mark.faults
@pytest.mark.parametrize("number", [2, 9])
def test_killing_dvc_and_its_command_loses_nothing(project: Path, number: int) -> None:
    from tests.tasks.test_runs import at_step, steps, the_run

    (project / "wait-pretrain-2").touch()
    first = subprocess.Popen([sys.executable, "-m", "dvc", "repro", "sft"], cwd=project, start_new_session=True)
    at_step(project, 2)
    os.killpg(first.pid, number)
    first.wait()
    (project / "wait-pretrain-2").unlink()
    run(sys.executable, "-m", "dvc", "repro", "sft", cwd=project)
    assert weights(project) == "hello pretrain 4 first sft 3 first"
    assert steps(the_run(project)) == [1, 2, 3, 4]


def test_a_project_says_once_what_it_has_and_where(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    here, file = Project.at(), project / "params.yaml"
    assert (here.root, here.home, here.runs, here.store) == (project, project, project / "runs", project / "store")
    assert here.tracking_uri == f"sqlite:///{project / 'mlflow.db'}"
    assert here == Project(project)
    assert here.params.seed == here.values["seed"] == 1
    file.write_text(file.read_text().replace("seed: 1", "seed: 2"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere")
    assert (here.params.seed, here.tracking_uri) == (1, f"sqlite:///{project / 'mlflow.db'}")
    assert (Project.at().params.seed, Project.at().tracking_uri) == (2, "http://elsewhere")
    with pytest.raises(FrozenInstanceError):
        here.root = project.parent  # type: ignore[misc]
