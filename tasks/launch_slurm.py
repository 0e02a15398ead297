"""Jobs on a Slurm cluster through sbatch, squeue, scontrol and scancel; no accounting is needed.

Only a controller that answers can say that a job is gone: every other error means "ask again", or an outage would look
like the end of a job and cause a second one. A job whose id was never stored is found again by its name.
"""

import re
import subprocess
import time

from llada_core.config.launch import LaunchParams
from llada_core.settings import ConfigError
from tasks.launch_local import State
from tasks.launch_script import job_name, write_job
from tasks.record.runs import RunFolder

TIMEOUT = 30  # seconds that a Slurm command may take
ENDED = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED"),
    *("NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT", "REVOKED"),
}
# Reasons for which a job would wait for ever.
IMPOSSIBLE = {
    *("PartitionNodeLimit", "PartitionTimeLimit", "BadConstraints", "AccountNotAllowed"),
    *("InvalidAccount", "InvalidQOS", "QOSNotAllowed"),
}
REMEDIES = {
    "invalid partition": "`sinfo -s` lists the partitions; set launch.slurm.partition",
    "invalid account": "`sacctmgr show assoc user=$USER` lists your accounts; set launch.slurm.account",
    "invalid qos": "`sacctmgr show qos` lists them; set launch.slurm.qos",
    "node configuration is not available": "no node has what launch.slurm asks for; see `sinfo -N -o '%N %c %m %G'`",
    "not permitted to use this partition": "`sinfo -s` lists the partitions; ask for the right, or set another one",
    "time limit": "see `sinfo -o '%P %l'`; set launch.slurm.time",
}


class NoAnswerError(OSError):
    """The Slurm controller did not answer; nothing is known."""


class SlurmLauncher:
    """Submits, looks after and ends jobs of a cluster."""

    def __init__(self, poll_seconds: float) -> None:
        self.poll_seconds = poll_seconds
        self._said = ""

    def submit(self, run: RunFolder, launch: LaunchParams) -> None:
        """Submit a job and note its id; waits while the controller does not answer, and never submits twice."""
        script = write_job(run, launch, slurm=True)
        while self._adopt(run) is None:
            try:
                log_start = run.log_size
                number = ask("sbatch", "--parsable", str(script)).partition(";")[0].strip()
                self._note(run, number, log_start)
                return
            except NoAnswerError as error:
                self._say(f"{error}; trying again")
                time.sleep(self.poll_seconds)

    def state(self, run: RunFolder) -> State:
        """Whether the job of `run` is still to run or running; `unknown` while the controller does not answer."""
        try:
            job = run.job
            number = job["id"] if job and job["launcher"] == "slurm" else self._adopt(run)
            if number is None:
                return "gone"
            word, reason = _state_of(number)
        except NoAnswerError as error:
            self._say(f"{error}; asking again")
            return "unknown"
        if word == "PENDING" and reason in IMPOSSIBLE:
            ask("scancel", str(number), unknown="")
            raise ConfigError(
                f"Slurm can never start this job ({reason}), it was taken back; see launch.slurm and `sinfo`"
            )
        self._say(f"Slurm job {number}: {word}" + (f" ({reason})" if reason not in ("", "None") else ""))
        if word == "COMPLETING":  # its end is known once it has left: what it wrote may still arrive
            return "unknown"
        return "gone" if word in ENDED or word == "GONE" else "alive"

    def cancel(self, run: RunFolder, grace: float) -> None:
        """End the job: a running one may save itself for `grace` seconds first."""
        (run.path / "CANCELLED").touch()
        (run.path / "STOP").touch()
        if (number := (run.job or {}).get("id") or self._adopt(run)) is None:
            return
        deadline = time.monotonic() + grace
        while _state_of(number)[0] == "RUNNING" and time.monotonic() < deadline:
            time.sleep(min(1.0, self.poll_seconds))
        ask("scancel", str(number))

    def _adopt(self, run: RunFolder) -> str | None:
        """The id of a job of this run that Slurm knows, written down; None when there is none."""
        found = ask("squeue", "--me", "--noheader", f"--name={job_name(run)}", "--format=%A").split()
        if found:
            self._note(run, found[0])
        return found[0] if found else None

    def _note(self, run: RunFolder, number: str, log_start: int = 0) -> None:
        run.note_job({"launcher": "slurm", "id": number, "log_start": log_start})

    def _say(self, text: str) -> None:
        if text != self._said:
            self._said = text
            print(text, flush=True)


def _state_of(number: str) -> tuple[str, str]:
    """State and reason; `GONE` when a controller that answers no longer knows the job. Raises `NoAnswerError`."""
    answer = ask("squeue", "--noheader", f"--jobs={number}", "--format=%T %r", unknown="")
    if not answer.strip():
        text = ask("scontrol", "show", "job", "-o", number, unknown="")
        match = re.search(r"JobState=(\w+) Reason=(\S+)", text)
        return (match[1], match[2]) if match else ("GONE", "")
    word, _, reason = answer.strip().partition(" ")
    return word, reason


def ask(*command: str, unknown: str | None = None) -> str:
    """What a Slurm command prints; `unknown` for a job that an answering controller does not know."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except FileNotFoundError:
        remedy = "run this on the cluster's login node, or set launch.kind to local"
        raise ConfigError(f"{command[0]} is not on the PATH of this machine; {remedy}") from None
    except subprocess.TimeoutExpired:
        raise NoAnswerError(f"{command[0]} got no answer within {TIMEOUT} s") from None
    if done.returncode == 0:
        return done.stdout
    text = next((line.strip() for line in done.stderr.splitlines() if line.strip()), "")
    if unknown is not None and "invalid job id" in text.lower():
        return unknown
    if command[0] == "sbatch" and (refusal := refused(text)):
        raise ConfigError(refusal)
    raise NoAnswerError(f"{command[0]}: {text or f'exit status {done.returncode}'}")


def refused(text: str) -> str | None:
    """One line with a remedy when sbatch refused the job for good; None for an error that may pass."""
    passing = ("contact slurm controller", "socket timed out", "connection refused", "zero bytes", "try again")
    if any(word in text.lower() for word in passing):
        return None
    remedy = next(
        (remedy for word, remedy in REMEDIES.items() if word in text.lower()), "see `llada plan` for the script"
    )
    return f"{text.removeprefix('sbatch: error: ')}; {remedy}"
