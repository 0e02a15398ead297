"""Jobs of a Slurm cluster."""

import re
import shlex
import subprocess
import time
from pathlib import Path

from llada_core.settings import ConfigError
from tasks.folders import hash_of
from tasks.launch.launcher import Launcher, NoAnswerError, State
from tasks.project import LaunchParams
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


INTERRUPTED = """\
  # Preempted or ended from outside: Slurm decides whether this job starts again.
  [[ -e $run/TERMINATED ]] && { sleep 600 & wait $!; exit 143; }
  if [[ $requeue ]]; then
    echo "time limit near, saved; starting again from the last checkpoint"
    timeout 60 scontrol requeue "$SLURM_JOB_ID" && { sleep 600 & wait $!; }
    requeue=
  elif [[ ! -e $run/STOP ]] && ((code == 143 || code == 75)); then
    # SIGTERM to the step alone, as before a preemption. If Slurm does not take this job after all, it goes on.
    sleep 120 & wait $!
  fi"""


class SlurmLauncher(Launcher):
    """Submits, looks after and ends jobs of a cluster."""

    kind, here = "slurm", False
    attempt = "$SLURM_JOB_ID ${SLURM_RESTART_COUNT:-0}"
    interrupted = INTERRUPTED

    def __init__(self, launch: LaunchParams) -> None:
        super().__init__(launch)
        self.poll_seconds, self.nodes, self.gpus = launch.poll_seconds, launch.slurm.nodes, launch.slurm.gpus_per_node
        otherwise = launch.gpu is not None or any("gpu" in option for option in launch.slurm.extra)
        self.has_gpu = self.gpus > 0 or otherwise
        self._said = ""

    def submit(self, run: RunFolder) -> None:
        """Submit a job and note its id; waits while the controller does not answer, and never submits twice."""
        script = self.write_script(run)
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
            number = job["id"] if job and job["launcher"] == self.kind else self._adopt(run)
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
        run.note_job({"launcher": self.kind, "id": number, "log_start": log_start})

    def _say(self, text: str) -> None:
        if text != self._said:
            self._said = text
            print(text, flush=True)

    def options(self, run: RunFolder) -> list[str]:
        """The `#SBATCH` lines. One name and `singleton`: two jobs of one run never run at once."""
        slurm = self.launch.slurm
        values = {
            "job-name": job_name(run),
            "dependency": "singleton",
            "output": _as_option(run.log),
            "open-mode": "append",
            "nodes": slurm.nodes,
            "ntasks-per-node": 1,
            "cpus-per-task": slurm.cpus_per_task,
            "gpus-per-node": slurm.gpus_per_node or None,
            "mem": slurm.memory,
            **self.place(),
            "time": slurm.time,
            "constraint": slurm.constraint,
            "signal": f"B:USR1@{slurm.signal_seconds}" if slurm.time else None,
        }
        return ["--requeue", *(f"--{key}={value}" for key, value in values.items() if value is not None), *slurm.extra]

    def place(self) -> dict[str, str | None]:
        """Where on the cluster jobs run, and on whose account."""
        slurm = self.launch.slurm
        return {"partition": slurm.partition, "account": slurm.account, "qos": slurm.qos}

    def try_submission(self) -> str:
        """Have sbatch look at a job without submitting it; returns what was asked for.

        Raises `ConfigError` with a remedy when it is refused, `NoAnswerError` when nobody answers.
        """
        options = [f"--{key}={value}" for key, value in self.place().items() if value]
        ask("sbatch", "--test-only", *options, "--wrap", "true")
        return " ".join(options)

    def setup(self) -> list[str]:
        return [*(f"module load {name}" for name in self.launch.slurm.modules), *self.launch.slurm.setup]

    def rendezvous(self) -> list[str]:
        return [
            'nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")',
            r"""address=$(scontrol show node -o "${nodes%%$'\n'*}" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')""",
            "port=$((20000 + SLURM_JOB_ID % 20000))",
        ]

    def alone(self, program: str) -> str:
        return f"srun --kill-on-bad-exit=1 {self._srun_options()}{program}"

    def ranks(self, accelerate: str, program: str) -> str:
        place = '--machine_rank "$SLURM_NODEID" --main_process_ip "$0" --main_process_port "$1"'
        per_node = shlex.quote(f"exec {accelerate} {place} {program}")
        return f'srun --kill-on-bad-exit=1 {self._srun_options()}bash -c {per_node} "$address" "$port"'

    def _srun_options(self) -> str:
        return "".join(f"{shlex.quote(option)} " for option in self.launch.slurm.srun_options)


def job_name(run: RunFolder) -> str:
    """The name that finds a run's job again: its key, and which folder of that name it is."""
    return f"{run.key}-{hash_of(str(run.path))[:6]}"


def _as_option(path: Path) -> str:
    """A path for `#SBATCH`: Slurm fills in what follows a `%`, and a space or `#` outside of quotes ends an option."""
    text = str(path).replace("%", "%%")
    plain = re.fullmatch(r"[\w/.@+,=:~%-]+", text)
    return text if plain else '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'


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
