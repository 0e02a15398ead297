"""The whole run as one frozen value: `params.yaml`, one block per stage, read once and handed down.

Knows which blocks exist and what must agree between them; what a block means is told in the file of that block.
"""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from llada_core.config.launch import LaunchParams
from llada_core.config.registry import RegisterParams
from llada_core.data.params import DataParams
from llada_core.evaluation.params import EvaluateParams, ReportParams
from llada_core.modeling.architecture import ModelParams
from llada_core.settings import Block, ConfigError, read_yaml, with_overrides
from llada_core.training.params import (
    PUBLISHED_LEARNING_RATE,
    TRAINING_STAGES,
    GRPOParams,
    PreferenceParams,
    PretrainParams,
    SFTParams,
    TrainingParams,
)

Stage = Literal["prepare", "pretrain", "sft", "grpo", "sft_control", "preference", "evaluate", "report", "register"]
LEARN_FROM_NOTHING = ("pretrain", "sft", "sft_control")  # whose own default rate is made for weights of this run


class Params(Block):
    """Every number a run depends on. `stages` lists what this run has; a listed stage needs its block."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(default=0, ge=0)
    stages: tuple[Stage, ...] = Field(min_length=1)
    data: DataParams | None = None
    model: ModelParams | None = None
    pretrain: PretrainParams | None = None
    sft: SFTParams | None = None
    grpo: GRPOParams | None = None
    sft_control: SFTParams | None = None
    preference: PreferenceParams | None = None
    evaluate: EvaluateParams | None = None
    report: ReportParams | None = None
    register_: RegisterParams | None = Field(default=None, alias="register")
    launch: LaunchParams = LaunchParams()

    @model_validator(mode="before")
    @classmethod
    def _published_weights_learn_slowly(cls, values: Any) -> Any:
        """Fills in the learning rate of stages that do not say one and whose weights come from outside of this run."""
        blocks = {stage: values.get(stage) for stage in LEARN_FROM_NOTHING} if isinstance(values, dict) else {}
        slow = {
            stage: {**block, "learning_rate": PUBLISHED_LEARNING_RATE}
            for stage, block in blocks.items()
            if isinstance(block, dict) and "learning_rate" not in block and _origin(values, stage) is not None
        }
        return values | slow if slow else values

    @model_validator(mode="after")
    def _every_stage_has_its_block(self) -> Self:
        for stage in self.stages:
            block = {"prepare": self.data, "register": self.register_}.get(stage, getattr(self, stage, None))
            if block is None:
                key = "data" if stage == "prepare" else stage
                raise ValueError(f"stages lists {stage!r}, which needs a block named {key!r}")
        if len(set(self.stages)) != len(self.stages):
            raise ValueError(f"stages names one stage twice: {', '.join(self.stages)}")
        fresh = [s for s in TRAINING_STAGES if s in self.stages and self.training(s).init_from is None]
        if fresh and self.model is None:
            raise ValueError(
                f"{fresh[0]}.init_from is empty, so the stage builds a model: the block 'model' is missing"
            )
        return self

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

    @classmethod
    def load(cls, path: str | Path = "params.yaml", overrides: list[str] | None = None) -> Self:
        """The run that a file describes, with `block.key=value` overrides on top; raises `ConfigError`."""
        values: dict[str, Any] = with_overrides(read_yaml(Path(path)), overrides or [])
        return cls.parse(values, str(path))


def _origin(blocks: dict[str, Any], stage: str) -> str | None:
    """Follows `init_from` from stage to stage to what lies outside of this run; None where a model begins as noise."""
    source: str | None = stage
    for _ in TRAINING_STAGES:  # no chain is longer, and one that bites its tail is told of elsewhere
        block = blocks.get(source) if source in TRAINING_STAGES else None
        if not isinstance(block, dict):
            break
        source = block.get("init_from")
    return None if source in TRAINING_STAGES else source
