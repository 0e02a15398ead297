"""How a stage is started: in this process, as a local job, or on a Slurm cluster.

Nothing here determines a result, so none of it enters a run's fingerprint. Does not know what a stage does.
"""

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from llada_core.settings import Block

TIME = r"^(\d+-\d{1,2}(:\d{2}){0,2}|\d+(:\d{2}){0,2})$"  # what sbatch --time takes


class SlurmParams(Block):
    """What is asked of sbatch; `extra` are further `#SBATCH` options, verbatim."""

    nodes: int = Field(default=1, ge=1)
    gpus_per_node: int = Field(default=0, ge=0)
    cpus_per_task: int | None = Field(default=None, ge=1)
    memory: str | None = Field(default=None, pattern=r"^\d+[KMGT]?$")
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str | None = Field(default=None, pattern=TIME)  # shorter than the run is normal: the job requeues itself
    constraint: str | None = None
    signal_seconds: int = Field(
        default=180, ge=60
    )  # saving starts this long before the limit (Slurm is late by up to 30)
    modules: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()  # shell lines before the program
    srun_options: tuple[str, ...] = ()  # the container line, among others
    extra: tuple[str, ...] = ()

    @field_validator("time", mode="before")
    @classmethod
    def _quoted(cls, value: Any) -> Any:
        if isinstance(value, int | float):
            raise ValueError("write the time in quotes, such as '12:00:00': YAML takes it for a number otherwise")
        return value

    @model_validator(mode="after")
    def _time_to_work(self) -> Self:
        if self.time is not None and _seconds(self.time) < 2 * self.signal_seconds:
            least = f"{2 * self.signal_seconds} s, or lower signal_seconds"
            raise ValueError(f"time {self.time} leaves nothing beside saving (signal_seconds); give at least {least}")
        return self


def _seconds(time: str) -> int:
    """Slurm's ways to write a time: minutes, M:S, H:M:S, D-H, D-H:M, D-H:M:S."""
    days, _, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    units = (3600, 60, 1) if days or len(parts) == 3 else (60, 1)
    return int(days or 0) * 86400 + sum(part * unit for part, unit in zip(parts, units, strict=False))


class LaunchParams(Block):
    """Where and how stages run. `stages` holds other settings for single stages, e.g. `{evaluate: {kind: local}}`."""

    kind: Literal["inline", "local", "slurm"] = "local"
    # Ranks on each node; None: training takes every visible GPU (on Slurm: gpus_per_node) that its batch divides over.
    processes: int | None = Field(default=None, ge=1)
    cpu_processes: int = Field(
        default=1, ge=1
    )  # what None means where there is no GPU, also to evaluate; a thread each
    shards: int = Field(default=1, ge=1)  # jobs that share one benchmark of the stage evaluate
    accelerate_config: str | None = None  # for `accelerate launch --config_file`; None: that of distribution.kind
    threads: int | None = Field(default=None, ge=1)  # OMP_NUM_THREADS of each rank
    env: dict[str, str] = Field(default_factory=dict)
    restarts: int = Field(default=2, ge=0)  # of a job that failed, from its last checkpoint
    grace_seconds: int = Field(default=60, ge=0)  # what a cancelled training stage has to save itself
    confirm_hours: float = Field(default=1.0, ge=0)  # ask before doing again what took longer
    poll_seconds: float = Field(default=5.0, gt=0)  # between questions to Slurm
    gpu: Literal["A100-40", "A100", "H100", "H200"] | None = None  # what cannot fit it is refused before submission
    slurm: SlurmParams = SlurmParams()
    stages: dict[str, dict[str, Any]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _stages_are_settings(self) -> Self:
        for stage in self.stages:
            self.of(stage)
        return self

    def of(self, stage: str) -> "LaunchParams":
        """The settings of one stage."""
        own = self.stages.get(stage)
        if own is None:
            return self
        values = self.model_dump(exclude={"stages"}) | own
        values["slurm"] = self.slurm.model_dump() | own.get("slurm", {})
        return LaunchParams.parse(values, f"launch.stages.{stage}")
