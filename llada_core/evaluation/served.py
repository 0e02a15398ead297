"""lm-eval's language model behind `llada serve`: `--model llada-server`, for generation and for likelihoods.

Prompts, stop strings and sampler settings are those of the model in process; the server has the weights and the tokenizer.
"""

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self, TypeVar

import requests
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.utils import simple_parse_args_string

from llada_core.evaluation.params import SAMPLER_FIELDS
from llada_core.evaluation.requests import (
    DEFAULT_LENGTH,
    TOKEN_LISTS,
    ChatText,
    asked_for,
    cut,
    renamed,
    token_list,
)
from llada_core.settings import ConfigError, nearest
from llada_core.tokenizer import Message

OWN = ("base_url", "model", "samples", "mc_num", "estimator", "seed", "num_concurrent", "timeout", "tries")
PAIRS_AT_ONCE = 64  # scored in one request
Given = TypeVar("Given")
Found = TypeVar("Found")


@register_model("llada-server")
class ServedLM(LM):
    """A model that answers lm-eval over HTTP.

    base_url: the server's address, `http://127.0.0.1:8000` (a `/v1` at its end is its own). model: one of its names.
    sampling: settings of the sampler that go with every generation; a task's `gen_kwargs` go over them. samples,
    estimator, seed, cfg_scale: of likelihoods. The key is read from LLADAFLOW_API_KEY.
    """

    def __init__(  # noqa: PLR0913 - model_args are as many as they are
        self,
        base_url: str = "http://127.0.0.1:8000",
        model: str = "default",
        *,
        sampling: Mapping[str, Any] | None = None,
        samples: int = 128,
        estimator: str = "auto",
        seed: int = 0,
        num_concurrent: int = 8,
        timeout: float = 600.0,
        tries: int = 8,
    ) -> None:
        super().__init__()
        self.url, self.model, self.sampling = base_url.rstrip("/").removesuffix("/v1"), model, dict(sampling or {})
        self.scoring = {"samples": samples, "estimator": estimator, "seed": seed}
        if "cfg_scale" in self.sampling:
            self.scoring["cfg_scale"] = self.sampling["cfg_scale"]
        self.num_concurrent, self.timeout, self.tries = num_concurrent, timeout, tries
        key = os.environ.get("LLADAFLOW_API_KEY", "")
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> Self:
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> Self:
        """From lm-eval's `--model_args`; what lm-eval adds of its own (device, batch size) says nothing to a server."""
        values = renamed(arg_dict)
        for name in values:
            if name not in OWN and name not in SAMPLER_FIELDS:
                raise ConfigError(f"model_args: unknown setting {name!r}{nearest(name, [*OWN, *SAMPLER_FIELDS])}")
        if "mc_num" in values:
            values["samples"] = values.pop("mc_num")
        own = {name: values.pop(name) for name in OWN if name in values}
        values |= {name: token_list(values[name]) for name in TOKEN_LISTS if name in values}
        return cls(**own, sampling=values)

    @property
    def tokenizer_name(self) -> str:
        return self.model.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return "the server's" if chat_template else None

    def apply_chat_template(self, chat_history: list[Message], add_generation_prompt: bool = True) -> ChatText:
        """A text that remembers its messages, which the server renders."""
        if not add_generation_prompt:
            raise ConfigError("gen_prefix: a served model does not continue a reply; evaluate it in process")
        return ChatText("\n".join(f"{turn['role']}: {turn['content']}" for turn in chat_history), chat_history)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts up to the end token or the first stop string."""
        return self._each(self._generate, [request.args for request in requests])

    def _generate(self, asked: tuple[str, Mapping[str, Any]]) -> str:
        text, given = asked[0], asked_for(asked[1])
        if given.get("infill"):
            raise ConfigError("infill: gaps as long as their answers are counted in process: --model llada")
        until = given.pop("until", None) or []
        until = [until] if isinstance(until, str) else list(until)
        body = self.sampling | {name: value for name, value in given.items() if name in SAMPLER_FIELDS}
        if not given.get("do_sample", True):
            body["temperature"] = self.sampling.get("temperature", 0.0)
        length = body.pop("max_new_tokens", given.get("max_gen_toks", DEFAULT_LENGTH))
        body |= {"max_tokens": length, "stop": [stop for stop in until if stop][:4] or None}
        if isinstance(text, ChatText):
            answer = self._post("chat/completions", body | {"messages": list(text.messages)})
            return cut(answer["choices"][0]["message"]["content"], until)
        return cut(self._post("completions", body | {"prompt": text})["choices"][0]["text"], until)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Bounds on log p(continuation | context); whether greedy decoding would give it is not asked (False)."""
        pairs = [{"prompt": _prompt(context), "answer": text} for context, text in (r.args for r in requests)]
        parts = [pairs[i : i + PAIRS_AT_ONCE] for i in range(0, len(pairs), PAIRS_AT_ONCE)]
        found = self._each(lambda part: self._post("score", {**self.scoring, "pairs": part})["data"], parts)
        return [(entry["log_likelihood"], False) for part in found for entry in part]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Not offered: windows of a long text are cut by its tokens, which the server has."""
        raise ConfigError("rolling likelihoods (perplexity of whole texts) are measured in process: --model llada")

    def _each(self, work: Callable[[Given], Found], items: Iterable[Given]) -> list[Found]:
        with ThreadPoolExecutor(self.num_concurrent) as pool:
            return list(pool.map(work, items))

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The answer's JSON. A server that is full, or not there for a moment, is asked again; raises `ConfigError`."""
        given = {name: value for name, value in body.items() if value is not None} | {"model": self.model}
        for number in range(1, self.tries + 1):
            try:
                answer = requests.post(f"{self.url}/v1/{path}", json=given, headers=self.headers, timeout=self.timeout)
            except requests.ConnectionError as error:
                told = f"{self.url} does not answer ({type(error).__name__}); is `llada serve` running there?"
            else:
                if answer.ok:
                    return answer.json()
                told = f"{self.url}: {_message(answer)}"
                if answer.status_code not in (429, 503):
                    break
            if number < self.tries:
                time.sleep(min(30.0, 0.5 * 2**number))
        raise ConfigError(told)


def _prompt(context: str) -> str | Sequence[Message]:
    return list(context.messages) if isinstance(context, ChatText) else str(context)


def _message(answer: requests.Response) -> str:
    try:
        return f"{answer.status_code}: {answer.json()['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return f"{answer.status_code}: {answer.text[:200]}"
