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
    """Counts spread evenly over 1..n; each k has a partner of n + 1 - k tokens from the other end of the same
    permutation.

    An odd number of samples above one is rounded up. Answers that share `rng`'s state share permutations and counts as
    far as their lengths allow: differences between them vary less (common random numbers).
    """
    pairs = (samples + 1) // 2
    offset, alone = rng.random(), samples == 1
    # One row of numbers per token, so that a longer answer begins with the permutation of a shorter one.
    rank = rng.random((length, pairs)).T.argsort(1).argsort(1)
    counts = np.floor((np.arange(pairs) + offset) / pairs * length).astype(int).clip(max=length - 1)[:, None] + 1
    first = rank < counts
    return _weighted(first if alone else np.concatenate([first, length - 1 - rank < length + 1 - counts]))


def _weighted(masks: NDArray[np.bool_]) -> Plan:
    samples, length = masks.shape
    return Plan(masks, length / masks.sum(1) / samples)
