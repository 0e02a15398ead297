"""What orchestration costs: `python -m benchmarks.overhead FOLDER` on a finished project (a copy; nothing is kept).

What of the run was spent before and between its jobs, no-op `dvc repro`, no-op pipeline with a Prefect server up, a
core's share for following a job and for asking Slurm, metrics into MLflow. Seconds of the clock, and of the processor
(those count on a machine that has other work).
"""

import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tasks.folders import read_json, write_json
from tasks.launch.jobs import follow
from tasks.launch.local import LocalLauncher, start_time
from tasks.launch.program import environment
from tasks.launch.slurm import SlurmLauncher
from tasks.project import LaunchParams, Project
from tasks.record import tracking
from tasks.record.runs import RunFolder, all_runs
from tests.slurm.cluster import Cluster, missing

SECONDS = 90  # the first sending compiles what the others use
WRITER = """
import json, sys, time
for step in range({seconds}):
    print("step", step, flush=True)
    line = {{"step": step, "time": time.time(), **{{f"m{{i}}": float(step) for i in range(10)}}}}
    open(sys.argv[1], "a").write(json.dumps(line) + chr(10))
    time.sleep(1)
open(sys.argv[2], "w").write(json.dumps({{"seconds": 1.0, "time": time.time()}}))
"""


def timed(command: list[str], folder: Path, **extra: str) -> tuple[float, float]:
    """Seconds of the clock and of the processor that a command takes, which must succeed."""
    started, before = time.monotonic(), cpu_seconds()
    done = subprocess.run(command, cwd=folder, env=environment() | extra, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "Running stage" not in done.stdout, "this project is not finished"
    return time.monotonic() - started, cpu_seconds() - before


@contextmanager
def prefect_server() -> Iterator[str]:
    """A server in a folder of its own; gives its API's address."""
    with socket.socket() as found, tempfile.TemporaryDirectory() as home:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
        found.close()
        os.environ["PREFECT_HOME"] = home
        command = [sys.executable, "-m", "prefect", "server", "start", "--port", str(port)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            while socket.socket().connect_ex(("127.0.0.1", port)):
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/api"
        finally:
            process.terminate()
            process.wait()


def toy_run(root: Path) -> RunFolder:
    """A run folder as a stage would have it, without a stage."""
    run = RunFolder(root / "runs" / "sft-0000")
    run.tree.mkdir(parents=True)
    request = {"stage": "sft", "root": str(root), "all_params": {"name": "toy", "stages": ["sft"]}, "source": "0"}
    write_json(run.path / "request.json", request | {"params": {}, "inputs": {}, "outs": []})
    return run


def following(root: Path) -> float:
    """Share of a core that following a job takes, with its metrics sent to MLflow; a job that writes once a second."""
    run = toy_run(root)
    tracking.send([run])  # MLflow is imported and its tables are made
    arguments = [sys.executable, "-c", WRITER.format(seconds=SECONDS), run.path / "metrics.jsonl", run.path / "SUCCESS"]
    with run.log.open("wb") as log:
        job = subprocess.Popen(arguments, stdout=log, start_new_session=True)
    note = {"launcher": "local", "pid": job.pid, "start": start_time(job.pid), "host": socket.gethostname()}
    write_json(run.path / "job.json", note)
    wall, cpu = time.monotonic(), time.process_time()
    with tracking.forwarding(run):
        follow(run, LocalLauncher(LaunchParams()), LaunchParams())
        share = (time.process_time() - cpu) / (time.monotonic() - wall)
    job.wait()
    return share


def between_jobs(project: Path) -> tuple[float, float]:
    """Seconds from the first job's start to the last one's success, and those of them in which no job was at work.

    From the run folders of a project whose stages were all made by one undisturbed run.
    """
    runs = [run for run in all_runs(Project.at(project)) if run.job and run.succeeded]
    runs = [run for run in runs if run.request["root"] == runs[0].request["root"]]
    jobs = sorted((run.job["time"], read_json(run.path / "SUCCESS")["time"]) for run in runs)
    busy_until, idle = jobs[0][0], 0.0
    for start, end in jobs:
        idle, busy_until = idle + max(0.0, start - busy_until), max(busy_until, end)
    return busy_until - jobs[0][0], idle


def asking_slurm(root: Path) -> float:
    """Share of a core that asking for a job's state takes at the usual interval; on a throw-away cluster."""
    cluster, asked = Cluster(root / "cluster"), 20
    root.chmod(0o755)  # munge wants its socket reachable
    cluster.folder.mkdir()
    try:
        cluster.start()
        os.environ["SLURM_CONF"] = str(cluster.conf)
        run = toy_run(root)
        job = cluster.ask("sbatch", "--parsable", "--hold", "--wrap", "true", "-o", "/dev/null").strip()
        write_json(run.path / "job.json", {"launcher": "slurm", "id": job})
        launcher, before = SlurmLauncher(LaunchParams(poll_seconds=1.0)), cpu_seconds()
        for _ in range(asked):
            assert launcher.state(run) == "alive"
        return (cpu_seconds() - before) / asked / LaunchParams().poll_seconds
    finally:
        cluster.stop()


def cpu_seconds() -> float:
    """Of this process and of the programs it has waited for."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def metrics_per_second(root: Path) -> float:
    """How fast 10,000 metrics of a run that is over reach MLflow's SQLite, by the processor's clock."""
    run = toy_run(root)
    tracking.send([run])
    lines = [{"step": s, "time": 1e9 + s, **{f"m{i}": float(s) for i in range(10)}} for s in range(1000)]
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    started = time.process_time()
    assert tracking.send([run])
    return 10_000 / (time.process_time() - started)


def fastest(times: list[tuple[float, float]]) -> str:
    """The fastest of several, and the others."""
    others = ", ".join(f"{wall:.1f}" for wall, _ in times)
    return f"{min(times)[0]:.1f} s, of the processor {min(cpu for _, cpu in times):.1f} s (of {len(times)}: {others}"


def main() -> None:
    """Print one line for each."""
    project = Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve()
    whole, idle = between_jobs(project)
    repro = [timed([sys.executable, "-m", "dvc", "repro"], project) for _ in range(5)]
    print(f"no-op dvc repro: {fastest(repro)}; asked: under 3)")
    start = min(repro)[0]
    share = (idle + start) / (whole + start)
    print(f"before and between jobs: {start:.1f} + {idle:.1f} of {whole:.1f} s, {share:.1%} (asked: under 5 %)")
    with prefect_server() as api:
        flow = [timed([sys.executable, "-m", "flows.pipeline"], project, PREFECT_API_URL=api) for _ in range(5)]
    print(f"no-op pipeline with a server: {fastest(flow)}; asked: under 10)")
    for measure, text in ((following, "following a job: {:.2%} of a core (asked: under 1 %)"),
                          (asking_slurm, "asking Slurm for a job: {:.2%} of a core"),
                          (metrics_per_second, "10,000 metrics into MLflow: {:,.0f}/s (asked: 1,000)")):  # fmt: skip
        if measure is asking_slurm and (reason := missing()):
            print(f"asking Slurm: {reason}")
            continue
        with tempfile.TemporaryDirectory() as folder:
            os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
            print(text.format(measure(Path(folder).resolve())), flush=True)


if __name__ == "__main__":
    main()
