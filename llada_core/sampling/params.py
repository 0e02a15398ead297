"""Every setting of the sampler with its description, the presets, and what is exact."""

import dataclasses
from collections.abc import Mapping
from functools import wraps
from typing import Any, Literal, Self

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from llada_core.settings import ConfigError, explain

# Named once: what says nothing of editing has these values, also where the sampler edits nothing.
EDITING: dict[str, Any] = {
    "editing_threshold": 0.9,
    "max_post_steps": 16,
    "num_to_transfer": 1,
}  # of the sampler llada2.1, as published
PARALLEL_RULES = ("threshold", "factor", "entropy_bound", "rule")


# A dataclass and no SettingsBlock: positional arguments and `dataclasses.replace` are how a library is called.
@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class SamplingParams:
    """Settings of one generation (LLaDA, arXiv:2502.09992, section 2.4; Fast-dLLM, arXiv:2505.22618).

    `max_new_tokens` masks follow the prompt and are filled block by block of `block_length`; `steps` is the budget of
    the whole answer, shared evenly by its blocks. How many positions a step commits is said by one of
    - `schedule`: "even" as LLaDA does (length and steps must divide), or "linear"/"cosine", the expectation of the
      reverse process of that noise schedule, rounded (anything may divide); with `stochastic_transfer` the number is
      drawn, and with `remasking="random"` too that is the reverse process itself (a masked token stays masked with
      chance s/t);
    - `threshold`: every position at least that sure; `factor`: the r-th surest if its confidence is 1 - factor/(r+1)
      or more; `entropy_bound`: the surest while their entropies without the largest add up to no more
      (arXiv:2505.24857; with `remasking="entropy"`); `rule`: the dotted path of a function of one's own
      (`llada_core.sampling.unmask.Rule`), which may also take tokens back. These commit at least one position, need no
      schedule and leave `steps` unused.
    Which positions come first is said by `remasking`: the probability of the proposed token, its margin over the next
    one, the entropy of the whole distribution, or nothing ("random"). `forbid_tokens` are never produced,
    `defer_tokens` are committed last. At a `temperature`, `top_k` and then `top_p` say among which tokens is drawn (equals
    of the last one stay too); how sure the model is counts the whole distribution, as without them. `cfg_scale` guides away from the answer to no prompt, in which
    `cfg_keep_tokens` stay visible. `cache` is approximate: "prefix" keeps keys and values of what precedes the block,
    "dual" of all but the block and `cache_window` positions each side; they are made anew when a row enters a block
    and, if set, every `cache_refresh` steps. `right_shift_logits` is for models whose logits predict the next token.
    `stop_at_eos` ends a row at its first end token, with `finish_block` once the block of that token is whole; with
    `variable_length` nothing stands behind the block until it is whole (iLLaDA, arXiv:2606.25331, section 2.3). One `seed`
    gives one answer for one prompt, whatever its batch.
    `sampler` names one of LLaDA2's, whose `steps` count for each block. "llada2.0" writes every position above
    `threshold`, or the surest where these are fewer than the step's share of the block. "llada2.1" writes those or the
    `num_to_transfer` surest, and replaces written tokens of the block by others above `editing_threshold`, also in at most
    `max_post_steps` looks at a block without masks, and stops only where one changes nothing. Both thresholds are strict:
    0 takes every position (of editing: every disagreement), 1 none. By their published names: minimal_topk m bounds
    `steps` by length / m; eos_early_stop is `stop_at_eos`, and 2.0 without it is `finish_block` as well.
    Raises `ConfigError`, a `ValueError` of one line.
    """

    max_new_tokens: int = Field(ge=1, description="How many tokens the answer has room for.")
    block_length: int = Field(
        ge=1,
        description="The answer is written block by block, each of so many tokens; as long as the answer: all at once.",
    )
    steps: int = Field(
        ge=1,
        description="Looks at the canvas for the whole answer; as many as tokens is exact, fewer write several at once.",
    )
    temperature: float = Field(
        default=0.0,
        ge=0.0,
        allow_inf_nan=False,
        description="0 always takes the likeliest token; higher draws at random, for variety.",
    )
    remasking: Literal["low_confidence", "random", "margin", "entropy"] = Field(
        default="low_confidence",
        description="Which positions come first: the surest, those with the clearest lead, the least entropy, or any.",
    )
    # LLaDA's scale: 0 is no guidance, where others count from 1.
    cfg_scale: float = Field(
        default=0.0,
        ge=0.0,
        allow_inf_nan=False,
        description="Guidance away from the answer to no question; 0 is off, above 0 costs a second look per step.",
    )
    threshold: float | None = Field(
        default=None,
        ge=0.0,
        le=1.0,
        description="Write every position at least this sure in one step (approximate, fast); 0.9 is usual.",
    )
    # Fast-dLLM (theorem 1): n tokens above 1 - 1/(n + 1) each are the likeliest n together, so more at once must be surer.
    factor: float | None = Field(
        default=None,
        gt=0.0,
        allow_inf_nan=False,
        description="Like threshold, but stricter the more tokens are written at once; use one of the two.",
    )
    cache: Literal["none", "prefix", "dual"] = Field(
        default="none",
        description="Keep keys and values of what is written: prefix (before the block) or dual (around it); approximate.",
    )
    forbid_tokens: tuple[int, ...] = Field(default=(), description="Token numbers that are never written.")
    defer_tokens: tuple[int, ...] = Field(default=(), description="Token numbers that are written last.")
    # Off, as in LLaDA's code, which fills all of the room: its published figures were measured so.
    stop_at_eos: bool = Field(
        default=False, description="Stop as soon as the answer has ended instead of filling all of its room."
    )
    seed: int | None = Field(
        default=None, description="The same number gives the same answer; empty draws a new one each time."
    )
    # Tokens drawn apart differ from tokens drawn together by no more than these entropies without the largest.
    entropy_bound: float | None = Field(
        default=None,
        ge=0.0,
        allow_inf_nan=False,
        description="Like threshold, by the added entropies of what is written at once; needs remasking entropy.",
    )
    schedule: Literal["even", "linear", "cosine"] = Field(
        default="even",
        description="How many tokens each step writes: even, or as a linear or cosine noise schedule expects.",
    )
    stochastic_transfer: bool = Field(
        default=False, description="Draw the number of tokens per step from the noise schedule (linear or cosine)."
    )
    cfg_keep_tokens: tuple[int, ...] = Field(
        default=(), description="Token numbers of the question that guidance leaves visible."
    )
    cache_refresh: int | None = Field(
        default=None, ge=1, description="Look at the whole canvas again every so many steps when a cache is used."
    )
    cache_window: int = Field(
        default=0, ge=0, description="Dual cache: positions on each side of the block that are always looked at again."
    )
    right_shift_logits: bool = Field(
        default=False,
        description="For models converted from autoregressive ones, whose output is one position late.",
    )
    # Newer than the checkpoints that name a run by its settings: left out of what is written while it says nothing.
    rule: str | None = Field(
        default=None,
        exclude_if=lambda path: path is None,
        description="Dotted path of a function of one's own that says what is written in a step, and what is taken back.",
    )
    sampler: Literal["llada2.0", "llada2.1"] | None = Field(
        default=None,
        exclude_if=lambda name: name is None,
        description="LLaDA2's own: 2.0 writes above threshold or a step's share, 2.1 edits too; steps count for each block.",
    )
    editing_threshold: float = Field(
        default=EDITING["editing_threshold"],
        ge=0.0,
        le=1.0,
        exclude_if=lambda value: value == EDITING["editing_threshold"],
        description="LLaDA2.1: a written token gives way to another one that is surer than this; 0: to any, 1: to none.",
    )
    max_post_steps: int = Field(
        default=EDITING["max_post_steps"],
        ge=0,
        exclude_if=lambda value: value == EDITING["max_post_steps"],
        description="LLaDA2.1: so many looks at most at a block that is written, for tokens to be edited.",
    )
    num_to_transfer: int = Field(
        default=EDITING["num_to_transfer"],
        ge=1,
        exclude_if=lambda value: value == EDITING["num_to_transfer"],
        description="LLaDA2.1: tokens that a step writes at least, however unsure.",
    )
    top_k: int | None = Field(
        default=None,
        ge=1,
        exclude_if=lambda value: value is None,
        description="Draw among the so many likeliest tokens alone; at temperature 0 it changes nothing.",
    )
    top_p: float | None = Field(
        default=None,
        gt=0.0,
        le=1.0,
        exclude_if=lambda value: value is None,
        description="Draw among the likeliest tokens that add up to this probability; at temperature 0 it changes nothing.",
    )
    finish_block: bool = Field(
        default=False,
        exclude_if=lambda value: not value,
        description="stop_at_eos waits until the block of the end token is whole; with llada2.1 it always does.",
    )
    # Approximates nothing, but is another canvas: iLLaDA was trained to end its texts, LLaDA to fill a room with EOS.
    variable_length: bool = Field(
        default=False,
        exclude_if=lambda value: not value,
        description="Masks behind the block are not there yet: the answer grows by blocks, as iLLaDA writes (LLaDA2 always does).",
    )

    @property
    def parallel(self) -> bool:
        """Whether confidence, not a schedule, says how many positions a step commits."""
        rules = (self.threshold, self.factor, self.entropy_bound, self.rule, self.sampler)
        return any(rule is not None for rule in rules)

    @property
    def blocks(self) -> int:
        """The number of blocks of an answer."""
        return -(-self.max_new_tokens // self.block_length)

    @property
    def most_steps(self) -> int:
        """The steps of an answer, at most; of LLaDA2's samplers, which count for each block, of one block more."""
        if self.sampler is None:
            return self.steps
        looks = self.max_post_steps if self.sampler == "llada2.1" else 0
        # 2.1 has no limit of steps, but each writes a token at least, so that a block takes no more than its length.
        each = self.block_length if self.sampler == "llada2.1" else min(self.steps, self.block_length)
        # Blocks count from the start of the canvas: a prompt that ends within one leaves room in one block more.
        return (each + looks) * (self.blocks + 1)

    def at_length(self, length: int) -> "SamplingParams":
        """These settings for an answer of `length` tokens, with as many tokens a step.

        Blocks stay as long as they are where the even schedule can still share `length` among them, else one block
        spans the answer, as one does that spanned it before. Raises `ConfigError` for a length below 1.
        """
        new = dataclasses.replace(self, max_new_tokens=length).max_new_tokens  # checked; a number where YAML had text
        if self.sampler is not None:  # blocks as they were trained, and steps for each of them
            return dataclasses.replace(self, max_new_tokens=new)
        if new == self.max_new_tokens:
            return dataclasses.replace(self, block_length=min(new, self.block_length))
        block = new if self.block_length >= self.max_new_tokens else min(new, self.block_length)
        # Equal shares of the steps need blocks of equal length, which LLaDA's code asks for as well.
        if self.schedule == "even" and not self.parallel and new % block:
            block = new
        # At least one: at many tokens a step a short answer would get none.
        steps = max(1, round(self.steps * new / self.max_new_tokens))
        return dataclasses.replace(self, max_new_tokens=new, block_length=block, steps=steps)

    def filling(self) -> "SamplingParams":
        """These settings for a text that is filled to its end, without those of how an answer ends and grows."""
        return dataclasses.replace(self, stop_at_eos=False, finish_block=False, variable_length=False)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        values = (self.threshold, self.factor, self.entropy_bound, self.rule)
        rules = [name for name, value in zip(PARALLEL_RULES, values, strict=True) if value is not None]
        if len(rules) > 1:
            raise ValueError(f"{' and '.join(rules)} are rules for one choice; set one of them")
        if self.stochastic_transfer and (self.schedule == "even" or rules):
            raise ValueError(
                "stochastic_transfer draws from a noise schedule; set schedule to linear or cosine"
                f" and leave {', '.join(PARALLEL_RULES)} unset"
            )
        # A rule of one's own is not judged: what it makes of a confidence by chance is its own matter.
        if rules and self.remasking == "random" and self.rule is None:
            raise ValueError(
                f"{rules[0]} judges confidence, which remasking 'random' replaces by chance; use another remasking"
            )
        if self.entropy_bound is not None and self.remasking != "entropy":
            raise ValueError(f"entropy_bound adds up entropies; set remasking to 'entropy' (got {self.remasking!r})")
        self._sampler_fits()
        if self.cfg_keep_tokens and not self.cfg_scale:
            raise ValueError("cfg_keep_tokens says what guidance leaves visible; set cfg_scale above 0")
        if self.cache != "dual" and self.cache_window:
            raise ValueError(f"cache_window {self.cache_window} needs cache 'dual' (got {self.cache!r})")
        if self.cache == "none" and self.cache_refresh is not None:
            raise ValueError(f"cache_refresh {self.cache_refresh} needs cache 'prefix' or 'dual'")
        # The prediction for a block's first position stands in front of the block, where a cached step feeds nothing.
        if self.cache != "none" and self.right_shift_logits:
            raise ValueError(
                "right_shift_logits reads the position before the block, which a cache lacks; set cache to 'none'"
            )
        return self

    def _sampler_fits(self) -> None:
        told = [name for name, usual in EDITING.items() if getattr(self, name) != usual]
        if self.sampler != "llada2.1" and told:
            raise ValueError(
                f"{told[0]} {getattr(self, told[0])} is for the sampler llada2.1 (got {self.sampler!r}); leave it at "
                f"{EDITING[told[0]]}"
            )
        if self.finish_block and not self.stop_at_eos:
            raise ValueError("finish_block says when stop_at_eos stops; set stop_at_eos")
        if self.sampler is None:
            # Elsewhere a threshold includes its value: at 0 one step would write a whole block, whatever it thinks of it.
            if self.threshold == 0:
                raise ValueError("threshold 0 takes every position only with a sampler of LLaDA2; set it above 0")
            return
        if self.threshold is None:
            raise ValueError(f"sampler {self.sampler!r} needs a threshold; 0.95 is published")
        # Both thresholds are compared with the probability of one token, which an entropy is not.
        if self.remasking == "entropy":
            raise ValueError(f"sampler {self.sampler!r} judges probabilities; set remasking to 'low_confidence'")
        if self.sampler == "llada2.1" and self.threshold < self.editing_threshold < 1:
            raise ValueError(
                f"editing_threshold {self.editing_threshold} is above threshold {self.threshold}: what is written would "
                "hardly be edited; lower it, or set 1 for a sampler that edits nothing"
            )


def _told_in_one_line(init: Any) -> Any:
    """A mistake in a call becomes one `ConfigError`, as a mistake in a file does."""

    @wraps(init)
    def told(self: SamplingParams, *args: Any, **values: Any) -> None:
        try:
            init(self, *args, **values)
        except ValidationError as error:
            raise ConfigError("; ".join(explain(SamplingParams, e) for e in error.errors())) from None

    return told


SamplingParams.__init__ = _told_in_one_line(SamplingParams.__init__)  # type: ignore[method-assign]


PRESETS = ("exact", "fast", "creative")
PUBLISHED = SamplingParams(max_new_tokens=128, block_length=32, steps=128, stop_at_eos=True)
"""Settings for a model that comes with none: those of LLaDA's own demo."""
MODES = ("quality", "speed")
_CARD = SamplingParams(512, 32, 32, stop_at_eos=True, cache="prefix", sampler="llada2.0", threshold=0.95)
RECOMMENDED = {
    "llada2.0": _CARD,
    "quality": dataclasses.replace(_CARD, sampler="llada2.1", threshold=0.7, editing_threshold=0.5),
    "speed": dataclasses.replace(_CARD, sampler="llada2.1", threshold=0.5, editing_threshold=0.0),
    "illada": SamplingParams(512, 32, 512, stop_at_eos=True, finish_block=True, variable_length=True),
}
"""What the cards of LLaDA2.0-mini and, in two modes, of LLaDA2.1-mini say; their files do not tell the two apart. iLLaDA's as
in eval_illada.sh of ML-GSAI/LLaDA@9182493, which asks for up to 4,096 tokens: blocks of 32, a token a forward."""


def as_values(params: SamplingParams) -> dict[str, Any]:
    """The settings as receipts and records keep them: every one, but `rule` where it says nothing."""
    values: dict[str, Any] = TypeAdapter(SamplingParams).dump_python(params)
    return values


def changed(base: SamplingParams, values: Mapping[str, Any]) -> SamplingParams:
    """`base` with other values; what it says of editing goes with its sampler.

    Raises `ConfigError` that names an unknown value.
    """
    # Else a change of the sampler alone would leave values of editing behind, which another sampler refuses.
    edits = values.get("sampler", base.sampler) == "llada2.1"
    return SamplingParams(**{**vars(base), **({} if edits else EDITING), **values})


def preset(name: str, base: SamplingParams) -> SamplingParams:
    """`base` made exact (one token per step), fast (parallel, cached), creative (drawn at random), or one of `MODES`."""
    if name in MODES:
        if base.sampler is None:
            raise ValueError(f"Preset {name!r} is for models with a sampler of their own, as LLaDA2; take fast.")
        kept = {name: getattr(base, name) for name in ("max_new_tokens", "forbid_tokens", "defer_tokens", "seed")}
        return dataclasses.replace(RECOMMENDED[name], **kept)
    exact = SamplingParams(
        max_new_tokens=base.max_new_tokens,
        block_length=min(base.block_length, base.max_new_tokens),
        steps=base.max_new_tokens,
        forbid_tokens=base.forbid_tokens,
        defer_tokens=base.defer_tokens,
        stop_at_eos=base.stop_at_eos,
        right_shift_logits=base.right_shift_logits,
        variable_length=base.variable_length,
        seed=base.seed,
    )
    if base.sampler is not None:  # nothing is surer than 1: a step writes the surest alone, and nothing is edited
        one_by_one = {"sampler": "llada2.0", "threshold": 1.0, "steps": base.block_length, "temperature": 0.0}
        exact = changed(base, one_by_one)
        if name == "fast":
            return base
    if name == "exact":
        return exact
    if name == "fast":
        return dataclasses.replace(exact, threshold=0.9, cache="prefix")
    if name == "creative":
        return dataclasses.replace(exact, temperature=0.8)
    raise ValueError(f"There is no preset {name!r}; there are {', '.join(PRESETS + MODES)}.")


def exactness(made: SamplingParams) -> str:
    """Which of these settings approximate, as a sentence."""
    reasons = []
    if made.cache != "none" and made.sampler is None:  # LLaDA2's cache holds what no later token changes
        reasons.append(f"the {made.cache} cache reuses keys and values of an older canvas")
    if made.parallel and (made.sampler is None or made.threshold != 1.0):
        reasons.append("several tokens are written at once when the model is sure enough")
    elif made.steps < (made.max_new_tokens if made.sampler is None else made.block_length):
        reasons.append(f"{made.max_new_tokens} tokens in {made.steps} steps write several at once")
    if made.sampler == "llada2.1":
        reasons.append("what is written may be replaced")
    told = f"Approximate: {'; '.join(reasons)}." if reasons else "Exact: one token per step, each from a full forward."
    drawn = f"Drawn at random (temperature {made.temperature:g}), so another answer each time. "
    return told if made.temperature == 0 else drawn + told.replace("Exact: one", "One")
