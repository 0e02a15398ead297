"""Jobs as processes of this machine."""

import contextlib
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

from llada_core.settings import DEVICE_SETTING, ConfigError
from tasks.launch.launcher import Launcher, State
from tasks.project import LaunchParams, visible_gpus
from tasks.record.runs import RunFolder
from tasks.stages import program_of

# What a job sees of the submitter's environment, beside what the cluster gives it.
PASSED_ON = (
    "PATH", "VIRTUAL_ENV", "LLADAFLOW_DATA_ROOT", "HF_HOME", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", DEVICE_SETTING,
)  # fmt: skip


class LocalLauncher(Launcher):
    """Starts, looks after and ends jobs on this machine."""

    kind, here = "local", True
    attempt = "$$ 0"
    interrupted = '  [[ -e $run/TERMINATED ]] && { echo 143 >"$run/exit"; exit 143; }'
    poll_seconds, nodes = 0.3, 1

    def __init__(self, launch: LaunchParams) -> None:
        super().__init__(launch)
        self.gpus = visible_gpus()
        self.has_gpu = self.gpus > 0

    def submit(self, run: RunFolder) -> None:
        script = self.write_script(run)
        with run.log.open("ab") as log:
            log_start = run.log_size
            process = subprocess.Popen(
                ["bash", str(script)], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        started = {"pid": process.pid, "start": start_time(process.pid), "boot": boot()}
        run.note_job({"launcher": self.kind, "log_start": log_start} | started)

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

    def passed_on(self) -> dict[str, str]:
        return {name: os.environ[name] for name in PASSED_ON if name in os.environ}

    def alone(self, program: str) -> str:
        return program

    def ranks(self, accelerate: str, program: str) -> str:
        return f"{accelerate} --main_process_port 0 {program}"

    def planned(self, script: str, run: RunFolder) -> str:
        """The command line, to be copied and run in the project's folder."""
        lines = script.replace(f"{run.tree}/tasks", "tasks").splitlines()
        return next(line.strip().removesuffix(" &") for line in lines if f"-m {program_of(run.stage)}" in line)


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
