"""How a canvas is filled in: every knob of the sampler as one frozen value.

Knows limits and which settings exclude each other; does not know models, tokens or canvases.
"""

from typing import Literal, Self

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class SamplingParams:
    """Settings of one generation (LLaDA, arXiv:2502.09992, section 2.4; Fast-dLLM, arXiv:2505.22618)."""

    max_new_tokens: int = Field(ge=1)
    block_length: int = Field(ge=1)
    steps: int = Field(ge=1)
    temperature: float = Field(default=0.0, ge=0.0)
    remasking: Literal["low_confidence", "random", "margin", "entropy"] = "low_confidence"
    cfg_scale: float = Field(default=0.0, ge=0.0)
    threshold: float | None = Field(default=None, gt=0.0, le=1.0)
    factor: float | None = Field(default=None, gt=0.0)
    cache: Literal["none", "prefix", "dual"] = "none"
    forbid_tokens: tuple[int, ...] = ()
    defer_tokens: tuple[int, ...] = ()
    stop_at_eos: bool = False
    seed: int | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.threshold is not None and self.factor is not None:
            raise ValueError("threshold and factor are two rules for one choice; set one of them")
        return self
