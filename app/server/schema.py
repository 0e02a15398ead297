"""What may be asked of the server and what it says, in the names of OpenAI's API; settings of the sampler are extra fields.

What a masked-diffusion model cannot do (tools, penalties) is refused by name and not passed over; what says nothing
about the answer (`user`, `metadata`) is.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

from llada_core.sampling.params import SamplingParams, changed
from llada_core.settings import ConfigError, Estimator, nearest

SAMPLER = tuple(name for name in vars(SamplingParams(max_new_tokens=1, block_length=1, steps=1)) if name != "rule")
PASSED_OVER = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "best_of"}
)
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (None, 0, 0.0),
    "presence_penalty": (None, 0, 0.0),
    "logit_bias": (None, {}),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "response_format": (None, {"type": "text"}),
    "top_logprobs": (None, 0),
    "parallel_tool_calls": (None, True, False),
    "echo": (None, False),
    "modalities": (None, ["text"]),
}
MOST_CHOICES, MOST_ANSWERS, MOST_PAIRS = 16, 64, 1024
Stop = Annotated[str, StringConstraints(min_length=1)]
Whole = Annotated[int, Field(ge=-(1 << 31), lt=1 << 31)]  # what tensors hold
# Fail fast: to tell all of 200,000 wrong entries would take a second, in which nobody is answered.
Ids = Annotated[list[Whole], Field(fail_fast=True)]


class BadRequestError(ValueError):
    """Something a client asked for that cannot be done: a sentence, the field, and OpenAI's code for it, if it has one."""

    def __init__(self, text: str, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(text)
        self.param, self.code, self.status = param, code, status


class ApiRequest(BaseModel):
    """A body: known fields of the right types, and no others."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str

    @classmethod
    def read(cls, body: Any) -> Self:
        """A parsed JSON body; raises `BadRequestError` that names the first field that does not fit."""
        if not isinstance(body, dict):
            raise BadRequestError(f"the body must be a JSON object, got {type(body).__name__}")
        values = {key: value for key, value in body.items() if key not in PASSED_OVER}
        for name in [name for name in values if name in NEUTRAL]:
            if (value := values.pop(name)) not in NEUTRAL[name]:
                raise BadRequestError(
                    f"{name} {value!r} is not offered by a masked-diffusion model; leave it out", name
                )
        known = [*cls.model_fields, *PASSED_OVER, *NEUTRAL]
        for name in values:
            if name not in cls.model_fields:
                raise BadRequestError(f"there is no field {name!r}{nearest(name, known)}", name)
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            said = first["msg"].removeprefix("Value error, ")
            raise BadRequestError(f"{place}: {said}" if place else said, place) from None


class Part(BaseModel):
    """A piece of a message's content; text is all that is read."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn. `name`s of speakers and refusals of earlier answers are passed over."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]

    def as_turn(self) -> dict[str, str]:
        """As the chat template takes it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(BaseModel):
    """What a stream tells beside the text: the counts at its end, the canvas at every step."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False
    denoising: bool = False


class SamplingFields(ApiRequest):
    """What both kinds of generation share. Sampler settings that are not given are those the model comes with."""

    n: int = Field(default=1, ge=1, le=MOST_CHOICES)
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: Stop | list[Stop] | None = Field(default=None, max_length=4)
    max_tokens: int | None = Field(default=None, ge=1)
    block_length: Whole | None = None
    steps: Whole | None = None
    temperature: float | None = None
    remasking: str | None = None
    cfg_scale: float | None = None
    threshold: float | None = None
    factor: float | None = None
    cache: str | None = None
    forbid_tokens: list[Whole] | None = None
    defer_tokens: list[Whole] | None = None
    stop_at_eos: bool | None = None
    seed: int | None = None
    entropy_bound: float | None = None
    schedule: str | None = None
    stochastic_transfer: bool | None = None
    cfg_keep_tokens: list[Whole] | None = None
    cache_refresh: Whole | None = None
    cache_window: Whole | None = None
    right_shift_logits: bool | None = None
    sampler: str | None = None
    editing_threshold: float | None = None
    max_post_steps: Whole | None = None
    num_to_transfer: Whole | None = None
    top_k: Whole | None = None
    top_p: float | None = None
    finish_block: bool | None = None
    variable_length: bool | None = None

    @field_validator("top_k", mode="after")
    @classmethod
    def _off(cls, value: int | None) -> int | None:
        return None if value in (-1, 0) else value  # how clients of other servers say that they ask for none

    @field_validator("stop", mode="before")
    @classmethod
    def _few(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts before the first of which the answer is cut."""
        return tuple(self.stop or ())

    def settings(self, base: SamplingParams) -> SamplingParams:
        """The model's own settings with what was given; a length alone takes blocks and steps along.

        Raises `BadRequestError`.
        """
        given = {name: getattr(self, name) for name in SAMPLER if getattr(self, name, None) is not None}
        given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
        try:
            return changed(base.at_length(self.max_tokens or base.max_new_tokens), given)
        except ConfigError as error:
            raise BadRequestError(str(error)) from None


class ChatRequest(SamplingFields):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(fail_fast=True)] = Field(min_length=1)
    logprobs: bool = False
    max_completion_tokens: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        self.max_tokens = self.max_completion_tokens or self.max_tokens
        if self.messages[-1].role != "user":
            raise ValueError(f"messages must end with one of the user, this one ends with {self.messages[-1].role!r}")
        return self


class CompletionRequest(SamplingFields):
    """`POST /v1/completions`. With a `suffix`, or a `template` with gaps as `[[5]]`, what is missing is filled in."""

    prompt: str | Annotated[list[str], Field(fail_fast=True)] | Ids | Annotated[list[Ids], Field(fail_fast=True)] = ""
    suffix: str | None = None
    template: str | None = None
    logprobs: int | None = Field(default=None, ge=0, le=1)

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.template is not None and (self.prompt or self.suffix):
            raise ValueError("a template holds all of the text; leave prompt and suffix out")
        if not self.prompts:
            raise ValueError("prompt is an empty list; give a text, which may be empty")
        if (asked := len(self.prompts) * self.n) > MOST_ANSWERS:
            raise ValueError(f"{asked} answers (prompts times n); at most {MOST_ANSWERS} are written in one request")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or more, as texts or ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        ids = [token for token in self.prompt if isinstance(token, int)]
        return [ids] if ids else [prompt for prompt in self.prompt if not isinstance(prompt, int)]


class Pair(BaseModel):
    """What is scored: an answer behind its prompt, a raw text or a conversation."""

    model_config = ConfigDict(extra="forbid")

    prompt: str | list[Message]
    answer: str


class ScoreRequest(ApiRequest):
    """`POST /v1/score`: log-likelihoods of answers, each behind its prompt; or of `labels`, all behind one `prompt`."""

    pairs: Annotated[list[Pair], Field(fail_fast=True)] | None = Field(
        default=None, min_length=1, max_length=MOST_PAIRS
    )
    prompt: str | list[Message] | None = None
    labels: list[str] | None = Field(default=None, min_length=2, max_length=MOST_PAIRS)
    estimator: Estimator = "auto"
    samples: int = Field(default=128, ge=1, le=4096)
    cfg_scale: float = Field(default=0.0, ge=0.0)
    seed: int = 0

    @model_validator(mode="after")
    def _pairs_or_labels(self) -> Self:
        if (self.pairs is None) == (self.labels is None) or (self.labels is None) != (self.prompt is None):
            raise ValueError("give pairs of prompt and answer, or one prompt with its labels")
        return self

    @property
    def texts(self) -> list[tuple[str | list[Message], str]]:
        """Prompt and answer, one for each score."""
        if self.pairs is not None:
            return [(pair.prompt, pair.answer) for pair in self.pairs]
        return [(self.prompt or "", label) for label in self.labels or ()]
