"""What may happen to a run on a real Slurm cluster, and what must come of it: the same weights, one job at a time."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from tasks.launch.slurm import job_name, refused
from tasks.project import Project
from tasks.record.runs import RunFolder
from tests.ports import free_port
from tests.slurm.cluster import Cluster
from tests.slurm.recovery import Recovery
from tests.tasks.conftest import REPOSITORY
from tests.tasks.test_cli_runs import page
from tests.tasks.test_runs import at_step, finish, program, steps, the_run
from tests.waiting import PATIENCE, says, wait_for

pytestmark = pytest.mark.faults
FLOW = "from flows.pipeline import pipeline; pipeline(upto='pretrain')"
SILENCE = 10
UNDISTURBED = "hello pretrain 4 first"
Start = Callable[..., subprocess.Popen]
Cost = Callable[[str, str], Recovery]


@pytest.fixture
def reach(project: Path) -> Start:
    """Start the stage and let it come to a step, where it waits for the file to go."""

    def start(step: int = 2, *overrides: str) -> subprocess.Popen:
        (project / f"wait-pretrain-{step}").touch()
        process = program("tasks.pretrain", *overrides)
        at_step(project, step)
        return process

    return start


def jobs_of(run: RunFolder) -> list[str]:
    """The id of each job that ran for a run, one entry for each start."""
    return [line.split()[0] for line in (run.path / "attempts.txt").read_text().splitlines()]


def undisturbed(project: Path, *, starts: int = 1, jobs: int = 1) -> None:
    """Same weights as without trouble; every step done once, in order; so many starts of so many jobs."""
    run = the_run(project)
    assert (project / "models/pretrain/weights").read_text() == UNDISTURBED
    assert steps(run) == [1, 2, 3, 4]
    assert len(jobs_of(run)) == starts
    assert len(set(jobs_of(run))) == jobs


def test_killed_orchestrator_is_re_attached(slurm: Cluster, project: Path, reach: Start, cost: Cost) -> None:
    recovery = cost("kill -9 of the stage program", "the same command follows the job again")
    first = reach()
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    recovery.struck()
    second = program("tasks.pretrain")
    says(second, "following")
    recovery.over()
    (project / "wait-pretrain-2").unlink()
    assert "first step 1" in finish(second)  # the log is replayed
    undisturbed(project)
    assert "already made" in finish(program("tasks.pretrain"))


@pytest.mark.parametrize("orchestrator", [["-m", "dvc", "repro", "pretrain"], ["-c", FLOW]], ids=["dvc", "flow"])
def test_kill_9_of_dvc_or_of_the_flow(
    slurm: Cluster, project: Path, orchestrator: list[str], cost: Cost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_HOME", str(project.parent / "prefect"))
    recovery = cost(f"kill -9 of {'dvc' if 'dvc' in orchestrator else 'the flow'}", "the same command has ended")
    (project / "wait-pretrain-2").touch()
    command = [sys.executable, *orchestrator]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    at_step(project, 2)
    first.kill()  # it alone: what it started goes on
    first.wait()
    recovery.struck()
    second = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    (project / "wait-pretrain-2").unlink()
    assert second.wait(timeout=PATIENCE) == 0
    recovery.over()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(first.pid, signal.SIGKILL)  # the server that the killed flow had started
    run = the_run(project)
    assert (run.tree / "models/pretrain/weights").read_text() == UNDISTURBED
    assert steps(run) == [1, 2, 3, 4]
    assert len(jobs_of(run)) == 1


def test_a_full_run_folder(slurm: Cluster, project: Path, reach: Start, cost: Cost) -> None:
    recovery = cost("a full run folder", "the next step, from the same command on")
    process = reach()
    run = the_run(project)
    kept = run.path / "metrics.jsonl"
    kept.rename(run.path / "before")
    kept.symlink_to("/dev/full")  # every write there fails as on a full disk
    (project / "wait-pretrain-2").unlink()
    text = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode != 0
    assert "No space left on device" in text
    assert "Traceback" not in text
    kept.unlink()
    recovery.struck()
    finish(program("tasks.pretrain"))
    recovery.next_step(run)
    assert (project / "models/pretrain/weights").read_text() == UNDISTURBED
    assert len(set(jobs_of(run))) == 2


def test_doctor_asks_two_nodes(slurm: Cluster, project: Path) -> None:
    from tasks.launch.doctor import findings

    found = list(findings(Project.at(project)))
    slow = ("writes ", "all-reduce between ")  # how fast is the machine's affair
    assert all(finding.fine or finding.what.startswith(slow) for finding in found), found
    words = " ".join(finding.what for finding in found)
    assert "all-reduce between n1 and n2" in words or "all-reduce between n2 and n1" in words
    assert "n1: 0 GPUs, reaches" in words


def test_a_job_whose_id_was_never_stored_is_adopted(slurm: Cluster, project: Path, reach: Start, cost: Cost) -> None:
    recovery = cost("kill -9 before the job's id was stored", "the same command follows the job again")
    first = reach()
    os.killpg(first.pid, signal.SIGKILL)
    (the_run(project).path / "job.json").unlink()
    recovery.struck()
    second = program("tasks.pretrain")
    says(second, "following")
    recovery.over()
    (project / "wait-pretrain-2").unlink()
    finish(second)
    undisturbed(project)


def test_the_controller_dies_and_comes_back(slurm: Cluster, project: Path, reach: Start, cost: Cost) -> None:
    recovery = cost("kill -9 of slurmctld", "the job's end is known, from its return on")
    process = reach()
    slurm.kill_controller()
    says(process, "asking again")
    (project / "wait-pretrain-2").unlink()
    wait_for("the work to be done", lambda: the_run(project).succeeded)  # the job needs no controller
    recovery.struck()
    slurm.start_controller()
    finish(process)
    recovery.over()
    undisturbed(project)


def test_submission_waits_for_a_controller(slurm: Cluster, project: Path, cost: Cost) -> None:
    recovery = cost("no slurmctld at submission", "the first step, from its return on")
    slurm.kill_controller()
    process = program("tasks.pretrain")
    says(process, "again")
    recovery.struck()
    slurm.start_controller()
    finish(process)
    recovery.next_step(the_run(project))
    undisturbed(project)


def test_a_node_dies_and_the_job_goes_on(slurm: Cluster, project: Path, reach: Start, cost: Cost) -> None:
    recovery = cost("kill -9 of a node", f"the next step (Slurm looks for dead nodes every {SILENCE} s here)")
    process = reach()
    node = slurm.ask("squeue", "-h", "-o", "%N").strip()
    slurm.notices_dead_nodes_after(SILENCE)
    try:
        slurm.kill_node(int(node[1:]))
        recovery.struck()
        (project / "wait-pretrain-2").unlink()
        finish(process)
    finally:
        slurm.notices_dead_nodes_after(300)
    recovery.next_step(the_run(project))
    assert (project / "models/pretrain/weights").read_text() == UNDISTURBED
    assert steps(the_run(project)) == [1, 2, 3, 4]


def test_a_killed_rank_restarts_in_the_same_job(slurm: Cluster, project: Path, cost: Cost) -> None:
    recovery = cost("kill -9 of the only rank", "the next step, in the same job")
    (project / "die-pretrain-2").touch()
    assert "restart 1 of 1" in finish(program("tasks.pretrain"))
    undisturbed(project)
    run = the_run(project)
    recovery.struck(float((run.path / "steps.txt").read_text().splitlines()[1].split()[2]))
    recovery.next_step(run)


def test_a_requeued_job_goes_on(slurm: Cluster, project: Path, reach: Start, cost: Cost) -> None:
    recovery = cost("scontrol requeue", "the next step (a requeued job waits 20 s here)")
    process = reach()
    source = project / "tasks/pretrain.py"
    source.write_text(source.read_text().replace('"first"', '"second"'))  # the job runs what was submitted
    recovery.struck()
    slurm.ask("scontrol", "requeue", the_run(project).job["id"])
    wait_for("the job to wait", lambda: slurm.ask("squeue", "-h", "-o", "%t").strip() == "PD")
    (project / "wait-pretrain-2").unlink()
    finish(process)
    recovery.next_step(the_run(project))
    undisturbed(project, starts=2)


def test_a_preempted_job_goes_on(slurm: Cluster, project: Path, reach: Start, cost: Cost) -> None:
    recovery = cost("preemption by a job of 3 s", "the next step (a requeued job waits 20 s here)")
    process = reach()
    urgent = ["sbatch", "--parsable", "-p", "urgent", "-N2", "--exclusive", "--wrap", "sleep 3", "-o", "/dev/null"]
    recovery.struck()
    slurm.ask(*urgent)
    run = the_run(project)
    wait_for("preemption", lambda: slurm.ask("squeue", "-h", "-n", job_name(run), "-o", "%t").strip() == "PD")
    (project / "wait-pretrain-2").unlink()
    finish(process)
    recovery.next_step(run)
    undisturbed(project, starts=2)


def test_a_time_limit_is_normal(slurm: Cluster, project: Path, reach: Start, cost: Cost) -> None:
    recovery = cost("a time limit that is near", "the next step (a requeued job waits 20 s here)")
    process = reach(2, "launch.slurm.time='0:02:00'", "launch.slurm.signal_seconds=60")
    run = the_run(project)
    wait_for("the wish to save", (run.path / "STOP").exists)
    recovery.struck()
    wait_for("a second start", lambda: len(jobs_of(run)) == 2)
    (project / "wait-pretrain-2").unlink()
    assert "starting again from the last checkpoint" in finish(process)
    recovery.next_step(run)
    undisturbed(project, starts=2)


def test_cancelling_ends_the_job_and_the_next_goes_on(slurm: Cluster, project: Path, reach: Start, cost: Cost) -> None:
    recovery = cost("a cancelled stage (SIGTERM)", "the next step, from the same command on")
    process = reach()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=PATIENCE)
    run = the_run(project)
    wait_for("the job to end", lambda: not slurm.ask("squeue", "-h", "-n", job_name(run)).strip())
    (project / "wait-pretrain-2").unlink()
    recovery.struck()
    finish(program("tasks.pretrain"))
    recovery.next_step(run)
    undisturbed(project, starts=2, jobs=2)


def test_a_cancelled_flow_run_cancels_its_job(
    slurm: Cluster, project: Path, cost: Cost, monkeypatch: pytest.MonkeyPatch
) -> None:
    recovery = cost("a cancelled flow run (prefect flow-run cancel)", "its job has saved itself and ended")
    shutil.copytree(REPOSITORY / "flows", project / "flows")
    shutil.copy(REPOSITORY / "prefect.yaml", project)
    port = str(free_port())
    api = f"http://127.0.0.1:{port}/api"
    monkeypatch.setenv("PREFECT_HOME", str(project.parent / "prefect"))
    monkeypatch.setenv("PREFECT_API_URL", api)
    (project / "wait-pretrain-2").touch()
    with contextlib.ExitStack() as running:
        running.callback(end, background("prefect", "server", "start", "--port", port))
        wait_for("Prefect's server", lambda: "<html" in page(port))
        for words in ("work-pool create lladaflow --type process", "--no-prompt deploy --name pipeline"):
            finish(program("prefect", *words.split()))
        running.callback(end, background("prefect", "worker", "start", "--pool", "lladaflow"))
        finish(
            program("prefect", *["deployment", "run", "pipeline/pipeline", "-p", "upto=pretrain", "-p", "own=false"])
        )
        at_step(project, 2)
        [flow_run] = [run for run in asked(f"{api}/flow_runs/filter") if run["deployment_id"]]
        recovery.struck()
        finish(program("prefect", "flow-run", "cancel", flow_run["id"]))
        wait_for("the job to end", lambda: not slurm.ask("squeue", "-h").strip())
        recovery.over()
        wait_for("the state", lambda: asked(f"{api}/flow_runs/filter")[0]["state_type"] == "CANCELLED")
    assert steps(the_run(project)) == [1, 2]
    (project / "wait-pretrain-2").unlink()
    finish(program("tasks.pretrain"))
    undisturbed(project, starts=2, jobs=2)


def background(*arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", *arguments]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def end(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    process.wait(timeout=PATIENCE)


def asked(url: str) -> list[dict]:
    """What Prefect's server answers to an empty filter."""
    request = urllib.request.Request(url, data=b"{}", headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def test_a_folder_whose_name_slurm_would_take_apart(
    slurm: Cluster, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = project.rename(project.with_name("run #2 %j %%: 'ü'"))
    monkeypatch.chdir(odd)
    finish(program("tasks.pretrain"))
    undisturbed(odd)
    assert "first step 4" in the_run(odd).log.read_text()
    assert os.listdir(odd.parent) == [odd.name]


def test_a_waiting_job_runs_what_was_submitted(slurm: Cluster, project: Path) -> None:
    sleeper = ["-N2", "--exclusive", "--wrap", "sleep infinity", "-o", "/dev/null"]
    blocker = slurm.ask("sbatch", "--parsable", *sleeper).strip()
    process = program("tasks.pretrain")
    says(process, "PENDING")
    source = project / "tasks/pretrain.py"
    source.write_text(source.read_text().replace('"first"', '"second"'))
    slurm.ask("scancel", blocker)
    finish(process)
    undisturbed(project)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("launch.slurm.partition=nosuch", "invalid partition specified: nosuch; `sinfo -s` lists the partitions"),
        ("launch.slurm.nodes=3", "Slurm can never start this job (PartitionNodeLimit)"),
        ("launch.slurm.gpus_per_node=7", "no node has what launch.slurm asks for"),
        ("launch.slurm.time=soon", "launch.slurm.time"),
    ],
)
def test_requests_that_cannot_be(slurm: Cluster, project: Path, override: str, line: str) -> None:
    process = program("tasks.pretrain", override)
    text = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 2
    assert line in text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ("Invalid account or account/partition combination specified", "`sacctmgr show assoc user=$USER` lists your"),
        ("User's group not permitted to use this partition", "`sinfo -s` lists the partitions; ask for the right"),
    ],
)
def test_an_account_without_rights(said: str, line: str) -> None:
    assert line in (refused(f"sbatch: error: Batch job submission failed: {said}") or "")


def test_without_sbatch(slurm: Cluster, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    process = program("tasks.pretrain")
    text = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 2
    assert "squeue is not on the PATH of this machine; run this on the cluster's login node" in text
