"""Jobs on this machine: a process session of their own, which outlives the program that started it.

A process is known by its id and its start time in /proc, so that a re-used id is never taken for the job. Knows nothing
of stages; the run folder holds all state.
"""

import contextlib
import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Literal

from llada_core.config.launch import LaunchParams
from llada_core.settings import ConfigError
from tasks.launch_script import write_job
from tasks.record.runs import RunFolder

State = Literal["alive", "gone", "unknown"]


class LocalLauncher:
    """Starts, looks after and ends jobs on this machine."""

    poll_seconds = 0.3

    def submit(self, run: RunFolder, launch: LaunchParams) -> None:
        """Start a job and note who it is."""
        script = write_job(run, launch, slurm=False)
        with run.log.open("ab") as log:
            log_start = run.log_size
            process = subprocess.Popen(
                ["bash", str(script)], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        started = {"pid": process.pid, "start": start_time(process.pid), "boot": boot()}
        run.note_job({"launcher": "local", "log_start": log_start} | started)

    def state(self, run: RunFolder) -> State:
        """Whether the job of `run` is still there; raises `ConfigError` for a job of another machine."""
        job = run.job
        if job is None:
            return "gone"
        if job["host"] != socket.gethostname():
            raise ConfigError(f"{run.key} was started on {job['host']}; go on there, or remove {run.path / 'job.json'}")
        if job.get("boot", boot()) != boot():
            return "gone"
        return "alive" if job["start"] is not None and start_time(job["pid"]) == job["start"] else "gone"

    def cancel(self, run: RunFolder, grace: float) -> None:
        """End the job: it may save itself for `grace` seconds, then its whole session is killed."""
        job = run.job
        if job is None or self.state(run) != "alive":
            return
        (run.path / "CANCELLED").touch()
        (run.path / "STOP").touch()
        for wait, number in ((grace, signal.SIGTERM), (5.0, signal.SIGKILL)):
            if self._ends_within(run, wait):
                return
            try:
                os.killpg(job["pid"], number)
            except ProcessLookupError:
                return
        self._ends_within(run, 5.0)

    def _ends_within(self, run: RunFolder, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while self.state(run) == "alive":
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.05)
        return True


def boot() -> str:
    """Which start of this machine this is."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None if it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])
