"""The models that a server offers: loaded once, followed when their alias moves, and never more of them than were named."""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.requests import ClientDisconnect

from app.canvas import parse_template
from app.models import LoadedModel, ModelCache, UserError
from app.server.answers import Draft
from app.server.schema import BadRequestError, ChatRequest, CompletionRequest, Message, SamplingFields, ScoreRequest
from llada_core.evaluation.requests import ChatText, pairs
from llada_core.likelihood import Likelihood
from llada_core.sampling.engine import Engine
from llada_core.sampling.params import SamplingParams
from llada_core.sampling.requests import to_answer, to_fill

SCORED_AT_ONCE = 8  # pairs that a device takes together
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


@dataclass(frozen=True)
class Limits:
    """What one server takes on. `waiting` requests beyond the `at_once` that are written; `body` in bytes; `silence`: seconds
    in which a client must have sent its body, and have read what is sent to it, or its place is for others.
    """

    at_once: int = 32
    waiting: int = 128
    seconds: float = 120.0
    body: int = 1 << 20
    silence: float = 20.0


class Metrics:
    """Counts of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter("requests", "Requests by path and status", "path", "status")
        self.tokens = self._counter("tokens", "Tokens of prompts and of answers", "kind")
        self.forwards = self._counter("forwards", "Forwards of the model that answers took")
        self.swaps = self._counter("model_swaps", "Times that an alias led to other weights")
        self.seconds = self._histogram("request_seconds", "From the request to the end of its answer", "path")
        self.first = self._histogram("first_text_seconds", "Until the first text of an answer")
        self.active = Gauge("lladaflow_requests_active", "Requests that are being written", registry=self.registry)
        self.accepted = Gauge("lladaflow_requests_accepted", "Requests written or waiting", registry=self.registry)

    def _counter(self, name: str, told: str, *labels: str) -> Counter:
        return Counter(f"lladaflow_{name}", told, labels, registry=self.registry)

    def _histogram(self, name: str, told: str, *labels: str) -> Histogram:
        return Histogram(f"lladaflow_{name}", told, labels, buckets=SECONDS, registry=self.registry)


@dataclass
class Service:
    """Models by the names they were given; the first answers for a client that asks for `default`."""

    cache: ModelCache
    names: Sequence[str]
    limits: Limits = field(default_factory=Limits)
    metrics: Metrics = field(default_factory=Metrics)
    loaded: dict[str, LoadedModel] = field(init=False, default_factory=dict)
    since: int = field(init=False, default_factory=lambda: int(time.time()))
    _said: dict[str, str] = field(init=False, default_factory=dict, repr=False)
    _scoring: threading.Lock = field(init=False, default_factory=threading.Lock, repr=False)

    def __post_init__(self) -> None:
        for name in self.names:
            self.loaded[name], _ = self.cache.get(name)

    def follow_aliases(self) -> list[str]:
        """Looks names up again and takes other weights where an alias has moved; sentences for the log.

        Answers under way end with the weights they began with. What cannot be loaded leaves the old ones in place, and is
        told once.
        """
        told = []
        for name in self.names:
            before = self.loaded[name]
            try:
                self.loaded[name], said = self.cache.get(name)
            except UserError as error:
                said = str(error)
            if self.loaded[name] is not before:
                self.metrics.swaps.inc()
            if said and self._said.get(name) != said:
                told.append(said)
            self._said[name] = said
        return told

    def model(self, name: str) -> LoadedModel:
        """The one that a request names; raises `BadRequestError` (404) with the names that there are."""
        found = self.loaded.get(self.names[0] if name == "default" else name)
        if found is None:
            offered = ", ".join(self.names)
            raise BadRequestError(
                f"there is no model {name!r} here; there are: {offered}", "model", "model_not_found", 404
            )
        return found

    def chat(self, asked: ChatRequest) -> list[Draft]:
        """The drafts of a conversation, one a choice."""
        loaded = self.model(asked.model)
        messages = loaded.usage.messages([message.as_turn() for message in asked.messages])
        _require_short(loaded, "messages", *(message["content"] for message in messages))
        params = asked.settings(loaded.usage.sampling)
        _judged(params, wanted=asked.logprobs)
        return self._drafts(loaded, asked, params, [loaded.tokenizer.chat_ids(messages)])

    def complete(self, asked: CompletionRequest) -> list[Draft]:
        """The drafts of all prompts, the choices of each beside each other; or of one gap, or one template."""
        loaded = self.model(asked.model)
        params = asked.settings(loaded.usage.sampling)
        _judged(params, wanted=asked.logprobs is not None)

        def encode(text: str, param: str = "prompt") -> list[int]:
            _require_short(loaded, param, text)
            return loaded.tokenizer.encode(text, user=False)  # raw: special strings are tokens, as for lm-eval

        prompts = [encode(prompt) if isinstance(prompt, str) else prompt for prompt in asked.prompts]
        if asked.template is None and asked.suffix is None:
            return self._drafts(loaded, asked, params, prompts)
        mask_id = loaded.model.special_tokens.mask_id
        if asked.template is not None:
            named = partial(encode, param="template")
            try:
                ids, suffix = parse_template(asked.template, named, mask_id, loaded.context), []
            except BadRequestError:
                raise
            except ValueError as error:
                raise BadRequestError(str(error), "template") from None
            prompts = [ids]
        else:
            suffix = encode(asked.suffix or "", "suffix")
        return self._drafts(loaded, asked, params, prompts, suffix=suffix, whole=asked.template is not None)

    def _drafts(
        self,
        loaded: LoadedModel,
        asked: SamplingFields,
        params: SamplingParams,
        prompts: list[list[int]],
        *,
        suffix: list[int] | None = None,
        whole: bool = False,
    ) -> list[Draft]:
        filling = whole or suffix is not None
        if filling:  # a template is filled to its end
            params = params.filling()
        blank = 0 if whole else params.max_new_tokens
        found: list[Draft] = []
        for prompt in prompts:
            # By its length, before there is a list of it: `max_tokens` may be any number.
            if (length := len(prompt) + blank + len(suffix or [])) > loaded.context:
                raise BadRequestError(
                    f"the prompt has {len(prompt)} tokens and the answer asks for {length - len(prompt)}; "
                    f"this model reads {loaded.context} at most",
                    "max_tokens",
                    "context_length_exceeded",
                )
            template = [*prompt, *[loaded.model.special_tokens.mask_id] * blank, *(suffix or [])]
            for copy in range(asked.n):
                try:
                    if filling:
                        (request,) = to_fill(loaded.model, [template], params, copy=copy)
                    else:
                        ((request,), _) = to_answer(loaded.model, [prompt], params, copy=copy)
                except ValueError as error:
                    raise BadRequestError(str(error)) from None
                found.append(Draft(loaded, request, prompt, asked.stops, len(suffix or []), whole, len(found)))
        return found

    def score(self, asked: ScoreRequest, left: threading.Event | None = None) -> dict[str, object]:
        """Log-likelihoods in nats, of labels their shares too. One request at a time, and between its forwards answers go
        on: who scores has a device's model to himself, so that a device holds one forward. Once the client has `left`
        nothing more is computed: `ClientDisconnect`.
        """
        loaded = self.model(asked.model)
        special = loaded.model.special_tokens
        prefix = special.eos_id if special.bos_id is None else special.bos_id
        for prompt in {id(prompt): prompt for prompt, _ in asked.texts}.values():  # of labels one
            said = [prompt] if isinstance(prompt, str) else [message.as_turn()["content"] for message in prompt]
            _require_short(loaded, "prompt", *said)
        for _, answer in asked.texts:
            _require_short(loaded, "answer", answer)
        with self._scoring:
            try:
                encoded = pairs([(_context(p, loaded), a) for p, a in asked.texts], loaded.tokenizer, prefix)
                scores, forwards = _scored(loaded, encoded, asked, left or threading.Event())
                if not np.isfinite(scores).all():
                    raise ValueError(
                        f"with cfg_scale {asked.cfg_scale:g} a likelihood is no number; take a smaller one"
                    )
            except ValueError as error:
                raise BadRequestError(str(error)) from None
        self.metrics.forwards.inc(forwards)
        data: list[dict[str, object]] = [
            {"index": i, "log_likelihood": score, "tokens": len(answer)}
            for i, (score, (_, answer)) in enumerate(zip(scores, encoded, strict=True))
        ]
        if asked.labels is not None:
            shares = np.exp(np.array(scores) - max(scores))
            for entry, label, share in zip(data, asked.labels, shares / shares.sum(), strict=True):
                entry |= {"label": label, "probability": float(share)}
        counts = {"prompt_tokens": sum(len(prompt) + len(answer) for prompt, answer in encoded)}
        return {
            "object": "list",
            "model": asked.model,
            "data": data,
            "usage": counts | {"forwards": forwards},
        }


@dataclass(frozen=True)
class _Turn(AbstractContextManager[None]):
    """The model for one forward of who scores, unless the client has left; those who write have a step in between."""

    engine: Engine
    left: threading.Event

    def __enter__(self) -> None:
        if self.left.is_set():
            raise ClientDisconnect
        self.engine.get_turn()

    def __exit__(self, *_: object) -> None:
        self.engine.turn.release()


def _scored(
    loaded: LoadedModel, encoded: list[tuple[list[int], list[int]]], asked: ScoreRequest, left: threading.Event
) -> tuple[list[float], int]:
    """The scores of all pairs, and the forwards that they took. A part goes to whichever device is free next, at first to
    the one that writes least; a pair's score does not depend on which.
    """
    firsts = range(0, len(encoded), SCORED_AT_ONCE)
    engines = sorted(loaded.engine.peers, key=lambda engine: engine.load)[: len(firsts)]
    scores, parts = [0.0] * len(encoded), iter(firsts)  # which all threads take from

    def share(engine: Engine) -> int:
        settings = asked.samples, asked.cfg_scale, asked.seed, asked.estimator
        likelihood = Likelihood(engine.model, *settings, turn=_Turn(engine, left))
        for first in parts:
            part = slice(first, first + SCORED_AT_ONCE)
            scores[part] = likelihood.scores(encoded[part])
        return likelihood.forwards

    with ThreadPoolExecutor(len(engines)) as threads:
        others = [threads.submit(share, engine) for engine in engines[1:]]
        forwards = share(engines[0])  # here: one device needs no thread of its own
    return scores, forwards + sum(other.result() for other in others)


def _context(prompt: str | list[Message], loaded: LoadedModel) -> str:
    """A raw text as it is; a conversation as one that remembers its messages, so that its ids are made of them."""
    if isinstance(prompt, str):
        return prompt
    messages = loaded.usage.messages([message.as_turn() for message in prompt])
    return ChatText(loaded.tokenizer.chat_text(messages), messages)


def _require_short(loaded: LoadedModel, param: str, *texts: str) -> None:
    """Refuses texts far longer than the model reads before all of them is encoded, which takes seconds and a hundred bytes
    for each token of a megabyte. What is hardly too long is refused later, with its number of tokens.
    """
    text, part, count = "".join(texts), 16 * loaded.context, 0
    for first in range(0, len(text), part) if len(text) > loaded.context else ():
        # Twice the context: where parts are cut, tokens may be too.
        count += len(loaded.tokenizer.encode(text[first : first + part], user=False))
        if count > 2 * loaded.context:
            raise BadRequestError(
                f"a text of {len(text):,} characters is longer than the {loaded.context} tokens that this model reads",
                param,
                "context_length_exceeded",
            )


def _judged(params: SamplingParams, *, wanted: bool) -> None:
    """Whether what is known of a token when it is written is its probability; raises `BadRequestError` where it is not."""
    if wanted and params.remasking != "low_confidence":
        raise BadRequestError(
            f"logprobs are known where remasking is 'low_confidence', here it is {params.remasking!r}", "logprobs"
        )
