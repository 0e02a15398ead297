"""Which proposals become tokens in a step: rules and schedules, by name, and the step's choice.

Shapes: B rows, W positions.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from llada_core.sampling.canvas import Blocks, Canvas
from llada_core.sampling.params import SamplingParams
from llada_core.sampling.proposals import CONFIDENCES, Confidence, RowNoise, Score, gumbel_argmax, probability

Schedule = Callable[[Tensor, Tensor], Tensor]  # open positions (A,), steps (A,) -> counts (A, S)
# (A, T), -inf where nothing can be committed; quota (A,), None without a schedule -> commit (A, T) bool
Rule = Callable[[Confidence, Tensor | None], Tensor]


def even_quotas(open_A: Tensor, steps_A: Tensor) -> Tensor:
    """As even as whole numbers allow, the first steps one more (LLaDA's transfer schedule).

    A row with fewer open positions than steps is done before its zeros come, where LLaDA goes on spending forwards.
    """
    step = torch.arange(int(steps_A.max()), device=open_A.device)
    base, extra = open_A // steps_A, open_A % steps_A
    return (base[:, None] + (step < extra[:, None])) * (step < steps_A[:, None])


def linear_noise(t: Tensor) -> Tensor:
    """The chance that a token is masked at time t under the linear noise schedule, rounded as 1 - alpha(t)."""
    return 1 - (1 - t)


def cosine_noise(t: Tensor) -> Tensor:
    """The chance that a token is masked at time t under the cosine noise schedule (MDLM), rounded likewise."""
    return 1 - (1 - (math.pi / 2 * (1 - t)).cos())


def expected_quotas(open_A: Tensor, steps_A: Tensor, *, noise: Callable[[Tensor], Tensor]) -> Tensor:
    """What the reverse process from time 1 to 0 uncovers on average, rounded; empty steps are left out."""
    left = open_A.clone()
    counts = []
    for step in range(int(steps_A.max())):
        # 1 - alpha in float32, as in dllm: which way a half is rounded hangs on it.
        t = ((steps_A - step).double() / steps_A).clamp(min=0.0).float()
        s = ((steps_A - step - 1).double() / steps_A).clamp(min=0.0).float()
        share = torch.where(s > 0, 1 - (noise(s) / noise(t)).double(), 1.0)
        counts.append(torch.minimum((left.double() * share).round().long(), left))
        left = left - counts[-1]
    return without_zeros(torch.stack(counts, dim=1))


def drawn_quotas(uniforms_AN: Tensor, steps_A: Tensor, *, noise: Callable[[Tensor], Tensor]) -> Tensor:
    """The reverse process itself: each of N open positions is uncovered at a time of its own, drawn by its uniform.

    Counts over the positions are binomial with chance 1 - noise(s) / noise(t) of those still masked (nan: no position).
    """
    span = int(steps_A.max())
    level = torch.arange(span, 0, -1, device=steps_A.device).double() - (
        span - steps_A[:, None]
    )  # steps left at each step
    s = ((level - 1) / steps_A[:, None]).clamp(min=0.0)
    masked_after = torch.where(s > 0, noise(s), 0.0)
    # A position whose uniform lies in [after, before) goes at that step.
    step = (uniforms_AN[:, :, None] < masked_after[:, None, :]).sum(-1)
    real = ~uniforms_AN.isnan()
    counts = torch.zeros(len(steps_A), span + 1, dtype=torch.long, device=steps_A.device)
    counts.scatter_add_(1, torch.where(real, step, span), real.long())
    return without_zeros(counts[:, :span])


def without_zeros(counts_AS: Tensor) -> Tensor:
    """Each row's counts above zero, first: the model does not know time, so an empty step changes nothing."""
    order = (counts_AS == 0).to(torch.int8).argsort(dim=1, stable=True)
    return counts_AS.gather(1, order)


def top_quota(confidence: Confidence, quota: Tensor | None) -> Tensor:
    """The `quota` surest of each row; of equal ones the leftmost."""
    if quota is None:
        raise ValueError("top_quota needs a schedule")
    return (ranks(confidence.key) < quota[:, None]) & (confidence.key > -torch.inf)


def above(confidence: Confidence, quota: Tensor | None, *, threshold: float) -> Tensor:
    """Every value of at least `threshold`, and the surest one in any case (Fast-dLLM)."""
    return ((confidence.value >= threshold) | (ranks(confidence.key) == 0)) & (confidence.key > -torch.inf)


def within_factor(confidence: Confidence, quota: Tensor | None, *, factor: float) -> Tensor:
    """The r-th surest if its value is 1 - factor/(r + 1) or more, and the surest in any case (Fast-dLLM's factor)."""
    rank = ranks(confidence.key)
    return ((rank == 0) | (confidence.value >= 1 - factor / (rank + 2))) & (confidence.key > -torch.inf)


def within_entropy(confidence: Confidence, quota: Tensor | None, *, bound: float) -> Tensor:
    """The longest run of lowest entropies whose sum without the largest is within `bound` (arXiv:2505.24857).

    `confidence` is that of `certainty`: keys are minus the logarithms of the entropies.
    """
    ordered, order = confidence.key.sort(dim=-1, descending=True, stable=True)
    before = (-ordered).exp().cumsum(-1).roll(1, dims=-1)
    before[:, 0] = 0.0
    return torch.zeros_like(order, dtype=torch.bool).scatter(1, order, before <= bound) & (confidence.key > -torch.inf)


def ranks(scores: Tensor) -> Tensor:
    """0 for the highest of a row; equal scores rank by position, which depends on neither batch nor device."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)


NOISES = {"linear": linear_noise, "cosine": cosine_noise}


def schedule_of(params: SamplingParams) -> Schedule:
    """The schedule that `params` name; a stochastic one takes uniforms (A, N) in place of counts (A,)."""
    if params.schedule == "even":
        return even_quotas
    quotas = drawn_quotas if params.stochastic_transfer else expected_quotas
    return partial(quotas, noise=NOISES[params.schedule])


def rule_of(params: SamplingParams) -> Rule:
    """The rule that `params` name."""
    if params.threshold is not None:
        return partial(above, threshold=params.threshold)
    if params.factor is not None:
        return partial(within_factor, factor=params.factor)
    if params.entropy_bound is not None:
        return partial(within_entropy, bound=params.entropy_bound)
    return top_quota


@dataclass
class Pace:
    """The counts of every active row's block. A rows, S steps.

    `steps` (A,) is each row's budget for one block; with `draw` the schedule is given uniforms (A, N), nan where there
    is no position, in place of counts (A,).
    """

    schedule: Schedule
    steps: Tensor
    draw: bool = False
    counts: Tensor = field(init=False)
    taken: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.taken = torch.zeros_like(self.steps)
        self.counts = self.steps.new_zeros(len(self.steps), int(self.steps.max()))

    def next(self, blocks: Blocks, noise: RowNoise) -> Tensor:
        """(A,) counts of the step that is about to be taken."""
        if any(blocks.entered):
            new = torch.tensor(blocks.entered, device=self.steps.device)
            fresh = self.schedule(self._material(blocks, noise), self.steps)
            fresh = F.pad(fresh, (0, self.counts.shape[1] - fresh.shape[1]))
            self.counts = torch.where(new[:, None], fresh, self.counts)
            self.taken = torch.where(new, 0, self.taken)
        count = self.counts.gather(1, self.taken[:, None])[:, 0]
        self.taken = self.taken + 1
        return count

    def _material(self, blocks: Blocks, noise: RowNoise) -> Tensor:
        device = self.steps.device
        if not self.draw:
            return torch.tensor(blocks.counts, device=device)
        drawn = [count * new for count, new in zip(blocks.counts, blocks.entered, strict=True)]
        real = torch.arange(max(drawn), device=device) < torch.tensor(drawn, device=device)[:, None]
        uniforms = torch.full(real.shape, torch.nan, dtype=torch.float64, device=device)
        return uniforms.masked_scatter(real, noise.uniforms(drawn, 1))

    def keep(self, rows: list[int]) -> None:
        """Only these of the active rows go on."""
        index = torch.tensor(rows, device=self.steps.device)
        self.steps, self.counts, self.taken = self.steps[index], self.counts[index], self.taken[index]


def pace_of(params: SamplingParams, canvas: Canvas) -> Pace | None:
    """Each row's steps shared by its blocks, rounded up; None where confidence alone says how much is committed."""
    if params.parallel:
        return None
    blocks = (canvas.end - canvas.start + params.block_length - 1) // params.block_length
    steps = (params.steps + blocks - 1) // blocks
    return Pace(schedule_of(params), steps, draw=params.stochastic_transfer)


CHUNK = 1 << 28
"""Logits looked at together; with more, rows are taken one by one so that the copies made here stay small."""


@dataclass(frozen=True)
class Choice:
    """Everything that turns logits into committed tokens."""

    score: Score
    rule: Rule
    temperature: float
    never: Tensor
    forbidden: Tensor
    deferred: Tensor
    needs_chance: bool

    @classmethod
    def of(cls, params: SamplingParams, mask_id: int, device: torch.device) -> "Choice":
        """The values that `params` name."""

        def ids(values: tuple[int, ...]) -> Tensor:
            return torch.tensor(values, dtype=torch.long, device=device)

        return cls(
            score=CONFIDENCES[params.remasking],
            rule=rule_of(params),
            temperature=params.temperature,
            never=ids((mask_id,)),
            forbidden=ids(params.forbid_tokens),
            deferred=ids(params.defer_tokens),
            needs_chance=params.remasking == "random",
        )

    def propose(self, logits: Tensor, noise: RowNoise | None, counts: list[int]) -> tuple[Tensor, Confidence]:
        """Tokens (P,) and their confidences (P,) from logits (P, V), `counts` of which belong to each row in turn.

        Without noise the likeliest tokens. MASK is never proposed, yet its probability counts against the proposal, as
        in the references.
        """
        if noise is None or logits.numel() <= CHUNK:
            return self._propose(logits, noise, counts)
        parts, at = [], 0
        for row, count in enumerate(counts):  # a row's numbers are its own, so rows may be taken apart
            only = [count if i == row else 0 for i in range(len(counts))]
            parts.append(self._propose(logits[at : at + count], noise, only))
            at += count
        tokens, found = zip(*parts, strict=True)
        return torch.cat(tokens), Confidence(torch.cat([c.value for c in found]), torch.cat([c.key for c in found]))

    def _propose(self, logits: Tensor, noise: RowNoise | None, counts: list[int]) -> tuple[Tensor, Confidence]:
        logits = logits.float()
        if len(self.forbidden):
            logits = logits.index_fill(-1, self.forbidden, -torch.inf)
        possible = logits.index_fill(-1, self.never, -torch.inf)
        if noise is None or not self.temperature:
            tokens = possible.argmax(-1)
        else:
            tokens = gumbel_argmax(possible, self.temperature, noise.uniforms(counts, logits.shape[-1]))
        uniforms = noise.uniforms(counts, 1)[:, 0] if self.needs_chance and noise is not None else None
        score = probability if self.needs_chance and uniforms is None else self.score
        if len(self.deferred):
            logits = logits.index_fill(-1, self.deferred, -torch.inf)
        confidence = score(logits, tokens, uniforms)
        if len(self.deferred):
            confidence = confidence.lowest_where(torch.isin(tokens, self.deferred))
        return tokens, confidence
