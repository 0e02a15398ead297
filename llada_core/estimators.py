"""Which parts of an answer are masked to estimate its likelihood, and how much each look counts.

LLaDA's bound for an answer of n tokens (arXiv:2502.09992, equation 14) is the mean over k of 1..n, and over the
subsets M of k tokens, of n/k times the sum of log p(token) over M when M is masked. Every plan here is a weighted list
of subsets whose weighted sum has that mean (the stock one as nearly as its authors' rounding allows). Does not know
models or tokens.
"""

from dataclasses import dataclass
from itertools import product
from math import comb
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

Estimator = Literal["auto", "stock", "antithetic", "exact"]
ESTIMATORS: tuple[Estimator, ...] = ("auto", "stock", "antithetic", "exact")
ENUMERATED = 7  # 2^7 - 1 = 127 subsets, fewer than the usual 128 samples
LEAN = 0.75  # best of 0 to 1.2 on a trained model with 4 to 64 looks: half the error of equal widths
STOCK_BATCH = 16  # samples that share one lattice of counts, the batch size of LLaDA's evaluation


@dataclass(frozen=True)
class Plan:
    """S looks at an answer of n tokens: `masks` (S, n) bool; log-probabilities under look s count `weights[s]` (S,)."""

    masks: NDArray[np.bool_]
    weights: NDArray[np.float64]


def plan(estimator: Estimator, length: int, samples: int, rng: np.random.Generator) -> Plan:
    """The plan for an answer of `length` tokens; "auto" enumerates where that takes no more looks than `samples`."""
    if estimator == "auto":
        estimator = "exact" if length <= ENUMERATED and (length == 1 or 2**length - 1 <= samples) else "antithetic"
    if estimator == "exact":
        return enumerated(length)
    return stock(length, samples, rng) if estimator == "stock" else antithetic(length, samples, rng)


def enumerated(length: int) -> Plan:
    """Every subset: no variance."""
    if length > 2 * ENUMERATED:
        raise ValueError(f"an answer of {length} tokens has 2^{length} subsets; use estimator 'antithetic' or 'auto'")
    masks = np.array(list(product([False, True], repeat=length))[1:], dtype=bool)
    weights = np.array([1 / (k * comb(length, k)) for k in masks.sum(1).tolist()])
    return Plan(masks, weights)


def stock(length: int, samples: int, rng: np.random.Generator) -> Plan:
    """LLaDA's own: counts on a lattice with a random start, positions at random without replacement."""
    counts: list[int] = []
    while len(counts) < samples:
        batch = min(STOCK_BATCH, samples - len(counts))
        counts += lattice(batch, length, int(rng.integers(1, length + 1)))
    order = rng.random((samples, length)).argsort(1).argsort(1)
    return _weighted(order < np.array(counts)[:, None])


def lattice(batch: int, length: int, start: int) -> list[int]:
    """The counts of one batch of LLaDA's evaluation, its float32 rounding included."""
    raw = torch.linspace(float(start), start + (batch - 1) * (length / batch), steps=batch)
    return [(int(x) - 1) % length + 1 for x in raw.round().tolist()]


def antithetic(length: int, samples: int, rng: np.random.Generator) -> Plan:
    """Looks that complement each other: each masks the next tokens of a random order, a new order follows a used-up one.

    So all tokens count almost alike in every estimate. The sizes 1..n are cut into strata, one look each, that are
    narrower among the small sizes (`LEAN`), as n/k makes those the noisy ones; a look counts as much as its stratum is
    wide. Answers that share `rng`'s state share orders and, as far as their lengths allow, sizes, so that differences
    between them vary less (common random numbers).
    """
    density = np.arange(1, length + 1) ** -LEAN
    share = np.concatenate([[0.0], density.cumsum() / density.sum()])
    edges = np.interp(np.linspace(0, 1, samples + 1), share, np.arange(length + 1.0))
    widths = np.diff(edges)
    sizes = np.floor(edges[:-1] + rng.random() * widths).astype(int).clip(max=length - 1) + 1
    # One row of numbers per token, so that a longer answer has the orders of a shorter one with tokens added.
    orders = rng.random((length, samples + 1)).T.argsort(1)
    masks = np.zeros((samples, length), dtype=bool)
    circle, used = orders[0], 0
    for look, (mask, size) in enumerate(zip(masks, sizes.tolist(), strict=True)):
        mask[circle[used : used + size]] = True
        used += size
        if used > length:  # the look goes on in a new order, which begins with what it does not hold yet
            held = mask[orders[look + 1]]
            circle, used = np.concatenate([orders[look + 1][~held], orders[look + 1][held]]), used - length
            mask[circle[:used]] = True
    return Plan(masks, widths / sizes)


def _weighted(masks: NDArray[np.bool_]) -> Plan:
    samples, length = masks.shape
    return Plan(masks, length / masks.sum(1) / samples)
