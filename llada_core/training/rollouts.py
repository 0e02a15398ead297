"""Completions for policy optimisation: sample them, cut them at their end token, have them judged.

Knows prompts, the sampler and callables that judge; does not know losses or advantages.
"""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from llada_core.modeling import MaskPredictor
from llada_core.sampling import generate
from llada_core.sampling.params import SamplingParams
from llada_core.settings import ConfigError
from llada_core.tokenizer import Tokenizer
from llada_core.training.rewards import Reward, correct
from llada_core.verifiers import verifiable, verify_each

_log = logging.getLogger(__name__)


class PromptTable(Protocol):
    """Rows with `prompt_ids`, `task` and `answer` (JSON)."""

    def __len__(self) -> int: ...
    def __getitem__(self, rows: list[int]) -> dict[str, list[Any]]: ...


@dataclass(frozen=True)
class Prompt:
    """One problem: its token ids, its task's name and what the judge needs."""

    ids: list[int]
    task: str
    answer: Mapping[str, Any]


def prompts_of(table: PromptTable, rows: Sequence[int], longest: int | None = None) -> list[Prompt]:
    """Rows of a table as prompts; of more than `longest` tokens the last ones, which hold the question."""
    if not len(rows):
        return []
    columns = table[[int(row) for row in rows]]
    return [
        Prompt(_last(ids, longest), task, json.loads(answer))
        for ids, task, answer in zip(columns["prompt_ids"], columns["task"], columns["answer"], strict=True)
    ]


def _last(ids: Sequence[int], longest: int | None) -> list[int]:
    return list(ids) if longest is None else list(ids)[-longest:]


@dataclass(frozen=True)
class Sampled:
    """What a batch of prompts was answered: tokens (R, P + N), each left-padded to the longest prompt; texts; cost.

    scored, written (R, P + N) bool: the completion up to its first end token; the whole completion. ended (R,) bool:
    whether it has an end token.
    """

    tokens: Tensor
    attention: Tensor
    scored: Tensor
    written: Tensor
    ended: Tensor
    texts: list[str]
    forwards: int
    fed: int  # positions that went through the model, over all forwards

    def tensors(self) -> tuple[Tensor, ...]:
        """What has a row for each completion."""
        return self.tokens, self.attention, self.scored, self.written, self.ended


@torch.no_grad()
def sample(
    model: MaskPredictor,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    *,
    width: int | None = None,
) -> Sampled:
    """Answer every prompt once; `width` pads prompts to more than the longest of this batch."""
    generation = generate(model, [prompt.ids for prompt in prompts], params)
    answers = torch.stack([answer.cpu() for answer in generation.answers])
    longest = max(width or 0, *(len(prompt.ids) for prompt in prompts))
    new = answers.shape[1]
    tokens = torch.full((len(prompts), longest + new), tokenizer.special.pad_id)
    attention = torch.zeros_like(tokens)
    for i, prompt in enumerate(prompts):
        tokens[i, longest - len(prompt.ids) : longest] = torch.tensor(prompt.ids)
        attention[i, longest - len(prompt.ids) :] = 1
    tokens[:, longest:] = answers
    written = (torch.arange(longest + new) >= longest).expand(tokens.shape)
    ends = torch.isin(answers, torch.tensor(sorted(tokenizer.end_ids)))
    before = ends.cumsum(1) - ends.long() == 0
    scored = torch.cat([torch.zeros(len(prompts), longest, dtype=torch.bool), before], 1)
    texts = [tokenizer.answer_text(answer.tolist()) for answer in answers]
    return Sampled(tokens, attention, scored, written.clone(), ends.any(1), texts, generation.forwards, generation.fed)


@dataclass(frozen=True)
class Verdicts:
    """What each of R completions is worth: rewards (R,) float64, NaN where a row is to be dropped; right (R,) float64,
    1 or 0, NaN where the task has no verifier.
    """

    rewards: Tensor
    right: Tensor


def judge(reward: Reward, prompts: Sequence[Prompt], texts: Sequence[str]) -> Verdicts:
    """Verifier and reward of each completion, each called once; where the reward is the verifier's word, that is asked.

    Verifiers come first and programs side by side, so that a reward which runs the same tests finds them run. Rewards
    are called one after another: a person's function need not be safe in threads.
    """
    right = verified(prompts, texts)
    if reward is correct:
        without = sorted({prompt.task for prompt in prompts if not verifiable(prompt.task)})
        if without:
            raise ConfigError(
                f"grpo.reward is the verifier's word, and task {without[0]!r} has none: give the dotted path of a "
                "function (task, text, answer) -> float"
            )
        return Verdicts(right, right)
    values = [rewarded(reward, prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
    return Verdicts(torch.tensor(values, dtype=torch.float64), right)


def verified(prompts: Sequence[Prompt], texts: Sequence[str]) -> Tensor:
    """1 for a right text, 0 for a wrong one, NaN for a task without a verifier; (R,) float64."""
    cases = [(prompt.task, text, prompt.answer) for prompt, text in zip(prompts, texts, strict=True)]
    return torch.tensor([math.nan if r is None else float(r) for r in verify_each(cases)], dtype=torch.float64)


def rewarded(reward: Reward, prompt: Prompt, text: str) -> float:
    """One reward; NaN where the function raised or gave no finite number (logged, the run goes on).

    Raises `ConfigError` as the function does: a setting that is wrong for one row is wrong for all.
    """
    try:
        value = float(reward(prompt.task, text, prompt.answer))
    except ConfigError:
        raise
    except Exception as error:  # noqa: BLE001 - a person's reward may raise anything; the row is dropped and counted
        _log.warning("reward of task %s raised %s: %s; the row is dropped", prompt.task, type(error).__name__, error)
        return math.nan
    return value if math.isfinite(value) else math.nan


@dataclass(frozen=True)
class Specimen:
    """A held-out text to write anew at every validation: what the model is given, what it should say, how long."""

    prompt: list[int]
    expected: list[int]


def specimens_of(table: Any, count: int, longest: int | None = None) -> list[Specimen]:
    """The first rows of a validation table: the beginning that is never masked is given (a quarter of a row without prompts).

    Of a prompt of more than `longest` tokens the last ones, as in training.
    """
    specimens = []
    for row in table.select(range(min(count, len(table)))):
        ids = row.get("input_ids", row.get("prompt_ids"))
        maskable = row.get("maskable") or [int(i >= len(ids) // 4) for i in range(len(ids))]
        cut = len(ids) if "prompt_ids" in row else maskable.index(1)
        specimens.append(Specimen(_last(ids[:cut], longest), row.get("chosen_ids", ids[cut:])))
    return specimens


def write_samples(
    model: MaskPredictor, tokenizer: Tokenizer, specimens: Sequence[Specimen], settings: SamplingParams | None = None
) -> list[dict[str, Any]]:
    """One line per specimen: prompt, answer and what was expected, as text; greedy, at most 64 tokens and 32 steps."""
    lines = []
    for specimen in specimens:
        length = min(max(len(specimen.expected), 1), 64)
        params = settings or SamplingParams(
            max_new_tokens=length, block_length=length, steps=min(length, 32), schedule="linear"
        )
        answer = generate(model, [specimen.prompt], params).answers[0].tolist()
        texts = {"prompt": specimen.prompt, "answer": answer, "expected": specimen.expected}
        lines.append({name: tokenizer.decode(ids, skip_special=False) for name, ids in texts.items()})
    return lines
