"""Every stage of the pipeline killed or interrupted once: the same command goes on and ends as if nothing had been."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.test_pipeline import ROOT, clone, llada
from tests.waiting import PATIENCE, wait_for

pytestmark = pytest.mark.faults
STAGES = ("prepare", "pretrain", "sft", "grpo", "sft_control", "evaluate", "report", "register")

TRAINING = STAGES[1:5]


def made(folder: Path) -> Path:
    """A checkout whose default run is `smoke`."""
    home = clone(folder)
    shutil.copy2(ROOT / "profiles" / "smoke.yaml", home / "params.yaml")
    return home


def outputs(home: Path) -> dict[str, str]:
    """What DVC noted of every output: its hash."""
    stages = yaml.safe_load((home / "dvc.lock").read_text())["stages"]
    return {out["path"]: out["md5"] for stage in stages.values() for out in stage["outs"]}


def hit(home: Path, stage: str, number: signal.Signals) -> None:
    """Start the pipeline, and signal it and the stage's job as soon as that is at work."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("LLADAFLOW", "MLFLOW_TRACKING"))}
    process = subprocess.Popen(
        [sys.executable, "-m", "cli.main", "run"],
        cwd=home,
        env=environment | {"PATH": f"{Path(sys.executable).parent}:{environment['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if line.startswith(f"Running stage '{stage}"):
            break
    else:
        raise AssertionError(f"{stage} was not run: {seen}")
    jobs: list[Path] = []
    while process.poll() is None and stage not in ("report", "register") and not jobs:
        begun = "metrics.jsonl" if stage in TRAINING else "job.json"
        jobs = [path.parent / "job.json" for path in home.glob(f"runs/{stage}-*/{begun}")]
        time.sleep(0.01)
    os.killpg(process.pid, number)
    if number is signal.SIGKILL and jobs:  # a job has a session of its own and outlives those who follow it
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.killpg(json.loads(jobs[-1].read_text())["pid"], number)
    text = process.stdout.read()
    assert process.wait(timeout=PATIENCE) != 0, text
    # DVC takes a zombie that nobody has reaped yet for a process at work.
    wait_for("all of it to be gone", lambda: not _alive(process.pid))


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The outputs of an undisturbed run."""
    home = made(tmp_path_factory.mktemp("calm"))
    assert llada(home, "run").returncode == 0
    return outputs(home)


@pytest.mark.parametrize("signals", [(signal.SIGKILL, signal.SIGINT), (signal.SIGINT, signal.SIGKILL)])
def test_every_stage_may_die(tmp_path: Path, calm: dict[str, str], signals: tuple[signal.Signals, ...]) -> None:
    home = made(tmp_path)
    for count, stage in enumerate(STAGES):
        hit(home, stage, signals[count % 2])
    done = llada(home, "run")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert outputs(home) == calm
