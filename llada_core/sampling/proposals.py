"""From logits to proposed tokens and how sure the model is of each; the noise of a row.

Near certainty numbers between 0 and 1 run out long before logits do: 1 - 1e-17 is 1, also in float64. So each
confidence has a second form that never does, its log-odds or what plays their part: who is surest is asked of that one,
thresholds and people are given the first. Noise is counter-based, as in `diffusion`: a number is a hash of seed, prompt,
the copy that is asked for of equal ones, how many numbers the row has drawn, and column. So one seed gives one
answer whatever else is in the batch and on whatever device, and there is no generator to keep in step.

Shapes: A active rows, P proposals, V vocabulary.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from llada_core.diffusion import hashed, keyed
from llada_core.sampling.params import SamplingParams


def gumbel_argmax(logits_PV: Tensor, temperature: float | Tensor, uniforms_PV: Tensor) -> Tensor:
    """Samples softmax(logits / temperature), one for all or (P, 1), by argmax of exp(logit) / (-ln u)^temperature, taken as its logarithm.

    In the precision of `uniforms_PV`, float64 where the device has it, as arXiv:2409.02908 shows that low precision
    distorts the distribution. Overwrites `uniforms_PV`.
    """
    noise = uniforms_PV.log_().neg_().log_().mul_(temperature)
    return (logits_PV.to(noise.dtype) - noise).argmax(-1)


def likeliest(logits_PV: Tensor, temperature: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Logits (P, V) with -inf for what is not drawn: all but the `top_k` largest, then all behind those whose
    probabilities at `temperature` (P, 1) first add up to more than `top_p`. Equals of the last that stays, stay too, so
    no order among them matters.
    """
    if top_k is not None and top_k < logits_PV.shape[1]:
        last = logits_PV.topk(top_k, dim=-1).values[:, -1:]
        logits_PV = logits_PV.masked_fill(logits_PV < last, -torch.inf)
    if top_p is None or top_p == 1:
        return logits_PV
    p = (logits_PV.to(temperature.dtype) / temperature).softmax(-1)
    ordered = p.sort(dim=-1, descending=True).values
    last = ordered.masked_fill(ordered.cumsum(-1) - ordered > top_p, torch.inf).amin(-1, keepdim=True)
    return logits_PV.masked_fill(p < last, -torch.inf)


def noise_key(prompt: Tensor, seed: int, copy: int) -> int:
    """The key, int64, of the numbers of the `copy`-th answer to a prompt (P,) int64 on the CPU."""
    digest = hashlib.blake2b(f"{seed} {copy} ".encode() + prompt.numpy().tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


@dataclass(frozen=True)
class Draw:
    """The random numbers of P proposals: each hashes its row's key and a number of its own.

    `keys`, `numbers` (P,) int64; `counts` (P,), how many proposals its row has: what it draws next is so much further on.
    """

    keys: Tensor
    numbers: Tensor
    counts: Tensor

    def uniforms(self, width: int) -> Tensor:
        """(P, width) float64 in [0, 1), all 53 bits; float32 of 24 bits on devices without float64 (mps)."""
        # The highest bits as a fraction, as many as the type tells apart evenly; the mask takes away the copies of the
        # sign that an arithmetic shift draws in.
        bits = hashed(keyed(self.keys, self.numbers), width)
        if bits.device.type == "mps":
            return ((bits >> 40) & 0xFFFFFF).to(torch.float32) * 2.0**-24
        return ((bits >> 11) & 0x1FFFFFFFFFFFFF).to(torch.float64) * 2.0**-53

    def next(self) -> "Draw":
        """Those that are drawn after these."""
        return Draw(self.keys, self.numbers + self.counts, self.counts)

    def part(self, some: slice) -> "Draw":
        """Of some of the proposals."""
        return Draw(self.keys[some], self.numbers[some], self.counts[some])


@dataclass(frozen=True)
class RowNoise:
    """The random numbers of A rows: `keys` (A,) int64, and how many each row has drawn so far, `drawn` (A,) int64."""

    keys: Tensor
    drawn: Tensor

    def draw(self, rows: Tensor, ranks: Tensor, counts: Tensor) -> Draw:
        """The next numbers for proposals of `rows` (P,), the `ranks`-th (P,) of the `counts` (A,) that its row makes."""
        return Draw(self.keys[rows], self.drawn[rows] + ranks, counts[rows])

    def after(self, drawn: Tensor) -> "RowNoise":
        """Once each row has drawn so many more, (A,)."""
        return RowNoise(self.keys, self.drawn + drawn)


@dataclass(frozen=True)
class Confidence:
    """Of some proposals, or laid out on a canvas: `value` in [0, 1], and `key`, which grows strictly with the exact value.

    float64 where the device has it. A place where nothing may be committed has -inf as both; no proposal has.
    """

    value: Tensor
    key: Tensor

    @classmethod
    def of(cls, value: Tensor, key: Tensor) -> Self:
        """Both in float64 (float32 on mps), the keys finite."""
        dtype = torch.float32 if key.device.type == "mps" else torch.float64
        limits = torch.finfo(dtype)
        return cls(value.to(dtype), key.to(dtype).clamp(limits.min, limits.max))

    def lowest_where(self, deferred: Tensor) -> Self:
        """Confidence 0, below all others, where `deferred` says so."""
        return type(self)(
            self.value.masked_fill(deferred, 0.0), self.key.masked_fill(deferred, torch.finfo(self.key.dtype).min)
        )

    def nothing_where(self, places: Tensor) -> Self:
        """-inf, below all others, at these `places`."""
        return type(self)(self.value.masked_fill(places, -torch.inf), self.key.masked_fill(places, -torch.inf))

    def laid_out(self, where: Tensor, places: Tensor) -> Self:
        """On windows (R, W), at flat `places` (P,) where they are open, as `where` (R, W) bool says; -inf elsewhere."""
        if len(places) == where.numel():  # all of them
            return type(self)(*(x.view(where.shape).masked_fill(~where, -torch.inf) for x in (self.value, self.key)))
        closed = torch.full((where.numel(),), -torch.inf, dtype=self.key.dtype, device=self.key.device)
        return type(self)(*(closed.index_copy(0, places, x).view(where.shape) for x in (self.value, self.key)))


# (P, V) float32 logits, (P,) proposed tokens, (P,) uniforms in [0, 1) -> (P,) confidences, higher is surer
Score = Callable[[Tensor, Tensor, Tensor | None], Confidence]


def probability(logits_PV: Tensor, tokens_P: Tensor, uniforms_P: Tensor | None = None) -> Confidence:
    """The probability of the proposed token; its key is the log-odds, taken from the others without the token itself."""
    # log(p / (1 - p)) is the token's logit less the logsumexp of the others: no probability is formed, so none rounds
    # to 1.
    own_P1 = logits_PV.gather(1, tokens_P[:, None])
    others_P = logits_PV.scatter(1, tokens_P[:, None], -torch.inf).logsumexp(-1)
    odds = (own_P1[:, 0] - others_P).to(_wide(logits_PV))
    return Confidence.of(odds.sigmoid(), odds)


def margin(logits_PV: Tensor, tokens_P: Tensor, uniforms_P: Tensor | None = None) -> Confidence:
    """The lead of the likeliest token over the next one, in probability (Dream's margin).

    Of p1 - p2 the odds are (p1 - p2) / (rest + 2 p2): each part is taken by itself, as 1 - (p1 - p2) would round away.
    """
    (first, second), (best, _) = (x.unbind(-1) for x in logits_PV.topk(2, dim=-1))
    others = logits_PV.scatter(1, best[:, None], -torch.inf).logsumexp(-1)  # the next one included
    lead = (-torch.expm1(second.to(_wide(logits_PV)) - first)).log()  # of p1 - p2 over p1
    odds = lead - (torch.logaddexp(others, second) - first)
    return Confidence.of(odds.sigmoid(), odds)


def negative_entropy(logits_PV: Tensor, tokens_P: Tensor, uniforms_P: Tensor | None = None) -> Confidence:
    """exp(-entropy): 1 for one certain token, 1/V for none; its key is minus the logarithm of the entropy."""
    log_entropy = _log_entropy(logits_PV)
    return Confidence.of((-log_entropy.exp()).exp(), -log_entropy)


def _log_entropy(logits_PV: Tensor) -> Tensor:
    """(P,), of the entropy in nats.

    With gaps g_j = max logit - logit_j and O the sum of the others' exp(-g_j), the entropy is
    log(1 + O) + sum of g_j exp(-g_j) / (1 + O): no difference of large numbers in it, so it is as exact near 0 as far
    from it, and both terms can be had as logarithms where exp(-g_j) would underflow.
    """
    top = logits_PV.max(-1, keepdim=True)
    others = logits_PV.scatter(1, top.indices, -torch.inf).logsumexp(-1)
    log_o = (others - top.values[:, 0]).to(_wide(logits_PV))
    log_z = F.softplus(log_o)  # log(1 + O)
    # softplus underflows with O, while its logarithm is then that of O.
    first = torch.where(log_o < -30.0, log_o, log_z.log())
    gaps = top.values - logits_PV
    terms = torch.where(gaps < torch.inf, gaps.log() - gaps, -torch.inf)  # a forbidden token has no share
    return torch.logaddexp(first, terms.logsumexp(-1) - log_z)


def random_scores(logits_PV: Tensor, tokens_P: Tensor, uniforms_P: Tensor | None = None) -> Confidence:
    """No confidence at all: the given uniforms, so that positions are chosen at random."""
    if uniforms_P is None:
        raise ValueError("random remasking needs uniforms")
    return Confidence.of(uniforms_P, uniforms_P)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "mps" else torch.float64


CONFIDENCES: dict[str, Score] = {
    "low_confidence": probability,
    "margin": margin,
    "entropy": negative_entropy,
    "random": random_scores,
}


CHUNK = 1 << 28
"""Logits looked at together; of more, a part at a time, so that the copies made here stay small."""


@dataclass(frozen=True)
class Proposer:
    """What turns logits into proposed tokens and confidences; which of them stay is a rule's to say."""

    score: Score
    never: Tensor
    forbidden: Tensor
    deferred: Tensor
    hot: bool
    at_random: bool
    top_k: int | None = None
    top_p: float | None = None

    @classmethod
    def of(cls, params: SamplingParams, mask_id: int, device: torch.device) -> "Proposer":
        """The values that `params` name; the temperature itself is each row's own."""

        def ids(values: tuple[int, ...]) -> Tensor:
            return torch.tensor(values, dtype=torch.long, device=device)

        return cls(
            score=CONFIDENCES[params.remasking],
            never=ids((mask_id,)),
            forbidden=ids(params.forbid_tokens),
            deferred=ids(params.defer_tokens),
            hot=params.temperature > 0,
            at_random=params.remasking == "random",
            top_k=params.top_k,
            top_p=params.top_p,
        )

    @property
    def draws(self) -> int:
        """How many numbers a proposal takes."""
        return self.hot + self.at_random

    def propose(
        self, logits: Tensor, draw: Draw | None = None, temperature: Tensor | None = None
    ) -> tuple[Tensor, Confidence]:
        """Tokens (P,) and their confidences (P,) from logits (P, V); `temperature` (P, 1) float64, where it is above 0.

        Without a draw the likeliest tokens. MASK is never proposed, yet its probability counts against the proposal, as
        in the references.
        """
        rows = max(1, CHUNK // logits.shape[1])
        if len(logits) <= rows:
            return self._propose(logits, draw, temperature)
        parts = []
        for at in range(0, len(logits), rows):
            some = slice(at, at + rows)
            warmth = None if temperature is None else temperature[some]
            parts.append(self._propose(logits[some], None if draw is None else draw.part(some), warmth))
        tokens, found = zip(*parts, strict=True)
        return torch.cat(tokens), Confidence(torch.cat([c.value for c in found]), torch.cat([c.key for c in found]))

    def _propose(self, logits: Tensor, draw: Draw | None, temperature: Tensor | None) -> tuple[Tensor, Confidence]:
        logits = logits.float()
        if len(self.forbidden):
            logits = logits.index_fill(-1, self.forbidden, -torch.inf)
        possible = logits.index_fill(-1, self.never, -torch.inf)
        if draw is None or temperature is None or not self.hot:
            tokens = possible.argmax(-1)
        else:
            possible = likeliest(possible, temperature, self.top_k, self.top_p)
            tokens = gumbel_argmax(possible, temperature, draw.uniforms(logits.shape[-1]))
            draw = draw.next()
        # Positions beyond the block have no noise of their own: they are shown to people and not chosen among.
        uniforms = draw.uniforms(1)[:, 0] if self.at_random and draw is not None else None
        score = probability if self.at_random and uniforms is None else self.score
        # Deferred tokens take no share of the others' confidence, and come last where they are proposed themselves.
        if len(self.deferred):
            logits = logits.index_fill(-1, self.deferred, -torch.inf)
        confidence = score(logits, tokens, uniforms)
        if len(self.deferred):
            confidence = confidence.lowest_where(torch.isin(tokens, self.deferred))
        return tokens, confidence
