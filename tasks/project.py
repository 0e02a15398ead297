"""A project's parameters: params.yaml as frozen values, how its stages are started, what is registered."""

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from llada_core.data.params import DataParams
from llada_core.evaluation.params import EvaluateParams, ReportParams
from llada_core.modeling.families import ModelParams
from llada_core.sampling.params import SamplingParams
from llada_core.settings import Bits, SettingsBlock, nearest, read_yaml, with_overrides
from tasks.folders import home, sqlite_uri
from tasks.stages import STAGES, TRAINING_STAGES, TrainingBlocks

# Kind of launcher -> its class, by path: a table of names costs no import of what a run does not need.
LAUNCHERS = {"local": "tasks.launch.local:LocalLauncher", "slurm": "tasks.launch.slurm:SlurmLauncher"}
KINDS = ("inline", *LAUNCHERS)  # inline: in the process that asks, without a job
TIME = r"^(\d+-\d{1,2}(:\d{2}){0,2}|\d+(:\d{2}){0,2})$"  # what sbatch --time takes


class SlurmParams(SettingsBlock):
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


class LaunchParams(SettingsBlock):
    """Where and how stages run. `stages` holds other settings for single stages, e.g. `{evaluate: {kind: local}}`."""

    kind: str = "local"  # one of KINDS
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

    @field_validator("kind")
    @classmethod
    def _known(cls, kind: str) -> str:
        if kind not in KINDS:
            raise ValueError(f"{kind!r} is none{nearest(kind, list(KINDS))}")
        return kind

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


class GateParams(SettingsBlock):
    """A candidate becomes champion if it is better on `better` by more than noise, and worse on none of `not_worse`.

    A name is a benchmark of `reports/eval`. Scores are compared question by question, with a paired 95 % interval.
    `at_least` are floors that hold for the first champion too. With none of the three only a first champion passes.
    """

    better: tuple[str, ...] = ()  # over the questions of all of these; empty: one that is not worse
    not_worse: tuple[str, ...] = ()
    at_least: dict[str, float] = Field(default_factory=dict)


class RegisterParams(SettingsBlock):
    """The model that a run registers."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    model: str = "grpo"  # a training stage
    gate: GateParams = GateParams()
    device: str = "auto"  # where a served version lies: auto, cuda, cuda:N, mps, cpu
    bits: Bits | None = None  # of its weights; None: as stored
    sampling: SamplingParams = SamplingParams(max_new_tokens=64, block_length=64, steps=64, stop_at_eos=True)  # serving


class Params(TrainingBlocks):
    """Every number a run depends on; a listed stage needs its block."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(default=0, ge=0)
    data: DataParams | None = None
    model: ModelParams | None = None
    evaluate: EvaluateParams | None = None
    report: ReportParams | None = None
    register_: RegisterParams | None = Field(default=None, alias="register")
    launch: LaunchParams = LaunchParams()

    @model_validator(mode="after")
    def _every_stage_has_its_block(self) -> Self:
        given = {
            field.alias or name for name, field in type(self).model_fields.items() if getattr(self, name) is not None
        }
        for stage in self.stages:
            if stage not in STAGES:
                raise ValueError(f"stages lists {stage!r}, which is none{nearest(stage, list(STAGES))}")
            if (key := STAGES[stage].block) not in given:
                raise ValueError(f"stages lists {stage!r}, which needs a block named {key!r}")
        if len(set(self.stages)) != len(self.stages):
            raise ValueError(f"stages names one stage twice: {', '.join(self.stages)}")
        fresh = [s for s in TRAINING_STAGES if s in self.stages and self.training(s).init_from is None]
        if fresh and self.model is None:
            raise ValueError(
                f"{fresh[0]}.init_from is empty, so the stage builds a model: the block 'model' is missing"
            )
        return self

    @classmethod
    def load(cls, path: str | Path = "params.yaml", overrides: list[str] | None = None) -> Self:
        """The run that a file describes, with `block.key=value` overrides on top; raises `ConfigError`."""
        values: dict[str, Any] = with_overrides(read_yaml(Path(path)), overrides or [])
        return cls.parse(values, str(path))


@dataclass(frozen=True)
class Project:
    """A checkout or a workspace of it: where it lies and what it keeps. Made once, handed on; all else is read when first
    asked for, and then stays."""

    root: Path  # with params.yaml, dvc.yaml, data/, models/, reports/

    @classmethod
    def at(cls, root: Path | None = None) -> Self:
        """The project in a folder; in the working directory by default."""
        return cls(Path.cwd() if root is None else root)

    @cached_property
    def home(self) -> Path:
        """The folder with runs/, store/ and mlflow.db: the checkout, also for its workspaces; raises as `folders.home`."""
        return home(self.root)

    @property
    def runs(self) -> Path:
        """The folder of run folders."""
        return self.home / "runs"

    @property
    def store(self) -> Path:
        """The folder with the weights of registered models, by content hash, and their receipts."""
        return self.home / "store"

    @cached_property
    def tracking_uri(self) -> str:
        """Where MLflow keeps its records: `MLFLOW_TRACKING_URI`, else mlflow.db beside runs/ and store/."""
        return os.environ.get("MLFLOW_TRACKING_URI") or sqlite_uri(self.home / "mlflow.db")

    @property
    def values(self) -> dict[str, Any]:
        """What params.yaml says, as a person wrote it; raises `ConfigError`."""
        return read_yaml(self.root / "params.yaml")

    @cached_property
    def params(self) -> Params:
        """The same, checked and with its defaults; raises `ConfigError`."""
        return Params.load(self.root / "params.yaml")


def data_root(params: Params, home: Path) -> Path | None:
    """The folder with local benchmark files: LLADAFLOW_DATA_ROOT, evaluate.root or data.root, relative to `home`."""
    own = params.evaluate.root if params.evaluate else None
    return below(home, own or (params.data.root if params.data else None))


def below(home: Path, given: str | None) -> Path | None:
    """LLADAFLOW_DATA_ROOT, else `given`, relative to `home`; None where there is no such folder."""
    given = os.environ.get("LLADAFLOW_DATA_ROOT") or given
    root = home / Path(given).expanduser() if given else None
    return root if root is not None and root.is_dir() else None


def source_roots(given: str | None, home: Path) -> list[Path]:
    """The folders in which a source of rows is looked for, in turn: LLADAFLOW_DATA_ROOT, `given`, the project's own."""
    roots = [root for root in (os.environ.get("LLADAFLOW_DATA_ROOT"), given) if root]
    return [home / Path(root).expanduser() for root in roots] + [home]


def visible_gpus() -> int:
    """As CUDA would count them, without the seconds that importing torch takes."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = len([path for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdigit()])
    if chosen is None:
        return devices
    names = [name.strip() for name in chosen.split(",") if name.strip()]
    return min(devices, next((n for n, name in enumerate(names) if name == "-1"), len(names)))  # CUDA stops at -1
