"""Completions of the policy, judged by rewards, and the arithmetic of their probabilities.

Shapes: B completions, L positions of a row, C positions of a completion.
"""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llada_core.diffusion import masked_nll
from llada_core.modeling import MaskPredictor
from llada_core.sampling import generate
from llada_core.sampling.params import SamplingParams
from llada_core.settings import ConfigError
from llada_core.tokenizer import Tokenizer
from llada_core.training.params import GRPOParams
from llada_core.training.rewards import Reward, correct
from llada_core.training.trajectory import local_steps, row_width, traced
from llada_core.verifiers.answers import verifiable, verify_each

# What follows are pure functions of tensors: token log-probabilities under chosen masks, advantages, clipped losses.


@dataclass(frozen=True)
class Completions:
    """Sampled sequences: tokens (R, T) int64, attention (R, T) 1/0, scored (R, T) bool (completion up to its first end
    token, which is included), written (R, T) bool (the whole completion), advantages (R,) float32; `when` (R, T) int64, the
    step at which each position was written, where that is known (see `trajectory`).
    """

    tokens: Tensor
    attention: Tensor
    scored: Tensor
    written: Tensor
    advantages: Tensor
    when: Tensor | None = None

    def rows(self, index: Tensor | slice) -> "Completions":
        """Some of the rows."""
        return replace(self, **{name: x[index] for name, x in self.tensors().items()})

    def columns(self, kept: slice) -> "Completions":
        """Some of the columns."""
        return replace(self, **{name: x[:, kept] for name, x in self.tensors().items() if x.ndim == 2})

    def tensors(self) -> dict[str, Tensor]:
        """What is known, by name."""
        return {name: x for name, x in vars(self).items() if x is not None}


@dataclass(frozen=True)
class Masks:
    """What the log-probabilities are taken under: `masked` (R, T) bool, hidden; `asked` (R, T) bool, those hidden positions
    whose tokens are scored; each row's `weight` (R,). Rows hold `samples` copies of every completion, one after another.
    """

    masked: Tensor
    asked: Tensor
    weight: Tensor
    samples: int


def masks_for(params: GRPOParams, rows: Completions, uniforms: Tensor, ratio: Tensor) -> Masks:
    """The masks of one update; `uniforms` (R, T) and `ratio` (R,) in (0, 1] are the update's random numbers.

    one_forward (d1, arXiv:2504.12216): the whole completion and a share of the prompt. elbo (LLaDA eq. 3, used by ESPO
    and SPG): each token of the completion with probability `ratio`, weighted by its inverse.
    """
    if params.likelihood == "one_forward":
        # Hiding a share of the prompt varies what one forward sees, so that updates on one rollout do not repeat each other.
        prompt = ~rows.written & rows.attention.bool()
        hidden = rows.written | (prompt & (uniforms < params.mask_prompt))
        return Masks(hidden, hidden, torch.ones_like(ratio), 1)
    hidden = rows.written & (uniforms < ratio[:, None])
    return Masks(hidden, hidden, 1 / ratio, params.mask_samples)


def trace_masks(params: GRPOParams, rows: Completions, block_length: int, number: Tensor, samples: int) -> Masks:
    """The canvases on which tokens were chosen: row i's is that of step `number`[i] (R,) of each block, of `samples` steps.

    Every scored token is asked for in one of the copies. With `merge_steps` so many neighbouring steps are one, on the
    canvas of the first (TraceRL's shrinkage).
    """
    assert rows.when is not None
    steps = local_steps(rows.when, block_length) // params.merge_steps
    hidden = rows.written & (steps >= number[:, None])
    # By sequence copies are averaged, and here they are parts of one sum.
    weight = samples if params.ratio == "sequence" else 1
    asked = rows.written & (steps == number[:, None])
    return Masks(hidden, asked, torch.full((len(steps),), float(weight)), samples)


def token_log_probabilities(
    model: nn.Module, rows: Completions, masks: Masks, mask_id: int, block_length: int | None = None
) -> Tensor:
    """log p(token) under the masks at scored and asked positions, (R, T) float32; zero elsewhere.

    `block_length`: of a model that attends by blocks; each then sees those before it as they were written.
    """
    noisy = torch.where(masks.masked, mask_id, rows.tokens)
    # A visible token has probability 1 under its own canvas and would only dilute the loss.
    chosen = rows.scored & masks.asked
    # The vocabulary is asked only where a token is scored: at 126,464 entries the head costs more than a layer.
    nll = masked_nll(model, noisy, rows.tokens, chosen, rows.attention, block_length=block_length).nll
    index = chosen.flatten().nonzero()[:, 0].to(nll.device, non_blocking=True)
    empty = torch.zeros(chosen.numel(), dtype=nll.dtype, device=nll.device)
    return empty.index_copy(0, index, -nll).view(chosen.shape)


def group_advantages(rewards: Tensor, valid: Tensor, params: GRPOParams) -> Tensor:
    """Advantages (prompts, G) of rewards (prompts, G) over the valid completions of each group; zero for invalid ones.

    Not divided by the group's standard deviation unless asked (Dr. GRPO, arXiv:2503.20783; d1 as run by dllm).
    """
    # A group of which nothing was judged has no mean; one in the denominator keeps its zeros from becoming NaN.
    count = valid.sum(1, keepdim=True).clamp(min=1)
    mean = torch.where(valid, rewards, 0.0).sum(1, keepdim=True) / count
    advantages = torch.where(valid, rewards - mean, 0.0)
    if params.scale_rewards:
        # Of a sample, with n - 1, as torch and TRL take it; a group of equal rewards has none, hence the small addend.
        variance = advantages.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)
        advantages = advantages / (variance.sqrt() + 1e-4)
    # Under masks a wrong token can be pushed down without end (its log-probability has no floor), a right one not above 1.
    return torch.where(advantages < 0, advantages * params.negative_weight, advantages)


@dataclass(frozen=True)
class PolicyLoss:
    """Sum to be divided by the step's count, and sums to log: KL, clipped and counted tokens (or rows)."""

    sum: Tensor
    kl: Tensor
    clipped: Tensor
    counted: Tensor


def policy_loss(
    params: GRPOParams, now: Tensor, old: Tensor, reference: Tensor | None, rows: Completions, masks: Masks
) -> PolicyLoss:
    """The clipped objective: -min(r A, clip(r) A) + beta KL, summed over scored tokens (ratio token) or rows (sequence).

    now, old, reference: (R, T) log-probabilities under the same masks. With ratio "sequence" r is the exponential of the
    mean difference of a row's likelihood bounds per token (ESPO), those of the copies of a completion averaged first.
    KL: `divergence`.
    """
    device = now.device
    weight = (masks.weight[:, None] * (rows.scored & masks.asked)).to(device, non_blocking=True)
    advantages = rows.advantages.to(device, non_blocking=True)[:, None]
    # log p(reference) - log p(policy): the sign that the k3 estimate below wants.
    gap = None if reference is None else reference - now
    kl = torch.zeros_like(now) if gap is None else divergence(gap) * weight
    difference = now - old
    if params.ratio == "sequence":
        samples = masks.samples
        # Per token before the exponential: a ratio of whole sequences overflows or vanishes with their length.
        lengths = rows.scored.sum(1, keepdim=True).clamp(min=1).to(device, non_blocking=True)
        difference, kl, advantages = (
            x.sum(1).view(samples, -1).mean(0) for x in (difference * weight / lengths, kl / lengths, advantages)
        )
        counts = rows.scored.any(1).view(samples, -1)[0]  # a row that nothing of is scored counts nowhere
        weight = counts.to(difference, non_blocking=True)
    ratio = difference.exp()
    low, high = 1 - params.epsilon, 1 + params.epsilon
    # The smaller of the two never rewards a step beyond the clip, and never forgives one in the wrong direction.
    losses = -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages) * weight
    # Only where the clip is what holds the gradient back; the other two corners pass it on.
    clipped = (((ratio < low) & (advantages < 0)) | ((ratio > high) & (advantages > 0))) & (weight > 0)
    return PolicyLoss(
        losses.sum() + params.beta * kl.sum(), kl.sum().detach(), clipped.sum().detach(), (weight > 0).sum().detach()
    )


def divergence(gap: Tensor) -> Tensor:
    """The estimate exp(gap) - gap - 1 of the KL, of a token's log p(reference) - log p(policy); a line beyond a nat.

    A sampled token is often unlikely under random masks. The gradient exp(gap) - 1 of the few that have become much
    less likely outweighed that of all others and of the rewards together; so it ends at e - 1.
    """
    near = gap.clamp(max=1.0)
    return near.exp() * (1 + gap - near) - gap - 1


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
class RolloutSample:
    """What a batch of prompts was answered: tokens (R, T), each left-padded to the longest prompt, of a trajectory padded on
    the right alone; texts; cost.

    scored, written (R, T) bool: the completion up to its first end token; the whole completion. ended (R,) bool: whether it
    has an end token. when (R, T) int64: see `Completions`; -1 everywhere where nobody noted it.
    """

    tokens: Tensor
    attention: Tensor
    scored: Tensor
    written: Tensor
    ended: Tensor
    texts: list[str]
    forwards: int
    fed: int  # positions that went through the model, over all forwards
    when: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        """What has a row for each completion."""
        return self.tokens, self.attention, self.scored, self.written, self.when, self.ended


@torch.no_grad()
def sample(
    model: MaskPredictor,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    *,
    width: int | None = None,
    at_once: int | None = None,
) -> RolloutSample:
    """Answer every prompt once, so many `at_once`; `width` pads prompts to more than the longest of these."""
    generation = generate(model, [prompt.ids for prompt in prompts], params, at_once=at_once)
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
    before, ended = _up_to_the_end(answers, tokenizer)
    scored = torch.cat([torch.zeros(len(prompts), longest, dtype=torch.bool), before], 1)
    # Judged as a reader would see it: what follows the first end is no part of the answer.
    texts = [tokenizer.answer_text(answer.tolist()) for answer in answers]
    cost = generation.forwards, generation.fed
    return RolloutSample(tokens, attention, scored, written.clone(), ended, texts, *cost, torch.full_like(tokens, -1))


def _up_to_the_end(answers: Tensor, tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """(R, N) bool, true up to the first end token of each answer and at it; (R,) bool, whether there is one."""
    ends = torch.isin(answers, torch.tensor(sorted(tokenizer.end_ids)))
    # Counted up to and with itself, less itself: zero up to the first end token and at it.
    return ends.cumsum(1) - ends.long() == 0, ends.any(1)


def sample_traced(  # noqa: PLR0913 - as `sample`
    model: MaskPredictor,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    *,
    width: int,
    at_once: int | None = None,
    as_chosen: bool = True,
) -> RolloutSample:
    """As `sample`, with the steps at which tokens were written; rows begin at column 0, from which blocks are counted.

    `as_chosen`: tokens behind an end that a stop overwrote stay as they were while others were chosen beside them.
    """
    new, columns = params.max_new_tokens, row_width(width, params, model)
    trace = traced(model, [prompt.ids for prompt in prompts], params, width=columns, at_once=at_once)
    places, tokens = torch.arange(columns), trace.chosen.clone()
    lengths = torch.tensor(
        [[len(prompt.ids), len(answer.request.tokens)] for prompt, answer in zip(prompts, trace.answers, strict=True)]
    )
    finals = []
    for row, answer in zip(tokens, trace.answers, strict=True):
        assert answer.tokens is not None
        if not as_chosen:
            row[: len(answer.tokens)] = answer.tokens.cpu()
        start = answer.request.start
        finals.append(answer.tokens[start : start + new].cpu())
    attention = places < lengths[:, 1:]
    written = attention & (places >= lengths[:, :1])
    before, ended = _up_to_the_end(torch.stack(finals), tokenizer)
    scored = written & (places < lengths[:, :1] + before.sum(1, keepdim=True))
    texts = [tokenizer.answer_text(final.tolist()) for final in finals]
    return RolloutSample(tokens, attention.long(), scored, written, ended, texts, trace.forwards, trace.fed, trace.when)


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
                f"grpo.reward is the verifier's word, and task {without[0]!r} has none: give a function (task, "
                "text, answer) -> float of your own, as ./my_reward.py:function"
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
class ValidationSample:
    """A held-out text to write anew at every validation: what the model is given, what it should say, how long."""

    prompt: list[int]
    expected: list[int]


def specimens_of(table: Any, count: int, longest: int | None = None) -> list[ValidationSample]:
    """The first rows of a validation table: the beginning that is never masked is given (a quarter of a row without prompts).

    Of a prompt of more than `longest` tokens the last ones, as in training.
    """
    specimens = []
    for row in table.select(range(min(count, len(table)))):
        ids = row.get("input_ids", row.get("prompt_ids"))
        maskable = row.get("maskable") or [int(i >= len(ids) // 4) for i in range(len(ids))]
        cut = len(ids) if "prompt_ids" in row else maskable.index(1)
        specimens.append(ValidationSample(_last(ids[:cut], longest), row.get("chosen_ids", ids[cut:])))
    return specimens


def write_samples(
    model: MaskPredictor,
    tokenizer: Tokenizer,
    specimens: Sequence[ValidationSample],
    settings: SamplingParams | None = None,
) -> list[dict[str, Any]]:
    """One line per specimen: prompt, answer and what was expected, as text; greedy, at most 64 tokens and 32 steps."""
    lines = []
    for specimen in specimens:
        length = min(max(len(specimen.expected), 1), 64)
        block = model.block_length
        usual = (
            SamplingParams(max_new_tokens=length, block_length=length, steps=min(length, 32), schedule="linear")
            if block is None
            else SamplingParams(length, block, block, sampler="llada2.0", threshold=0.95, cache="prefix")
        )
        params = settings or usual
        answer = generate(model, [specimen.prompt], params).answers[0].tolist()
        texts = {"prompt": specimen.prompt, "answer": answer, "expected": specimen.expected}
        lines.append({name: tokenizer.decode(ids, skip_special=False) for name, ids in texts.items()})
    return lines
