"""Intervals and paired tests for scores: closed forms where answers are right or wrong, a seeded bootstrap elsewhere.

Everything is deterministic.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Z95 = 1.959963984540054


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` questions with its standard error and 95 % interval."""

    value: float
    n: int
    stderr: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """A mean of paired differences with its 95 % interval; `p_value` of McNemar's exact test for right-or-wrong scores.

    `gained` and `lost` count the questions on which the first alone, or the second alone, was right (or scored higher).
    """

    value: float
    n: int
    low: float
    high: float
    gained: int
    lost: int
    p_value: float | None

    @property
    def significant(self) -> bool:
        """Whether zero lies outside the interval."""
        return self.low > 0 or self.high < 0


def is_binary(scores: Sequence[float]) -> bool:
    """Whether every score is exactly 0 or 1."""
    return all(score in (0, 1) for score in scores)


def estimate(scores: Sequence[float], *, resamples: int = 2000) -> Estimate:
    """Mean of per-question scores: Wilson's interval for right-or-wrong, else bootstrap. ValueError if empty."""
    n = len(scores)
    if n == 0:
        raise ValueError("no scores: an estimate needs at least one question")
    values = np.asarray(scores, dtype=np.float64)
    mean = float(values.mean())
    stderr = float(values.std(ddof=1) / math.sqrt(n)) if n > 1 else 0.0
    # A bootstrap of 500 right answers in 500 has an interval of no width; the score interval has not.
    low, high = wilson(int(values.sum()), n) if is_binary(scores) else _bootstrap(values, resamples)
    return Estimate(mean, n, stderr, low, high)


def wilson(correct: int, n: int) -> tuple[float, float]:
    """95 % score interval of a share (Wilson 1927); it never leaves [0, 1] and is not empty at 0 or n."""
    # The shares p whose own test would not reject what was seen: |share - p| <= z sqrt(p (1 - p) / n), solved for p.
    share, z2 = correct / n, Z95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    low = 0.0 if correct == 0 else max(0.0, centre - half)
    return low, 1.0 if correct == n else min(1.0, centre + half)


def paired(first: Sequence[float], second: Sequence[float], *, resamples: int = 2000) -> Difference:
    """`first` minus `second` on the same questions in the same order.

    Right-or-wrong scores: Agresti and Min's interval for matched pairs (2005) and McNemar's exact p-value; else a
    paired bootstrap. Raises ValueError if the lengths differ or are zero.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"paired scores need the same questions, got {len(first)} and {len(second)}")
    differences = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    n, value = len(differences), float(differences.mean())
    gained, lost = int((differences > 0).sum()), int((differences < 0).sum())
    if not (is_binary(first) and is_binary(second)):
        return Difference(value, n, *_bootstrap(differences, resamples), gained, lost, None)
    # Half a question added to each discordant cell: without any the plain interval would be a point.
    b, c, m = gained + 0.5, lost + 0.5, n + 2
    centre = (b - c) / m
    half = Z95 * math.sqrt(b + c - (b - c) ** 2 / m) / m
    return Difference(value, n, max(-1.0, centre - half), min(1.0, centre + half), gained, lost, mcnemar(gained, lost))


def mean_of_means(groups: Sequence[Sequence[float]]) -> dict[str, float]:
    """The mean over groups of their means, as `score`, with its `stderr` and 95 % interval (`low`, `high`)."""
    means = [sum(group) / len(group) for group in groups]
    # Where scores are right or wrong a group without any variety is not taken to be without any error (Agresti).
    smooth = [(sum(group) + 2) / (len(group) + 4) for group in groups]
    stderr = math.sqrt(sum(p * (1 - p) / len(g) for p, g in zip(smooth, groups, strict=True))) / len(groups)
    score = sum(means) / len(means)
    low, high = max(0.0, score - Z95 * stderr), min(1.0, score + Z95 * stderr)
    return {"score": score, "stderr": stderr, "low": low, "high": high}


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided exact p-value that so lopsided a split of discordant pairs arises by chance."""
    n, smaller = gained + lost, min(gained, lost)
    # Under no difference each discordant question is a fair coin, so their split is binomial; concordant ones say nothing.
    tail = sum(math.comb(n, k) for k in range(smaller + 1)) / 2**n
    return min(1.0, 2 * tail)


def _bootstrap(values: np.ndarray, resamples: int) -> tuple[float, float]:
    """Percentiles 2.5 and 97.5 of the mean over resampled questions, from a fixed seed."""
    # The same seed for every score: a table that is made twice is the same table.
    rng = np.random.default_rng(0)
    means = [float(values[rng.integers(0, len(values), len(values))].mean()) for _ in range(resamples)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
