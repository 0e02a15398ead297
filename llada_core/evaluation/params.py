"""What is evaluated and how the report compares it: names, limits and sampler settings as frozen values.

A benchmark is the name of a recipe (llada_core/evaluation/recipes) or of a file in data/eval.
"""

import dataclasses
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from llada_core.sampling.params import SamplingParams
from llada_core.settings import NOT_IN_FINGERPRINT, Bits, Estimator, SettingsBlock, nearest

SAMPLER_FIELDS = tuple(field.name for field in dataclasses.fields(SamplingParams))
EOS_RULES = ("none", "defer", "forbid")


class BenchmarkSettings(SettingsBlock):
    """How answers are obtained: fields of `SamplingParams` plus `eos`, and the Monte-Carlo samples of a likelihood.

    `eos`: none, defer (end tokens may be produced, committed last), forbid (the EOS token is never produced).
    `estimator` of a likelihood, by the names of `llada_core.likelihood`; None: auto. All estimate the same number, but for
    `confidence`, which is another score.
    """

    sampling: dict[str, str | int | float | bool | tuple[int, ...] | None] = Field(default_factory=dict)
    samples: int | None = Field(default=None, ge=1)
    cfg_scale: float | None = Field(default=None, ge=0)  # guidance of a likelihood
    estimator: Estimator | None = None
    framed: bool | None = (
        None  # a likelihood with BOS before the prompt and EOS behind the answer, as iLLaDA's evaluation
    )
    share: float | None = Field(default=None, gt=0, le=1)  # of each task's questions, drawn with a fixed seed
    questions: str | None = None  # the file of a benchmark of one's own: its rows (.jsonl), or its recipe (.yaml)

    @model_validator(mode="after")
    def _known(self) -> Self:
        allowed = [*SAMPLER_FIELDS, "eos"]
        for key in self.sampling:
            if key not in allowed:
                raise ValueError(f"unknown sampler setting {key!r}{nearest(key, allowed)}")
        if self.sampling.get("eos", "none") not in EOS_RULES:
            raise ValueError(f"eos is {self.sampling['eos']!r}; allowed: {', '.join(EOS_RULES)}")
        return self

    def over(self, below: "BenchmarkSettings") -> "BenchmarkSettings":
        """These settings where given, else those of `below`."""
        return BenchmarkSettings(
            sampling={**below.sampling, **self.sampling},
            samples=self.samples if self.samples is not None else below.samples,
            cfg_scale=self.cfg_scale if self.cfg_scale is not None else below.cfg_scale,
            estimator=self.estimator or below.estimator,
            framed=self.framed if self.framed is not None else below.framed,
            share=self.share or below.share,
        )

    def that_matter(self, kind: str) -> dict[str, Any]:
        """The settings on which a benchmark's expected score depends, by its kind: not which estimator of the likelihood is
        used.
        """
        aside = {"share", "questions"} if self.estimator == "confidence" else {"estimator", "share", "questions"}
        values = self.model_dump(mode="json", exclude_none=True, exclude=aside)
        sampling: dict[str, Any] = values.pop("sampling")
        return sampling if kind == "generate" else values


class SpeedParams(SettingsBlock):
    """What faster sampler settings cost each model, as `llada eval --speed` measures it; the report shows the table."""

    benchmarks: tuple[str, ...] = Field(min_length=1)  # of those that are evaluated, answered in words
    settings: tuple[str, ...] = Field(min_length=1)  # beside exact: "threshold=0.9,cache=prefix", or "usual"
    limit: int | None = Field(default=None, ge=1)  # questions per task and setting, one at a time
    models: tuple[str, ...] | None = None  # of those that are evaluated, as far as they are there; None: all

    def asks(self, benchmark: str, model: str) -> bool:
        """Whether it measures one model on one benchmark."""
        return benchmark in self.benchmarks and (self.models is None or model in self.models)


class EvaluateParams(SettingsBlock):
    """Every benchmark with every model. A model is the name of a stage, or whatever `load_model` takes."""

    benchmarks: tuple[str, ...] = ()
    models: tuple[str, ...] = ("sft", "sft_control", "grpo")
    # Folder with benchmark files; None: data.root; with neither, the Hub.
    root: Annotated[str | None, NOT_IN_FINGERPRINT] = None
    batch_size: Annotated[int | Literal["auto"], NOT_IN_FINGERPRINT] = 32
    limit: int | None = Field(default=None, ge=1)  # questions per task; a limited score is marked as a subset
    puzzles: BenchmarkSettings = BenchmarkSettings(
        sampling={"max_new_tokens": 64, "block_length": 64, "steps": 64, "stop_at_eos": True}
    )
    overrides: dict[str, BenchmarkSettings] = Field(
        default_factory=dict
    )  # benchmark -> settings put over those of its recipe
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    bits: Bits | None = None  # of quantised weights, on a CUDA GPU; None: as stored
    # Whether steps of the sampler are compiled (`llada serve --compile`); said only where it is.
    compile: Annotated[Literal["off", "graph", "max"], NOT_IN_FINGERPRINT] = Field(
        default="off", exclude_if=lambda value: value == "off"
    )
    run_code: bool = False  # benchmarks that run generated programs do so only with this opt-in
    speed: SpeedParams | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.batch_size != "auto" and int(self.batch_size) < 1:
            raise ValueError(f"batch_size is {self.batch_size}; give 1 or more, or auto")
        for name in {n for n in self.benchmarks if self.benchmarks.count(n) > 1}:
            raise ValueError(f"benchmark {name!r} is listed twice")
        for name in () if self.speed is None else self.speed.benchmarks:
            if name not in self.benchmarks:
                near = nearest(name, list(self.benchmarks))
                raise ValueError(f"speed.benchmarks names {name!r}, which benchmarks does not list{near}")
        return self


class Comparison(SettingsBlock):
    """A difference the report shows with its paired interval: `model` minus `baseline`."""

    model: str
    baseline: str


class ReportParams(SettingsBlock):
    """What the report compares."""

    comparisons: tuple[Comparison, ...] = (
        Comparison(model="grpo", baseline="sft"),
        Comparison(model="grpo", baseline="sft_control"),
    )
    bootstrap: int = Field(default=2000, ge=100)  # resamples where a score is not right-or-wrong
