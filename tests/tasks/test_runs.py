"""Launching, attaching, resuming and damage, with toy stages as real jobs on this machine."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llada_core import settings
from llada_core.settings import ConfigError
from tasks.folders import write_json
from tasks.graph import load_stage
from tasks.launch import local
from tasks.launch.launcher import launcher_for
from tasks.launch.local import start_time
from tasks.launch.program import run_stage
from tasks.launch.slurm import SlurmLauncher
from tasks.project import LaunchParams, Params, Project
from tasks.record.runs import RunFolder, all_runs, find_run, open_run, stage_params
from tests.tasks.conftest import REPOSITORY
from tests.waiting import PATIENCE, says, wait_for


def program(*arguments: str, **env: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | env,
        start_new_session=True,
    )


def finish(process: subprocess.Popen) -> str:
    text = process.stdout.read()  # communicate() would lose what readline() has buffered
    assert process.wait(timeout=PATIENCE) == 0, text
    return text


def the_run(project: Path, stage: str = "pretrain") -> RunFolder:
    [run] = [r for r in all_runs(Project.at(project)) if r.stage == stage]
    return run


def steps(run: RunFolder) -> list[int]:
    return [int(line.split()[0]) for line in (run.path / "steps.txt").read_text().splitlines()]


def at_step(project: Path, step: int) -> None:
    wait_for(f"step {step}", lambda: list(project.glob("runs/*/steps.txt")) and step in steps(the_run(project)))


def open_toy(project: Path, *overrides: str) -> RunFolder:
    params = stage_params(Project.at(project), list(overrides))
    return open_run(Project.at(project), load_stage(Project.at(project), "pretrain", params), params)


def test_a_stage_runs_as_a_job_and_its_output_is_published(project: Path) -> None:
    text = finish(program("tasks.pretrain"))
    run = the_run(project)
    assert "first step 4" in text
    assert run.succeeded
    assert (project / "models/pretrain/weights").read_text() == "hello pretrain 4 first"
    assert "already made" in finish(program("tasks.pretrain"))
    assert steps(run) == [1, 2, 3, 4]


def test_the_fingerprint_is_what_determines_the_result(project: Path) -> None:
    first = open_toy(project)
    assert open_toy(project, "launch.kind=inline", "sft.max_steps=9").key == first.key
    assert open_toy(project, "pretrain.max_steps=9").key != first.key
    (project / "inputs/text").write_text("other")
    assert open_toy(project).key != first.key
    (project / "inputs/text").write_text("hello")
    with (project / "tasks/pretrain.py").open("a") as file:
        file.write("# changed\n")
    assert open_toy(project).key != first.key


def test_killed_orchestrator_leaves_the_job_and_the_next_attaches(project: Path) -> None:
    (project / "wait-pretrain-2").touch()
    first = program("tasks.pretrain")
    at_step(project, 2)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    second = program("tasks.pretrain")
    says(second, "following")
    (project / "wait-pretrain-2").unlink()
    finish(second)
    run = the_run(project)
    assert steps(run) == [1, 2, 3, 4]
    assert len((run.path / "attempts.txt").read_text().splitlines()) == 1


def test_a_killed_program_is_restarted_from_its_checkpoint(project: Path) -> None:
    (project / "die-pretrain-2").touch()
    text = finish(program("tasks.pretrain"))
    assert "restart 1 of 1" in text
    assert steps(the_run(project)) == [1, 2, 3, 4]


def test_a_killed_job_is_submitted_again_and_goes_on(project: Path) -> None:
    (project / "wait-pretrain-2").touch()
    first = program("tasks.pretrain")
    at_step(project, 2)
    os.killpg(the_run(project).job["pid"], signal.SIGKILL)
    text = first.communicate(timeout=PATIENCE)[0]
    assert first.returncode == 1
    assert "without success" in text
    (project / "wait-pretrain-2").unlink()
    finish(program("tasks.pretrain"))
    assert steps(the_run(project)) == [1, 2, 3, 4]


def test_a_job_whose_leader_died_is_waited_for_not_doubled(project: Path) -> None:
    (project / "wait-pretrain-2").touch()
    first = program("tasks.pretrain")
    at_step(project, 2)
    dead = the_run(project).job["pid"]
    os.kill(dead, signal.SIGKILL)  # the script alone: its program lives on
    first.communicate(timeout=PATIENCE)
    second = program("tasks.pretrain")
    wait_for("a second job", lambda: the_run(project).job and the_run(project).job["pid"] != dead)
    (project / "wait-pretrain-2").unlink()
    finish(second)
    run = the_run(project)
    assert steps(run) == [1, 2, 3, 4]
    assert len({line.split()[1] for line in (run.path / "steps.txt").read_text().splitlines()}) == 1


PREPARE = '''\
"""A toy of the stage that is always done again: notes that it was, and waits while a file asks for it."""
import time
from pathlib import Path
from tasks.launch.program import StageContext, stage_program

def work(w: StageContext) -> None:
    asked = Path(w.run.request["root"])
    with (asked / "times").open("a") as file:
        file.write("once ")
    while (asked / "wait-prepare").exists():
        time.sleep(0.02)

if __name__ == "__main__":
    stage_program("prepare", work)
'''


def test_what_is_always_done_again_is_done_once_for_two_who_ask_at_once(project: Path) -> None:
    (project / "tasks/prepare.py").write_text(PREPARE)
    stage = "  prepare:\n    cmd: python -m tasks.prepare\n    deps: [tasks/prepare.py]\n"
    (project / "dvc.yaml").write_text((project / "dvc.yaml").read_text().replace("stages:\n", f"stages:\n{stage}"))
    finish(program("tasks.prepare"))
    finish(program("tasks.prepare"))
    (project / "wait-prepare").touch()
    first = program("tasks.prepare")
    wait_for("the third time", lambda: (project / "times").read_text() == "once once once ")
    second = program("tasks.prepare")
    says(second, "already running, following it")
    (project / "wait-prepare").unlink()
    finish(first)
    finish(second)
    assert (project / "times").read_text() == "once once once "


def test_a_mistake_is_one_line_and_not_retried(project: Path) -> None:
    (project / "mistake-pretrain-2").touch()
    process = program("tasks.pretrain")
    text = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 2
    assert "error: a mistake of the user" in text
    assert "Traceback" not in text
    assert "restart" not in text


def test_sigterm_ends_the_job_and_the_same_command_goes_on(project: Path) -> None:
    (project / "wait-pretrain-2").touch()
    first = program("tasks.pretrain")
    at_step(project, 2)
    os.kill(first.pid, signal.SIGTERM)
    first.communicate(timeout=PATIENCE)
    assert first.returncode == 143
    run = the_run(project)
    assert start_time(run.job["pid"]) is None
    finish(program("tasks.pretrain"))
    assert steps(run) == [1, 2, 3, 4]


ALONE = "{compute_environment: LOCAL_MACHINE, distributed_type: 'NO', use_cpu: true, num_processes: 1}"


def test_the_job_runs_the_code_and_the_accelerate_file_that_were_submitted(project: Path) -> None:
    (project / "wait-pretrain-2").touch()
    (project / "die-pretrain-3").touch()
    (project / "mine.yaml").write_text(ALONE)
    first = program("tasks.pretrain", "launch.accelerate_config=mine.yaml")
    at_step(project, 2)
    (project / "mine.yaml").write_text("no accelerate file any more")
    source = project / "tasks/pretrain.py"
    source.write_text(source.read_text().replace('"first"', '"second"'))
    (project / "inputs/text").write_text("changed since")
    (project / "wait-pretrain-2").unlink()
    finish(first)
    assert (project / "models/pretrain/weights").read_text() == "hello pretrain 4 first"


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "zero2", "zero3"])
def test_the_accelerate_file_of_a_distribution_is_the_snapshots(project: Path, kind: str) -> None:
    run = open_toy(project, f"pretrain.distribution.kind={kind}", "launch.processes=2")
    launch = Params.parse(run.request["all_params"], "").launch
    (project / "tasks/accelerate" / f"{kind}.yaml").write_text("edited since")
    named = re.search(r"--config_file (\S+)", SlurmLauncher(launch).script(run))
    assert (REPOSITORY / "tasks/accelerate" / f"{kind}.yaml").read_text() == Path(named[1]).read_text()


def test_without_deepspeed_nothing_is_submitted(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"^distribution zero2 needs .* deepspeed: pip install 'lladaflow\[zero\]'$"):
        run_stage(Project.at(project), "pretrain", ["pretrain.distribution.kind=zero2"], lambda work: None)
    assert not list(project.glob("runs/*/job.json"))


def test_processes_without_a_gpu_have_a_thread_each_and_give_way_to_gpus(project: Path, monkeypatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def script(gpus: int, *changes: str, kind: str = "local") -> str:
        monkeypatch.setattr(local, "visible_gpus", lambda: gpus)
        launch = Params.parse(stage_params(Project.at(project), list(changes)), "").launch
        return launcher_for(launch, kind).script(open_toy(project, "pretrain.batch_size=12"))

    assert "--num_processes" not in script(0)
    two = script(0, "launch.cpu_processes=2")
    assert "--num_processes 2 " in two
    assert "OMP_NUM_THREADS=1" in two.replace("'", "")
    assert "--num_processes 4 " in script(0, "launch.cpu_processes=5")  # 12 rows do not divide over 5
    assert "--num_processes" not in script(1, "launch.cpu_processes=2")
    assert "OMP_NUM_THREADS" not in script(4, "launch.cpu_processes=2")
    assert "--num_processes 4 " in script(4, "launch.cpu_processes=2")
    assert "--num_processes 8 " in script(0, "launch.cpu_processes=2", "launch.processes=8")
    gpus = "launch.slurm.gpus_per_node=3"
    assert "--num_processes 2 " in script(0, "launch.cpu_processes=2", kind="slurm")
    assert "--num_processes 3 " in script(0, "launch.cpu_processes=2", gpus, kind="slurm")


def test_an_accelerate_file_that_is_not_there_is_told(project: Path) -> None:
    process = program("tasks.pretrain", "launch.accelerate_config=mine.yaml")
    assert "mine.yaml; give a path from the project's folder" in process.communicate()[0]
    assert process.returncode == 2


def test_inline_and_by_hand(project: Path) -> None:
    finish(program("tasks.pretrain", "launch.kind=inline", "pretrain.max_steps=2"))
    assert (project / "models/pretrain/weights").read_text() == "hello pretrain 2 first"
    assert (project / "params.yaml").read_text().count("max_steps: 4") == 1


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["pretrain.max_stepz=3"], "did you mean 'max_steps'"),
        (["a", "b"], "overrides are written block.key=value"),
        (["pretrain.max_steps=0"], "greater than or equal to 1"),
    ],
)
def test_bad_input_is_one_line(project: Path, arguments: list[str], line: str) -> None:
    process = program("tasks.pretrain", *arguments)
    text = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 2
    assert line in text
    assert len(text.strip().splitlines()) == 1


def test_costly_stages_are_not_done_again_unasked(project: Path) -> None:
    finish(program("tasks.pretrain"))  # the toy says it took two hours
    process = program("tasks.pretrain", "pretrain.max_steps=5")
    text = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 1
    assert "pretrain.max_steps: 4 -> 5" in text
    assert (project / "models/pretrain/weights").read_text() == "hello pretrain 4 first"
    finish(program("tasks.pretrain", "pretrain.max_steps=5", LLADAFLOW_YES="1"))
    assert (project / "models/pretrain/weights").read_text() == "hello pretrain 5 first"


def test_runs_are_found_by_prefix_or_stage(project: Path) -> None:
    run = open_toy(project)
    assert find_run(Project.at(project), "pretrain").key == find_run(Project.at(project), run.key[:14]).key == run.key
    for nothing in ("nothing", ""):  # of a shell's variable that is not set
        with pytest.raises(ValueError, match=f"no run '{nothing}'"):
            find_run(Project.at(project), nothing)


def test_damaged_state_is_named(project: Path) -> None:
    run = open_toy(project)
    (run.path / "job.json").write_text("{")
    process = program("tasks.pretrain")
    assert "job.json is damaged" in process.communicate(timeout=PATIENCE)[0]
    assert json.loads((run.path / "request.json").read_text())["stage"] == "pretrain"


def test_a_stage_tells_its_usage_and_refuses_what_is_no_override(capsys):
    from tasks.launch.program import stage_program

    stage_program("sft", lambda work: None, ["--help"])
    assert capsys.readouterr().out.startswith("python -m tasks.sft [block.key=value ...]")
    with pytest.raises(SystemExit) as ended:
        stage_program("sft", lambda work: None, ["sudoku", "sft.max_steps=3"])
    assert ended.value.code == 2
    assert "unexpected 'sudoku'" in capsys.readouterr().err


def test_evaluation_on_several_nodes_is_a_process_a_gpu_and_on_one_node_starts_its_own(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "evaluate@b1-0")
    run.path.mkdir()
    write_json(run.path / "request.json", {"stage": "evaluate@b1", "root": str(tmp_path), "all_params": {}})

    def command(**slurm: object) -> str:
        own = {"processes": slurm.pop("processes", None), "slurm": {"gpus_per_node": 4, **slurm}}
        return SlurmLauncher(LaunchParams.parse({"kind": "slurm", **own}, "launch")).script(run)

    assert "accelerate" not in command()
    assert "--num_processes 8 --num_machines 2" in command(nodes=2)
    assert "--num_processes 2 --num_machines 2" in command(nodes=2, processes=1)


@pytest.mark.parametrize(("chosen", "seen"), [(None, 3), ("0,2", 2), ("", 0), ("-1", 0), ("1,-1,0", 1)])
def test_gpus_are_counted_as_cuda_counts_them(chosen: str | None, seen: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from tasks.project import visible_gpus

    devices = [Path(f"/dev/nvidia{n}") for n in (0, 1, 2)] + [Path("/dev/nvidia-caps"), Path("/dev/nvidiactl")]
    monkeypatch.setattr(Path, "glob", lambda self, pattern: [d for d in devices if d.name[6].isdigit()])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if chosen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert visible_gpus() == seen
