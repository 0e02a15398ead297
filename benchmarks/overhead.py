"""What orchestration costs: `python -m benchmarks.overhead FOLDER` on a finished project (a copy; nothing is kept).

No-op `dvc repro`, no-op pipeline with a Prefect server up, a core's share for following a job, metrics into MLflow.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llada_core.config.launch import LaunchParams
from tasks import tracking
from tasks.folders import write_json
from tasks.launch import follow
from tasks.launch_local import LocalLauncher, start_time
from tasks.pipeline import environment
from tasks.runs import RunFolder

SECONDS = 30
WRITER = """
import json, sys, time
for step in range({seconds}):
    print("step", step, flush=True)
    line = {{"step": step, "time": time.time(), **{{f"m{{i}}": float(step) for i in range(10)}}}}
    open(sys.argv[1], "a").write(json.dumps(line) + chr(10))
    time.sleep(1)
open(sys.argv[2], "w").write(json.dumps({{"seconds": 1.0, "time": time.time()}}))
"""


def timed(command: list[str], folder: Path, **extra: str) -> float:
    """Wall seconds of a command that must succeed."""
    started = time.monotonic()
    done = subprocess.run(command, cwd=folder, env=environment() | extra, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "Running stage" not in done.stdout, "this project is not finished"
    return time.monotonic() - started


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
        follow(run, LocalLauncher(), LaunchParams())
        share = (time.process_time() - cpu) / (time.monotonic() - wall)
    job.wait()
    return share


def metrics_per_second(root: Path) -> float:
    """How fast 10,000 metrics of a run that is over reach MLflow's SQLite."""
    run = toy_run(root)
    tracking.send([run])
    lines = [{"step": s, "time": 1e9 + s, **{f"m{i}": float(s) for i in range(10)}} for s in range(1000)]
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    started = time.monotonic()
    assert tracking.send([run])
    return 10_000 / (time.monotonic() - started)


def main() -> None:
    """Print one line for each."""
    project = Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve()
    repro = [timed([sys.executable, "-m", "dvc", "repro"], project) for _ in range(5)]
    print(f"no-op dvc repro: {min(repro):.1f} s (of 5: {', '.join(f'{s:.1f}' for s in repro)}; asked: under 3)")
    with prefect_server() as api:
        flow = [timed([sys.executable, "-m", "flows.pipeline"], project, PREFECT_API_URL=api) for _ in range(5)]
    print(
        f"no-op pipeline with a server: {min(flow):.1f} s (of 5: {', '.join(f'{s:.1f}' for s in flow)}; asked: under 10)"
    )
    for measure, text in ((following, "following a job: {:.2%} of a core (asked: under 1 %)"),
                          (metrics_per_second, "10,000 metrics into MLflow: {:,.0f}/s (asked: 1,000)")):  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
            print(text.format(measure(Path(folder).resolve())), flush=True)


if __name__ == "__main__":
    main()
