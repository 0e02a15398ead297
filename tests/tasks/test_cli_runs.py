"""The commands over runs, called as a person would, on the toy project."""

import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from cli.options import telling
from cli.runs import COMMANDS
from tasks.launch.program import summary
from tasks.launch.status import state_of
from tasks.project import Project
from tests.ports import free_ports
from tests.tasks.conftest import REPOSITORY
from tests.tasks.test_runs import at_step, finish, program, steps, the_run
from tests.waiting import PATIENCE, processes, says, wait_for

app = typer.Typer()
for command in COMMANDS:
    app.command()(telling(command))


def llada(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def test_a_runs_life(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (project / "wait-pretrain-2").touch()
    job = program("tasks.pretrain")
    at_step(project, 2)
    line = next(text for text in llada("status").splitlines() if "pretrain-" in text)
    assert "running" in line
    assert " 2" in line
    assert "first step 2" in llada("logs", "pretrain")
    assert "checkpoints" not in llada("gc", "--yes")
    assert "stopped" in llada("cancel", "pretrain")
    assert job.wait(timeout=PATIENCE) == 1
    assert "stopped" in llada("status")
    assert "is not running (stopped)" in llada("cancel", "pretrain", code=2)
    finish(program("tasks.pretrain"))
    assert steps(the_run(project)) == [1, 2, 3, 4]
    assert "done" in llada("status")
    assert "checkpoints of a finished run" in llada("gc", "--yes")
    assert not (the_run(project).path / "checkpoints").exists()
    assert "nothing to free" in llada("gc")
    assert "no run 'nope'" in llada("logs", "nope", code=2)


def test_ctrl_c_asks_once_whether_the_job_ends(project: Path) -> None:
    terminal, stdin = os.openpty()
    (project / "wait-pretrain-2").touch()
    command = [sys.executable, "-m", "tasks.pretrain"]
    first = subprocess.Popen(command, stdin=stdin, stdout=subprocess.PIPE, text=True, start_new_session=True)
    at_step(project, 2)
    first.send_signal(signal.SIGINT)
    os.write(terminal, b"n\n")
    text = first.communicate(timeout=PATIENCE)[0]
    assert text.count("end the job of pretrain-") == 1
    assert "it goes on; `llada logs -f pretrain-" in text
    assert first.returncode == 130
    assert state_of(the_run(project)) == "running"
    (project / "wait-pretrain-2").unlink()
    finish(program("tasks.pretrain"))
    assert steps(the_run(project)) == [1, 2, 3, 4]


def test_detached_it_goes_on_and_a_later_command_follows(project: Path) -> None:
    (project / "wait-pretrain-2").touch()
    assert "goes on; log: " in finish(program("cli.main", "run", "--upto", "sft", "--detach"))
    at_step(project, 2)
    follower = program("cli.main", "logs", "-f", "pretrain")
    says(follower, "first step 2")
    (project / "wait-pretrain-2").unlink()
    assert "first step 4" in finish(follower)
    wait_for("the second stage", (project / "models/sft/weights").exists)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_run_that_is_told_to_end_takes_its_stage_along(project: Path, number: int) -> None:
    (project / "wait-pretrain-2").touch()
    whole = program("cli.main", "run", "--upto", "pretrain")
    at_step(project, 2)
    whole.send_signal(number)
    assert whole.wait(timeout=PATIENCE) == 128 + number
    home = str(project).encode()
    assert not [
        pid
        for pid, values in processes("environ")
        if any(value.startswith(b"LLADAFLOW_RUN=" + home) for value in values)
    ]
    (project / "wait-pretrain-2").unlink()
    finish(program("cli.main", "run", "--upto", "pretrain"))
    assert steps(the_run(project)) == [1, 2, 3, 4]


@pytest.mark.faults
@pytest.mark.parametrize("left", ["", '{"write": {"', "\0\0\0\0"], ids=["empty", "half", "zeros"])
def test_what_a_killed_dvc_leaves_half_written_stops_no_later_run(project: Path, left: str) -> None:
    finish(program("cli.main", "run", "--upto", "pretrain"))
    for name in (".dvc/tmp/rwlock", "dvc.lock"):
        (project / name).write_text(left)
        text = finish(program("cli.main", "run", "--upto", "pretrain"))
        assert f"{name} cannot be read (was DVC killed?): put aside as {Path(name).name}.broken" in text
        assert (project / f"{name}.broken").read_text() == left
    assert steps(the_run(project)) == [1, 2, 3, 4]  # nothing was trained again
    assert "put aside" not in finish(program("cli.main", "run", "--upto", "pretrain"))


def test_plan_shows_the_script_and_starts_nothing(project: Path) -> None:
    text = llada("plan", "--stage", "pretrain")
    assert "-m tasks.pretrain" in text
    assert not the_run(project).job
    slurm = "launch={kind: slurm, slurm: {nodes: 2, partition: big, setup: [module load x]}, processes: 4}"
    text = llada("plan", "--stage", "pretrain", "-S", slurm)
    for line in (
        "#SBATCH --nodes=2",
        "#SBATCH --partition=big",
        "module load x",
        "--num_processes 8",
        "--machine_rank",
    ):
        assert line in text


def test_accept_keeps_outputs_as_valid(project: Path) -> None:
    subprocess.run([sys.executable, "-m", "dvc", "repro", "-q", "sft"], check=True)
    with (project / "tasks/pretrain.py").open("a") as file:
        file.write("# a remark\n")
    llada("accept", "pretrain")
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "status", "sft", "pretrain"], capture_output=True, text=True, check=True
    )
    assert "up to date" in done.stdout


def test_run_says_what_it_made(project: Path) -> None:
    shutil.rmtree(project / "tasks/__pycache__", ignore_errors=True)
    assert "llada status" in llada("run", "--upto", "sft")
    assert (project / "models/sft/weights").exists()
    assert "unknown key" in llada("run", "-S", "sft.max_stepz=1", code=2)
    for command in (("run", "--upto", "sftt"), ("accept", "sftt")):
        assert "no stage 'sftt'; did you mean 'sft'?" in llada(*command, code=2)


def test_doctor_finds_this_machine_fit(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A Slurm client whose controller is down is a finding of its own, and CI has one.
    monkeypatch.setattr("tasks.launch.doctor.shutil.which", lambda name: None if name == "sbatch" else name)
    text = llada("doctor")
    assert all(line.startswith(("ok ", "BAD  writes ")) for line in text.splitlines()), text  # a disk may be busy
    assert "file locks" in text
    os.environ["MLFLOW_TRACKING_URI"] = "http://127.0.0.1:9"
    try:
        assert "metrics are kept" in llada("doctor", code=1)
    finally:
        del os.environ["MLFLOW_TRACKING_URI"]


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_both_dashboards_are_up_until_ctrl_c_and_leave_nothing(
    project: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setenv("PREFECT_HOME", str(project / "prefect"))
    ports = [str(port) for port in free_ports(2)]
    shutil.copy(REPOSITORY / "prefect.yaml", project)
    shutil.copytree(REPOSITORY / "flows", project / "flows")
    process = program("cli.main", "ui", "--mlflow-port", ports[0], "--prefect-port", ports[1])
    try:
        for port in ports:
            wait_for(f"a page on port {port}", lambda port=port: process.poll() or "<html" in page(port))
        told = next(line for line in process.stdout or () if "deployments are not" in line or "prefect.yaml:" in line)
    finally:
        process.send_signal(number)
        text = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 0, text
    assert f":{ports[1]}/deployments" in told
    assert "both end" in text
    assert "Traceback" not in text
    assert not [line for _, line in processes("cmdline") if {port.encode() for port in ports} & set(line)]


def page(port: str) -> str:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/") as answer:
            return answer.read().decode().lower()
    except OSError:
        return ""


def test_a_run_ends_with_the_commands_that_fit_what_was_made(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    here = Project.at(project.resolve())
    assert "llada chat" not in summary(here)
    for stage in ("pretrain", "sft"):
        (project / "models" / stage).mkdir(parents=True)
    os.utime(project / "models/pretrain", (1, 1))
    assert "make app MODEL=models/sft " in summary(here)
    assert "llada chat --model models/sft " in summary(here)
    entry = {"name": "toy", "version": "2", "champion": "1", "aliases": ["candidate"], "gate": {"reason": "kept back"}}
    (project / "reports").mkdir(exist_ok=True)
    (project / "reports/registered.json").write_text(json.dumps(entry))
    assert "llada chat --model models:/toy/2 " in summary(here)
    (project / "reports/registered.json").write_text(json.dumps(entry | {"champion": "2"}))
    assert "  llada chat   " in summary(here)
    monkeypatch.chdir(project.parent)
    assert "make app MODEL=models:/toy@champion " in summary(here)


def test_two_runs_are_compared_in_the_terminal(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    finish(program("tasks.pretrain"))
    finish(program("tasks.pretrain", "pretrain.learning_rate=0.25", LLADAFLOW_YES="1"))
    a, b = sorted((project / "runs").glob("pretrain-*"), key=lambda path: path.stat().st_mtime)
    shown = llada("runs", "compare", a.name, b.name)
    assert "pretrain.learning_rate" in shown
    assert "loss: 0.25 -> 0.25" in shown
    llada("runs", "compare", a.name, code=2)
    [line, *_] = [json.loads(text) for text in llada("status", "--json").splitlines()]
    assert (line["state"], line["of"]) == ("done", "toy")
    assert datetime.fromisoformat(line["begun"]).tzinfo
    assert (line["step"], line["left"]) == (4, None)
    assert line["took"] > 0 < line["GB"]


def test_with_json_stdout_is_one_object(project: Path) -> None:
    def asked(*arguments: str) -> Any:
        result = CliRunner().invoke(app, [*arguments, "--json"])
        assert result.exit_code in (0, 1), (result.output, result.exception)
        return json.loads(result.stdout)

    spec = (project / "dvc.yaml").read_text()
    (project / "dvc.yaml").write_text(spec[: spec.index("  evaluate:")])
    made = asked("run")
    assert (made["workspace"], made["profile"]) == (str(project), "toy")
    assert made["runs"] == {stage: the_run(project, stage).key for stage in ("pretrain", "sft")}
    assert made["models"]["sft"] == str(project / "models/sft")
    assert made["registered"] is None
    found = asked("doctor")
    assert found["fit"] == all(finding["fine"] for finding in found["findings"])
    assert {"fine", "what", "remedy"} <= found["findings"][0].keys()
