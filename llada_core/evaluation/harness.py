"""lm-eval's language model on top of a mask predictor: `--model llada`.

Requests are batched across documents by length, finished answers are kept, ranks share the work (answering.py).
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string

from llada_core.evaluation.answering import (
    AnswerStore,
    Respond,
    Responder,
    Response,
    Shard,
    answer_all,
    from_arguments,
    keys_of,
)
from llada_core.evaluation.requests import ChatText, batches, cut, pairs, wanted
from llada_core.likelihood import CONFIDENCE, spans
from llada_core.settings import ConfigError
from llada_core.tokenizer import Message
from llada_core.usage import Usage

log = logging.getLogger(__name__)
NO_ANSWER: Response = {"text": "", "tokens": 0, "forwards": 0, "ll": 0.0, "greedy": False}
Pair = tuple[tuple[str, str], list[int], list[int]]
LOOKED_AT = 32  # likelihoods estimated twice, for the error of the estimator


class RequestBatch(NamedTuple):
    """Requests answered together, by their numbers: at most `forwards` of the model over `length` tokens of each."""

    numbers: list[int]
    length: int
    forwards: int


@register_model("llada", "llada_dist", "fastdllm_llada")  # the last two are LLaDA's, Fast-dLLM's and dllm's names
class LladaLM(TemplateLM):
    """A mask predictor that answers lm-eval's three kinds of requests."""

    def __init__(self, answerer: Responder, store: AnswerStore | None = None) -> None:
        super().__init__()
        self.answerer, self.tokenizer_, self.options = answerer, answerer.tokenizer, answerer.options
        self.block_length = answerer.model.block_length  # of the blocks by which it attends
        self.store = store or AnswerStore()
        self.new_tokens: list[int] = []  # of each generated answer, up to its end token
        self.forwards: list[int] = []  # that each generated answer took part in
        self.scored: list[tuple[Pair, float]] = []  # the first likelihoods
        self.cost = Cost()

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> Self:
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> Self:
        """From lm-eval's `--model_args`, in our names or those of the reference evaluators; or `ConfigError`."""
        given = {k: v for k, v in (additional_config or {}).items() if v is not None}
        if given.get("device") == "cuda:0":  # lm-eval's default, for every rank and on machines without a GPU
            del given["device"]
        return cls(*from_arguments({**given, **arg_dict}))

    # -- lm-eval's view of tokenizer and template -------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer_.special.eos_id

    @property
    def prefix_token_id(self) -> int:
        special = self.tokenizer_.special
        return special.eos_id if special.bos_id is None else special.bos_id

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer_.fast.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None) -> list[int]:
        return self.tokenizer_.encode(string, user=False)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self._template() if chat_template else None

    def apply_chat_template(self, chat_history: list[Message], add_generation_prompt: bool = True) -> ChatText:
        """The dialogue as text; without a generation prompt the last message is one that the reply continues."""
        self._template()
        begun = "" if add_generation_prompt else chat_history[-1]["content"]
        asked = chat_history if add_generation_prompt else chat_history[:-1]
        return ChatText(self.tokenizer_.chat_text(asked), asked) + begun

    def _template(self) -> str:
        template = self.tokenizer_.fast.chat_template
        if not isinstance(template, str):
            raise ConfigError("the model's tokenizer has no chat template; evaluate it with a recipe that needs none")
        return template

    # -- the three kinds of requests --------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts up to the end token or the first stop string."""
        settings, longest = self.options.settings, self.answerer.longest
        asked = wanted([r.args for r in requests], settings, self.tokenizer_, longest)
        lengths, kinds = [w.length for w in asked], [(w.params, bool(w.blanks)) for w in asked]
        groups = batches(lengths, kinds, self.options.batch_size)
        for line in sorted({line for p, _ in kinds for line in Usage(sampling=p).doubts(p, self.block_length)}):
            log.warning("%s", line)
        answers = self._answer(
            "generate_until",
            [r.args for r in requests],
            [
                RequestBatch(group, max(lengths[i] for i in group), asked[group[0]].params.most_steps)
                for group in groups
            ],
            lambda batch: self.answerer.generate([asked[i] for i in batch]),
        )
        self.new_tokens += [a["tokens"] for a in answers]
        self.forwards += [a["forwards"] for a in answers]
        return [cut(a["text"], w.until) for a, w in zip(answers, asked, strict=True)]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Bounds on log p(continuation | context) and whether greedy decoding would give it (if asked for)."""
        texts = [r.args for r in requests]
        encoded = pairs(texts, self.tokenizer_, self.prefix_token_id)
        return self._loglikelihood_tokens([(t, *pair) for t, pair in zip(texts, encoded, strict=True)])

    def _loglikelihood_tokens(self, requests: list[Pair], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        fitting = [self.answerer.fit(context, continuation) for _, context, continuation in requests]
        lengths = [len(context) + len(continuation) for context, continuation in fitting]
        groups = batches(lengths, [0] * len(fitting), self.options.batch_size)
        answers = self._answer(
            "loglikelihood",
            [text for text, _, _ in requests],
            [RequestBatch(group, max(lengths[i] for i in group), self._looks(group, fitting)) for group in groups],
            lambda batch: self.answerer.score([fitting[i] for i in batch]),
        )
        self.scored += zip(requests, (a["ll"] for a in answers), strict=True)
        del self.scored[LOOKED_AT:]
        return [(a["ll"], a["greedy"]) for a in answers]

    def _looks(self, group: Sequence[int], pairs_: Sequence[tuple[list[int], list[int]]]) -> int:
        """Masked copies of a continuation, at most: so many of each block that it lies in; by confidence one a token."""
        lengths = [(len(pairs_[i][0]), len(pairs_[i][1])) for i in group]
        if self.options.settings.estimator == CONFIDENCE:
            return max(length for _, length in lengths)
        return self.answerer.samples * max(len(spans(*each, self.block_length)) for each in lengths)

    def estimator_error(self) -> float | None:
        """Root mean square error of one log-likelihood, in nats: the first ones are estimated once more with another
        seed. None where there are too few, and of scores by confidence, which are drawn from nothing.
        """
        if len(self.scored) < LOOKED_AT or self.options.settings.estimator == CONFIDENCE:
            return None
        again = replace(self.answerer, options=replace(self.options, seed=self.options.seed + 1, check_greedy=False))
        pairs_ = [again.fit(context, continuation) for (_, context, continuation), _ in self.scored]
        size = self.options.batch_size
        parts = [again.score(pairs_[i : i + size]) for i in range(0, len(pairs_), size)]
        values = [answer["ll"] for part in parts for answer in part]
        squares = [(value - first) ** 2 / 2 for value, (_, first) in zip(values, self.scored, strict=True)]
        return math.sqrt(sum(squares) / len(squares))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood bounds of whole texts, in windows with half a window of context before each."""
        half = max(1, self.answerer.longest // 2)
        windows: list[Pair] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            (text,) = request.args
            for context, part in map(
                make_disjoint_window,
                get_rolling_token_windows(
                    token_list=self.tok_encode(text),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=half,
                    context_len=max(1, half // 2),
                ),
            ):
                windows.append(((f"{number}:{len(owners)}:{text[:80]}", text), context, part))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += value
        return totals

    # -- the work ---------------------------------------------------------------------------------------------

    def _answer(self, kind: str, arguments: Sequence[Any], groups: list[RequestBatch], work: Respond) -> list[Response]:
        keys = keys_of(kind, [[_said(argument) for argument in request] for request in arguments])
        self._announce([batch for batch in groups if any(keys[i] not in self.store for i in batch.numbers)])

        def work_and_tell(batch: Sequence[int]) -> list[Response]:
            answers = work(batch)
            for i, answer in zip(batch, answers, strict=True):
                value = answer["text"] if kind == "generate_until" else (answer["ll"], answer["greedy"])
                self.cache_hook.add_partial(kind, arguments[i], value)  # lm-eval's own --use_cache
            return answers

        answer_all([batch.numbers for batch in groups], keys, work_and_tell, self.store, patience=self.options.patience)
        return [self.store.get(key, NO_ANSWER) for key in keys]

    def _announce(self, groups: list[RequestBatch]) -> None:
        """Says what is left to do before it starts, at the rate of one measured forward; nothing where nobody reads it."""
        if groups and self.store.shard.rank == 0 and log.isEnabledFor(logging.INFO):
            rate = self.answerer.tokens_per_second(len(groups[0].numbers), groups[0].length)
            self.cost += Cost.of(groups, rate * self.store.shard.world)
            log.info("%s", self.cost)


def _said(argument: Any) -> Any:
    """An argument by all that its ids are made of: dialogues may read alike whose messages are not the same."""
    return [str(argument), argument.messages, argument.begun] if isinstance(argument, ChatText) else argument


@dataclass(frozen=True)
class Cost:
    """At most this much: an early stop, kept answers and few looks at short continuations save the rest."""

    answers: int = 0
    forwards: int = 0
    tokens: int = 0  # through the model
    hours: float = 0.0

    @classmethod
    def of(cls, groups: list[RequestBatch], rate: float) -> "Cost":
        """Of batches where so many tokens a second go through the model."""
        tokens = sum(len(batch.numbers) * batch.length * batch.forwards for batch in groups)
        answers, forwards = sum(len(batch.numbers) for batch in groups), sum(batch.forwards for batch in groups)
        return cls(answers, forwards, tokens, tokens / rate / 3600)

    def __add__(self, other: "Cost") -> "Cost":
        sums = (self.answers + other.answers, self.forwards + other.forwards, self.tokens + other.tokens)
        return Cost(*sums, self.hours + other.hours)

    def __str__(self) -> str:
        time = f"{self.hours:.2f} h" if self.hours >= 0.1 else f"{self.hours * 3600:.0f} s"
        return f"{self.answers:,} answers, at most {self.forwards:,} forwards over {self.tokens:,} tokens, about {time}"


class EstimatingLM(LladaLM):
    """Answers nothing and adds up what answering would cost at `rate` tokens a second; None: as measured by a forward on
    each of the processes that share the work."""

    def __init__(self, answerer: Responder, rate: float | None = None) -> None:
        super().__init__(answerer)
        self.rate = rate

    def _answer(self, kind: str, arguments: Sequence[Any], groups: list[RequestBatch], work: Respond) -> list[Response]:
        if groups:
            own = self.rate or self.answerer.tokens_per_second(len(groups[0].numbers), groups[0].length)
            self.cost += Cost.of(groups, own if self.rate else own * Shard.of_process().world)
        return [NO_ANSWER] * len(arguments)
