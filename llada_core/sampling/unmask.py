"""Which proposals become tokens in a step, and which tokens become masks again: rules and transfer schedules, by name.

Shapes: B rows, W positions of a block, S steps of a block.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from llada_core.sampling.params import SamplingParams
from llada_core.sampling.proposals import Confidence
from llada_core.settings import function_at

State = dict[str, Tensor]
"""What a rule remembers of each row's present block: tensors of B rows, by name. The loop drops the rows that have
finished and sets a row to zero when it enters another block; at the very first step there is nothing in it.
"""

Rule = Callable[[Confidence, Tensor, State], tuple[Tensor, Tensor | None, State]]
"""(scores, open positions, state) -> (commit, take back, state): a pure function without host synchronisations.

scores: `value` and `key` (B, W), -inf where nothing is open. open positions: (B, W) bool. commit: (B, W) bool, which
of the open positions keep what was proposed (one that edits: of all positions). take back: (B, W) bool, which tokens of the block become MASK again;
None from a rule that never takes one back. W is the same in all steps of a generation.
"""

Transfer = Callable[[Tensor, Tensor, int], Tensor]  # open positions (B,), steps (B,), their most S -> counts (B, S)


def even_transfer(open_B: Tensor, steps_B: Tensor, span: int) -> Tensor:
    """As even as whole numbers allow, the first steps one more (LLaDA's transfer schedule).

    A row with fewer open positions than steps is done before its zeros come, where LLaDA goes on spending forwards.
    """
    step = torch.arange(span, device=open_B.device)
    base, extra = open_B // steps_B, open_B % steps_B
    return (base[:, None] + (step < extra[:, None])) * (step < steps_B[:, None])


def linear_noise(t: Tensor) -> Tensor:
    """The chance that a token is masked at time t under the linear noise schedule, rounded as 1 - alpha(t)."""
    return 1 - (1 - t)


def cosine_noise(t: Tensor) -> Tensor:
    """The chance that a token is masked at time t under the cosine noise schedule (MDLM), rounded likewise."""
    return 1 - (1 - (math.pi / 2 * (1 - t)).cos())


def expected_transfer(open_B: Tensor, steps_B: Tensor, span: int, *, noise: Callable[[Tensor], Tensor]) -> Tensor:
    """What the reverse process from time 1 to 0 uncovers on average, rounded; empty steps are left out."""
    left = open_B.clone()
    counts = []
    for step in range(span):
        # 1 - alpha in float32, as in dllm: which way a half is rounded hangs on it.
        t = ((steps_B - step).double() / steps_B).clamp(min=0.0).float()
        s = ((steps_B - step - 1).double() / steps_B).clamp(min=0.0).float()
        # From t to s a masked token stays masked with chance noise(s) / noise(t) (SMDM, arXiv:2410.18514); at s = 0
        # all go, which the quotient says only up to rounding.
        share = torch.where(s > 0, 1 - (noise(s) / noise(t)).double(), 1.0)
        counts.append(torch.minimum((left.double() * share).round().long(), left))
        left = left - counts[-1]
    return without_zeros(torch.stack(counts, dim=1))


def sampled_transfer(uniforms_BN: Tensor, steps_B: Tensor, span: int, *, noise: Callable[[Tensor], Tensor]) -> Tensor:
    """The reverse process itself: each of N open positions is uncovered at a time of its own, drawn by its uniform.

    Counts over the positions are binomial with chance 1 - noise(s) / noise(t) of those still masked (nan: no position).
    """
    # Rows may have budgets of different lengths: `level` counts each row's remaining steps, zero or less past its end.
    level = torch.arange(span, 0, -1, device=steps_B.device).double() - (span - steps_B[:, None])
    s = ((level - 1) / steps_B[:, None]).clamp(min=0.0)
    masked_after = torch.where(s > 0, noise(s), 0.0)
    # A position whose uniform lies in [after, before) goes at that step: the number of levels that its uniform is still
    # below is the number of steps it outlasts. One draw a position gives all steps at once, with the right law.
    step = (uniforms_BN[:, :, None] < masked_after[:, None, :]).sum(-1)
    real = ~uniforms_BN.isnan()
    counts = torch.zeros(len(steps_B), span + 1, dtype=torch.long, device=steps_B.device)
    counts.scatter_add_(1, torch.where(real, step, span), real.long())  # what is no position goes to a column cut off
    return without_zeros(counts[:, :span])


def without_zeros(counts_BS: Tensor) -> Tensor:
    """Each row's counts above zero, first: the model does not know time, so an empty step changes nothing."""
    order = (counts_BS == 0).to(torch.int8).argsort(dim=1, stable=True)
    return counts_BS.gather(1, order)


def top_k(scores: Confidence, is_open: Tensor, state: State) -> tuple[Tensor, None, State]:
    """The surest of each row, as many as its schedule gives to this step; of equal ones the leftmost.

    The state is what `TransferSchedule.begin` puts there.
    """
    counts, step = state["counts"], state["step"]
    count = counts.gather(1, step.clamp(max=counts.shape[1] - 1)[:, None])  # a row that writes nothing has no last step
    return is_open & (ranks(scores.key) < count), None, {**state, "step": step + 1}


def threshold(
    scores: Confidence, is_open: Tensor, state: State, *, value: float | Tensor
) -> tuple[Tensor, None, State]:
    """Every confidence of at least `value`, and the surest one in any case (Fast-dLLM)."""
    return is_open & ((scores.value >= value) | (ranks(scores.key) == 0)), None, state


def factor(scores: Confidence, is_open: Tensor, state: State, *, value: float | Tensor) -> tuple[Tensor, None, State]:
    """The r-th surest if its confidence is 1 - value/(r + 1) or more, and the surest in any case (Fast-dLLM)."""
    rank = ranks(scores.key)  # from 0, so that r is rank + 1
    return is_open & ((rank == 0) | (scores.value >= 1 - value / (rank + 2))), None, state


def entropy_bound(
    scores: Confidence, is_open: Tensor, state: State, *, value: float | Tensor
) -> tuple[Tensor, None, State]:
    """The longest run of lowest entropies whose sum without the largest is within `value` nats (arXiv:2505.24857).

    `scores` are those of `negative_entropy`: keys are minus the logarithms of the entropies.
    """
    ordered, order = scores.key.sort(dim=-1, descending=True, stable=True)
    # Tokens written together err by no more than the sum of their entropies without the largest. In rising order the
    # largest is the last, so what counts at each place is the sum of those before it: the first is always written.
    before = (-ordered).exp().cumsum(-1).roll(1, dims=-1)
    before[:, 0] = 0.0
    return is_open & torch.zeros_like(is_open).scatter(1, order, before <= value), None, state


def quota(
    scores: Confidence, is_open: Tensor, state: State, *, value: float, least: tuple[int, int]
) -> tuple[Tensor, None, State]:
    """LLaDA2.0's: every confidence above `value`, or the surest where these are fewer than the quota of the step.

    least: (n, m), a quota of n, in the first m steps of a block one more.
    """
    step = state.get("step", torch.zeros_like(is_open[:, 0], dtype=torch.long))
    return _above(scores, is_open, value, least[0] + (step < least[1])), None, {**state, "step": step + 1}


def edit(  # noqa: PLR0913 - a rule and its four numbers
    scores: Confidence, is_open: Tensor, state: State, *, value: float, editing: float, least: int, most: int
) -> tuple[Tensor, None, State]:
    """LLaDA2.1's: as `quota` of `least` in every step; and tokens of the block give way to others surer than `editing`.

    `scores` are also those of written positions at which something else is proposed. A row is held in its block, whole or
    not, until a look at the whole block changes nothing, for at most `most` looks after it became whole.
    """
    written = _above(scores, is_open, value, torch.full_like(is_open[:, 0], least, dtype=torch.long))
    edited = ~is_open & (scores.value > editing)
    whole = ~(is_open & ~written).any(1)
    looks = state.get("looks", torch.zeros_like(whole, dtype=torch.long)) + whole
    held = whole & (looks <= most) & (is_open.any(1) | edited.any(1))
    return written | edited, None, {**state, "looks": looks, HELD: held}


HELD = "held"
"""In the state of a rule that edits: (B,) bool, the rows that stay in their block though nothing is open in it."""


def _above(scores: Confidence, is_open: Tensor, value: float, least: Tensor) -> Tensor:
    """Open positions surer than `value`, or the `least` (B,) surest where these are fewer."""
    sure = is_open & (scores.value > value)
    surest = is_open & (ranks(scores.key.masked_fill(~is_open, -torch.inf)) < least[:, None])
    return torch.where(sure.sum(1, keepdim=True) >= least[:, None], sure, surest)


def ranks(scores: Tensor) -> Tensor:
    """0 for the highest of a row; equal scores rank by position, which depends on neither batch nor device."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)


def ending(rule: Rule) -> Rule:
    """`rule`, a stranger's, held to the end of every block: n masks take at most 2n steps.

    A step commits the surest position where the rule commits none. Only tokens that the block began without may be
    taken back, and only in its first n steps: after those at most n positions are open, and each step closes one.
    """

    def held(scores: Confidence, is_open: Tensor, state: State) -> tuple[Tensor, Tensor | None, State]:
        mine = state.get("ending.mine", torch.zeros_like(is_open))
        step = state.get("ending.step", is_open.new_zeros(len(is_open), dtype=torch.long))
        mine = torch.where((step == 0)[:, None], is_open, mine)
        asked, back, after = rule(scores, is_open, state)
        commit = is_open & asked
        surest = is_open & (ranks(scores.key) == 0)
        commit = torch.where(commit.any(1, keepdim=True), commit, surest)
        if back is not None:
            back = back & mine & ~is_open & (step < mine.sum(1))[:, None]
        return commit, back, {**after, "ending.mine": mine, "ending.step": step + 1}

    return held


NOISES = {"linear": linear_noise, "cosine": cosine_noise}


def transfer_of(params: SamplingParams) -> Transfer:
    """The schedule that `params` name; a stochastic one takes uniforms (B, N) in place of counts (B,)."""
    if params.schedule == "even":
        return even_transfer
    counts = sampled_transfer if params.stochastic_transfer else expected_transfer
    return partial(counts, noise=NOISES[params.schedule])


def rule_of(params: SamplingParams, value: Tensor | None = None) -> Rule:
    """The rule that `params` name, with `value` (B, 1) float64 for the number in them where rows have their own.

    Raises `ConfigError` if there is no function at the dotted path of one's own.
    """
    if params.rule is not None:
        return ending(function_at(params.rule, "rule"))
    if params.sampler == "llada2.1":
        return partial(
            edit,
            value=number_of(params),
            editing=params.editing_threshold,
            least=params.num_to_transfer,
            most=params.max_post_steps,
        )
    if params.sampler == "llada2.0":
        return partial(quota, value=number_of(params), least=divmod(params.block_length, params.steps))
    number = number_of(params)
    for rule, named in ((threshold, params.threshold), (factor, params.factor), (entropy_bound, params.entropy_bound)):
        if named is not None:
            return partial(rule, value=number if value is None else value)
    return top_k


def number_of(params: SamplingParams) -> float:
    """The number of the rule that `params` name; 0 where it has none."""
    return next((x for x in (params.threshold, params.factor, params.entropy_bound) if x is not None), 0.0)


@dataclass(frozen=True)
class TransferSchedule:
    """How many positions `top_k` commits in each step of a block.

    With `draw`, `transfer` is given uniforms (B, N), nan where there is no position, in place of counts (B,).
    """

    transfer: Transfer
    draw: bool = False

    @staticmethod
    def room(state: State, steps: Tensor, span: int) -> State:
        """`state` with room for `counts` (B, S) of at least `span` steps, and for the `step` (B,) that a row is at."""
        old = state.get("counts", steps.new_zeros(len(steps), span))
        counts = F.pad(old, (0, max(0, span - old.shape[1])))
        return {"counts": counts, "step": state.get("step", torch.zeros_like(steps))}

    def begin(self, state: State, material: Tensor, steps: Tensor, fresh: Tensor) -> State:
        """`state` with the `counts` (B, S) of the rows that have just entered a block, `fresh` (B,), of `steps` (B,) each.

        Rows in the middle of a block keep theirs.
        """
        counts = self.transfer(material, steps, state["counts"].shape[1])
        return {**state, "counts": torch.where(fresh[:, None], counts, state["counts"])}


def schedule_of(params: SamplingParams) -> TransferSchedule | None:
    """The schedule that `params` name; None where the rule alone says how much is committed."""
    return None if params.parallel else TransferSchedule(transfer_of(params), draw=params.stochastic_transfer)
