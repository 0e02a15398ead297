"""Launchers, one class a kind, and the script of their jobs: everything else asks the object."""

import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Literal

import jinja2

from llada_core.settings import DEVICE_SETTING, ConfigError
from llada_core.training.params import GRPOParams, TrainingParams
from tasks.folders import hash_of, write_text
from tasks.project import LaunchParams, Params, visible_gpus
from tasks.record.runs import RunFolder
from tasks.stages import TRAINING_STAGES, program_of

TEMPLATE = Path(__file__).with_name("job.sh.jinja")
OWN_ACCELERATE = "accelerate.yaml"  # launch.accelerate_config, as it was when the job was submitted
# What a job sees of the submitter's environment, beside what the cluster gives it.
PASSED_ON = (
    "PATH", "VIRTUAL_ENV", "LLADAFLOW_DATA_ROOT", "HF_HOME", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", DEVICE_SETTING,
)  # fmt: skip


State = Literal["alive", "gone", "unknown"]


class Launcher(ABC):
    """One way to start jobs, as `launch` says; each verb (submit, state, cancel) acts on the job that a run names."""

    kind: ClassVar[str]  # as launch.kind and job.json have it
    here: ClassVar[bool]  # whether its jobs run on this machine
    poll_seconds: float  # between two questions about a job
    nodes: int
    gpus: int  # of each node that a job will see, as far as their number is known
    has_gpu: bool  # whether a job will see one, of whatever number

    def __init__(self, launch: LaunchParams) -> None:
        self.launch = launch

    @abstractmethod
    def submit(self, run: RunFolder) -> None:
        """Start a job and note who it is."""

    @abstractmethod
    def state(self, run: RunFolder) -> State:
        """Whether the job of `run` is still to run or running; `unknown` while nobody can tell."""

    @abstractmethod
    def cancel(self, run: RunFolder, grace: float) -> None:
        """End the job; it may save itself for `grace` seconds first."""

    def options(self, run: RunFolder) -> list[str]:
        """What a job asks of its scheduler."""
        return []

    def setup(self) -> list[str]:
        """Shell lines before the program."""
        return []

    def passed_on(self) -> dict[str, str]:
        """What a job sees of this process's environment, beside what the machine gives it."""
        return {}

    @abstractmethod
    def alone(self, program: str) -> str:
        """The command line of one process."""

    @abstractmethod
    def ranks(self, accelerate: str, program: str) -> str:
        """The command line of several processes that accelerate starts."""

    def planned(self, script: str, run: RunFolder) -> str:
        """What of the script a person is shown who plans a job."""
        return script

    def script(self, run: RunFolder) -> str:
        """The whole script of one job."""
        environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
        environment.filters["quote"] = lambda value: shlex.quote(str(value))
        return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
            run=run.path,
            kind=self.kind,
            options=self.options(run),
            setup=self.setup(),
            env=self._environment(run),
            command=self._command(run),
            restarts=self.launch.restarts,
        )

    def write_script(self, run: RunFolder) -> Path:
        """Put the script, and a person's own accelerate file, into the run folder: later edits reach no waiting job."""
        if self.launch.accelerate_config:
            own = run.root / Path(self.launch.accelerate_config).expanduser()
            if not own.is_file():
                raise ConfigError(
                    f"launch.accelerate_config: there is no {own}; give a path from the project's folder, or a whole one"
                )
            write_text(run.path / OWN_ACCELERATE, own.read_text(encoding="utf-8"))
        write_text(run.path / "job.sh", self.script(run))
        return run.path / "job.sh"

    def ranks_per_node(self, training: TrainingParams | None) -> int:
        """`launch.processes`, or for a training stage as many of the visible GPUs as its rows of a step divide over.

        Without a GPU `launch.cpu_processes` stands in for their number.
        """
        if self.launch.processes is not None or training is None:
            return self.launch.processes or 1
        most = self.gpus or self.launch.cpu_processes
        rows = training.prompts if isinstance(training, GRPOParams) else training.batch_size
        return max((n for n in range(1, most + 1) if rows % (n * self.nodes) == 0), default=1)

    def _environment(self, run: RunFolder) -> dict[str, str]:
        places = [str(run.tree), str(run.root)]
        if any(":" in place for place in places):  # which ends an entry; the script starts in the first of them
            places = [os.path.relpath(place, run.tree) for place in places]
        own = {"LLADAFLOW_RUN": str(run.path), "PYTHONUNBUFFERED": "1", "PYTHONPATH": ":".join(places)}
        # Several processes of one thread each are faster than one of several threads: a small model's products are small.
        single = {"OMP_NUM_THREADS": "1"} if self.launch.cpu_processes > 1 and not self.gpus else {}
        threads = {"OMP_NUM_THREADS": str(self.launch.threads)} if self.launch.threads else {}
        return single | self.passed_on() | own | threads | self.launch.env

    def _command(self, run: RunFolder) -> str:
        kind, _, item = run.stage.partition("@")
        program = f"-m {program_of(kind)}" + (f" {shlex.quote(item)}" if item else "")
        python = shlex.quote(sys.executable)
        training = Params.parse(run.request["all_params"], run.key).training(kind) if kind in TRAINING_STAGES else None
        count = self.ranks_per_node(training)
        if kind == "evaluate" and self.nodes > 1 and self.launch.processes is None:
            count = max(1, self.gpus)  # on one node evaluate starts one process a GPU itself
        processes = self.nodes * count
        config = _accelerate_config(run, self.launch, training)
        if processes == 1 and config is None:  # a kind that was asked for by name gets its process group even alone
            return self.alone(f"{python} {program}")
        kinds = f"--config_file {shlex.quote(str(config))}" if config else "--multi_gpu"
        ranks = f"{kinds} --num_processes {processes} --num_machines {self.nodes}"
        accelerate = f"{python} -m accelerate.commands.launch {ranks} --mixed_precision no --dynamo_backend no"
        return self.ranks(accelerate, program)


def _accelerate_config(run: RunFolder, launch: LaunchParams, training: TrainingParams | None) -> Path | None:
    """A file of the run folder: the snapshot's for the kind of distribution, or the copy of a person's own."""
    if launch.accelerate_config:
        return run.path / OWN_ACCELERATE
    kind = training.distribution.kind if training is not None else "auto"
    return None if kind in ("auto", "none") else run.tree / "tasks" / "accelerate" / f"{kind}.yaml"


class LocalLauncher(Launcher):
    """Starts, looks after and ends jobs on this machine."""

    kind, here = "local", True
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


class SlurmLauncher(Launcher):
    """Submits, looks after and ends jobs of a cluster."""

    kind, here = "slurm", False

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

    def alone(self, program: str) -> str:
        return f"srun --kill-on-bad-exit=1 {self._srun_options()}{program}"

    def ranks(self, accelerate: str, program: str) -> str:
        place = '--machine_rank "$SLURM_NODEID" --main_process_ip "$0" --main_process_port "$1"'
        per_node = shlex.quote(f"exec {accelerate} {place} {program}")
        return f'srun --kill-on-bad-exit=1 {self._srun_options()}bash -c {per_node} "$address" "$port"'

    def _srun_options(self) -> str:
        return "".join(f"{shlex.quote(option)} " for option in self.launch.slurm.srun_options)


LAUNCHERS: dict[str, type[Launcher]] = {launcher.kind: launcher for launcher in (LocalLauncher, SlurmLauncher)}


def launcher_for(launch: LaunchParams, kind: str = "") -> Launcher:
    """The launcher of a kind, else of `launch.kind`; what runs inline has no job, and looks as a local one would."""
    return LAUNCHERS.get(kind or launch.kind, LocalLauncher)(launch)


def launcher_of(run: RunFolder, launch: LaunchParams) -> Launcher:
    """The launcher of the job that `run` already has, else the one asked for."""
    job = run.job
    return launcher_for(launch, job["launcher"] if job else "")


def machine_settings(params: Params, stage: str, launch: LaunchParams) -> dict[str, Any]:
    """What a training stage's settings are where its job will run, whatever the machine that submits it has."""
    if stage not in TRAINING_STAGES:
        return {}
    return {"precision": params.settled(stage, gpu=launcher_for(launch).has_gpu).precision}


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
