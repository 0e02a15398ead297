"""Which proposals are committed: schedules say how many, rules say which.

A schedule is a function (open positions, steps) -> counts; a rule is a function (confidence, quota) -> positions to
commit: keys say who comes first, values whether that is sure enough.
Neither knows tokens, models or blocks. Adding one is one function, one line in `rule_of` or `SCHEDULES`, and one test.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from llada_core.sampling.params import SamplingParams
from llada_core.sampling.proposals import Confidence

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
