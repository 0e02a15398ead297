"""A launcher: how the jobs of one kind of machine are started, asked about and ended; and the script of a job."""

import os
import shlex
import sys
from abc import ABC, abstractmethod
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Literal

import jinja2

from llada_core.settings import ConfigError
from llada_core.training.params import GRPOParams, TrainingParams
from tasks.folders import write_text
from tasks.project import LAUNCHERS, LaunchParams, Params
from tasks.record.runs import RunFolder
from tasks.stages import TRAINING_STAGES, program_of

TEMPLATE = Path(__file__).with_name("job.sh.jinja")
OWN_ACCELERATE = "accelerate.yaml"  # launch.accelerate_config, as it was when the job was submitted


State = Literal["alive", "gone", "unknown"]


class NoAnswerError(OSError):
    """Whoever starts the jobs did not answer; nothing is known."""


class Launcher(ABC):
    """One way to start jobs, as `launch` says; each verb (submit, state, cancel) acts on the job that a run names."""

    kind: ClassVar[str]  # as launch.kind and job.json have it
    here: ClassVar[bool]  # whether its jobs run on this machine
    attempt: ClassVar[str]  # for the shell: what tells one start of a job from another, two words
    interrupted: ClassVar[str]  # shell lines: what a job does whose program was told to end
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

    def rendezvous(self) -> list[str]:
        """Shell lines that find `$address` and `$port`, where ranks of several nodes meet."""
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
            attempt=self.attempt,
            options=self.options(run),
            setup=self.setup(),
            rendezvous=self.rendezvous(),
            interrupted=self.interrupted,
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


def launcher_for(launch: LaunchParams, kind: str = "") -> Launcher:
    """The launcher of a kind, else of `launch.kind`; what runs inline has no job, and looks as a local one would."""
    module, name = LAUNCHERS.get(kind or launch.kind, LAUNCHERS["local"]).split(":")
    made: Launcher = getattr(import_module(module), name)(launch)
    return made


def launcher_of(run: RunFolder, launch: LaunchParams) -> Launcher:
    """The launcher of the job that `run` already has, else the one asked for."""
    job = run.job
    return launcher_for(launch, job["launcher"] if job else "")


def machine_settings(params: Params, stage: str, launch: LaunchParams) -> dict[str, Any]:
    """What a training stage's settings are where its job will run, whatever the machine that submits it has."""
    if stage not in TRAINING_STAGES:
        return {}
    return {"precision": params.settled(stage, gpu=launcher_for(launch).has_gpu).precision}
