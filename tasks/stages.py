"""The stage table: what a stage is called, which block sets it, what it trains on, minimises and reads, how it is run; and
the blocks of the training stages of one run.

dvc.yaml owns the order, the code and the files of each stage; tests/tasks/test_graph.py compares the two. Imports no torch.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from pydantic import Field, create_model, model_validator

from llada_core.settings import ConfigError, SettingsBlock
from llada_core.training.params import PUBLISHED_LEARNING_RATE, TRAINING_STAGES, TrainingParams


@dataclass(frozen=True)
class Stage:
    """One stage. What a training stage trains on and minimises stands with its settings, ROWS and OBJECTIVE.

    block: its key in params.yaml. settings: the block's class, of a training stage. each: one instance (and one argument)
    a benchmark. open_ended: it reads files that no fingerprint covers, and keeps what it made by their content itself, so
    that it is always asked again.
    """

    name: str
    block: str
    settings: type[TrainingParams] | None = None
    each: bool = False
    open_ended: bool = False

    @property
    def inputs(self) -> tuple[str, ...]:
        """What a training stage trains on, in the project; what it starts from is `init_from` of its settings."""
        return () if self.settings is None else ("data/tokenizer", f"data/{self.settings.ROWS}")


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage("prepare", "data", open_ended=True),
        *(Stage(name, name, settings) for name, settings in TRAINING_STAGES.items()),
        Stage("evaluate", "evaluate", each=True),
        Stage("report", "report"),
        Stage("register", "register"),
    )
}


def program_of(name: str) -> str:
    """What follows `python -m` to run a stage: a module of its own, or the one of any training stage, and its name."""
    return f"tasks.{name}" if find_spec(f"tasks.{name}") else f"tasks {name}"


class StageBlocks(SettingsBlock):
    """What all runs have: `stages` lists those of this one; each training stage of the table may have a block."""

    stages: tuple[str, ...] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _published_weights_learn_slowly(cls, values: Any) -> Any:
        """Fills in the learning rate of stages that do not say one and whose weights come from outside of this run."""
        waiting = [name for name, settings in TRAINING_STAGES.items() if settings.FROM_SCRATCH]
        blocks = {stage: values.get(stage) for stage in waiting} if isinstance(values, dict) else {}
        slow = {
            stage: {**block, "learning_rate": PUBLISHED_LEARNING_RATE}
            for stage, block in blocks.items()
            if isinstance(block, dict) and "learning_rate" not in block and _origin(values, stage) is not None
        }
        return values | slow if slow else values

    def training(self, stage: str) -> TrainingParams:
        """The block of a training stage; raises `ConfigError` when the run has none of that name."""
        block = getattr(self, stage) if stage in TRAINING_STAGES else None
        if block is None:
            raise ConfigError(f"this run has no training stage {stage!r}; it has {', '.join(self.stages)}")
        return block

    def origin(self, stage: str) -> str | None:
        """The folder or name outside of this run that a stage's weights began as, over all stages before it; or None."""
        return _origin({name: {"init_from": self.training(name).init_from} for name in self._trained()}, stage)

    def settled(self, stage: str, *, gpu: bool) -> TrainingParams:
        """The block of a training stage with what depends on the machine written out."""
        return self.training(stage).settled(gpu=gpu, published=self.origin(stage) is not None)

    def _trained(self) -> list[str]:
        return [stage for stage in TRAINING_STAGES if getattr(self, stage) is not None]


def _origin(blocks: dict[str, Any], stage: str) -> str | None:
    """Follows `init_from` from stage to stage to what lies outside of this run; None where a model begins as noise."""
    source: str | None = stage
    for _ in TRAINING_STAGES:  # no chain is longer, and one that bites its tail is told of elsewhere
        block = blocks.get(source) if source in TRAINING_STAGES else None
        if not isinstance(block, dict):
            break
        source = block.get("init_from")
    return None if source in TRAINING_STAGES else source


if TYPE_CHECKING:
    TrainingBlocks = StageBlocks
else:
    TrainingBlocks = create_model(
        "TrainingBlocks",
        __base__=StageBlocks,
        **{name: (settings | None, None) for name, settings in TRAINING_STAGES.items()},
    )
