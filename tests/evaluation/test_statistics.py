"""Intervals against published or hand-counted values."""

import math

import pytest

from llada_core.evaluation.statistics import estimate, is_binary, mcnemar, paired, wilson


def test_wilson_agrees_with_textbook_values():
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, method 3
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(20, 20)[1] == 1.0


def test_estimate_of_right_or_wrong():
    found = estimate([1.0, 0.0, 1.0, 1.0])
    assert (found.value, found.n) == (0.75, 4)
    assert found.stderr == pytest.approx(math.sqrt(0.75 * 0.25 * 4 / 3) / 2)
    assert (found.low, found.high) == wilson(3, 4)


def test_estimate_of_graded_scores_is_a_seeded_bootstrap():
    scores = [i / 99 for i in range(100)]
    found = estimate(scores)
    assert found == estimate(scores)
    assert not is_binary(scores)
    assert found.high - found.low == pytest.approx(2 * 1.96 * found.stderr, rel=0.1)


def test_paired_interval_is_agresti_and_mins():
    # 100 questions: 15 gained, 5 lost; (15.5 - 5.5) / 102 +- 1.96 * sqrt(21 - 100 / 102) / 102
    first = [1.0] * 15 + [0.0] * 5 + [1.0] * 40 + [0.0] * 40
    second = [0.0] * 15 + [1.0] * 5 + [1.0] * 40 + [0.0] * 40
    found = paired(first, second)
    assert (found.value, found.gained, found.lost) == (pytest.approx(0.10), 15, 5)
    half = 1.959964 * math.sqrt(21 - 100 / 102) / 102
    assert (found.low, found.high) == pytest.approx((10 / 102 - half, 10 / 102 + half), abs=1e-6)
    assert found.significant
    assert found.p_value == pytest.approx(0.04139, abs=1e-5)  # 2 * P(X <= 5), X ~ Binomial(20, 1/2)


def test_equal_answers_are_no_difference():
    found = paired([1.0, 0.0, 1.0], [1.0, 0.0, 1.0])
    assert (found.value, found.p_value) == (0.0, 1.0)
    assert found.low < 0 < found.high


def test_mcnemar_is_exact():
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(6, 0) == pytest.approx(2 / 64)


def test_nothing_to_compare():
    with pytest.raises(ValueError, match="at least one"):
        estimate([])
    with pytest.raises(ValueError, match="same questions"):
        paired([1.0], [])
