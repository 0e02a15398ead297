"""Every estimator has the enumerated mean; ours has less variance than the stock one at equal cost."""

import math
import re

import numpy as np
import pytest
import torch

from llada_core.likelihood import (
    Likelihood,
    Plan,
    antithetic,
    enumerated,
    greedy_matches,
    log_likelihood,
    log_likelihoods,
    plan,
    stock,
)
from tests.reference import golden_model
from tests.tiny import tiny_model

PROMPT, ANSWER = [5, 9, 30, 61], [7, 99, 12, 55, 3]


def coverage(drawn) -> np.ndarray:
    """How much each token counts in all: 1 on average, whatever the answer."""
    return (drawn.masks * drawn.weights[:, None]).sum(0)


@pytest.mark.parametrize("length", [1, 2, 3, 5])
@pytest.mark.parametrize("samples", [1, 2, 7, 16])
def test_antithetic_is_unbiased_for_any_model(length, samples):
    """Whatever the log-probabilities of each token under each mask are: the mean over seeds is the enumerated sum."""
    table = np.random.default_rng(1).normal(size=(2**length, length)) * 3 - 5
    table[2 ** np.arange(length)] -= 10

    def value(drawn: Plan) -> float:
        return float((table[(drawn.masks * 2 ** np.arange(length)).sum(1)] * drawn.masks).sum(1) @ drawn.weights)

    found = [value(antithetic(length, samples, np.random.default_rng(seed))) for seed in range(3000)]
    error = np.std(found) / math.sqrt(len(found)) + 1e-12
    assert abs(np.mean(found) - value(enumerated(length))) < 4 * error


def test_antithetic_looks_complement_each_other():
    """Tokens are masked equally often, give or take one order that was begun."""
    for samples in (8, 40):
        drawn = antithetic(9, samples, np.random.default_rng(0))
        times = drawn.masks.sum(0)
        assert times.max() - times.min() <= 2
        assert (drawn.masks.sum(1) >= 1).all()


def test_common_random_numbers():
    """A longer option has the orders of a shorter one with tokens added."""
    short, long = (antithetic(n, 40, np.random.default_rng(7)).masks for n in (12, 13))
    strangers = antithetic(13, 40, np.random.default_rng(8)).masks
    assert (short != long[:, :12]).mean() < 0.8 * (short != strangers[:, :12]).mean()


@pytest.mark.parametrize("length", [1, 4, 7])
def test_enumeration_is_every_subset_once(length):
    drawn = enumerated(length)
    assert len({mask.tobytes() for mask in drawn.masks}) == 2**length - 1
    assert np.allclose(coverage(drawn), 1)


@pytest.mark.parametrize(("length", "samples", "count"), [(1, 1, 1), (7, 128, 127), (7, 100, 100), (8, 128, 128)])
def test_auto_enumerates_where_that_is_cheaper(length, samples, count):
    assert len(plan("auto", length, samples, np.random.default_rng(0)).masks) == count


@pytest.mark.parametrize("estimator", ["stock", "antithetic"])
@pytest.mark.parametrize("guidance", [0.0, 0.7])
def test_unbiased_against_enumeration(estimator, guidance):
    model = golden_model("llada_tiny")
    exact = log_likelihood(model, PROMPT, ANSWER, cfg_scale=guidance, estimator="exact")
    runs = 300
    # Different prompts have different random numbers; the same prompt with many seeds has them too.
    found = np.array(
        [
            log_likelihood(model, PROMPT, ANSWER, samples=4, cfg_scale=guidance, seed=s, estimator=estimator)
            for s in range(runs)
        ]
    )
    assert abs(found.mean() - exact) < 4 * found.std() / math.sqrt(runs)


def test_antithetic_beats_stock_at_equal_cost():
    model = tiny_model(seed=3)
    generator = torch.Generator().manual_seed(0)
    answer = torch.randint(0, 119, (14,), generator=generator)
    drawn = {
        name: np.std([log_likelihood(model, PROMPT, answer, samples=16, seed=s, estimator=name) for s in range(60)])
        for name in ("stock", "antithetic")
    }
    assert drawn["antithetic"] < 0.6 * drawn["stock"]


def test_options_of_one_token_share_one_forward():
    scorer = Likelihood(golden_model("llada_tiny"))
    scores = scorer.scores([(PROMPT, [option]) for option in (1, 2, 3, 4)])
    assert (scorer.num_samples, scorer.forwards) == (1, 1)
    logits = golden_model("llada_tiny")(torch.tensor([[*PROMPT, 126]])).logits[0, -1].log_softmax(-1)
    assert scores == pytest.approx(logits[[1, 2, 3, 4]].tolist(), rel=1e-5)


def test_batches_do_not_matter():
    """Any neighbours, any order, any batch size: the same numbers."""
    model = golden_model("llada_tiny")
    pairs = [(PROMPT[: i % 4], list(range(1, 2 + i))) for i in range(9)]
    alone = [log_likelihood(model, *pair, samples=12) for pair in pairs]
    for batch_tokens in (1, 64, 8192):
        assert log_likelihoods(model, pairs, samples=12, batch_tokens=batch_tokens) == pytest.approx(alone, rel=1e-5)
    backwards = log_likelihoods(model, pairs[::-1], samples=12)
    assert backwards[::-1] == pytest.approx(alone, rel=1e-5)


def test_seed_changes_the_estimate_and_repeats_it():
    model, answer = golden_model("llada_tiny"), list(range(20, 32))
    first = log_likelihood(model, PROMPT, answer, samples=4, seed=1)
    assert first == log_likelihood(model, PROMPT, answer, samples=4, seed=1)
    assert first != log_likelihood(model, PROMPT, answer, samples=4, seed=2)


def test_an_empty_prompt_and_a_masked_lm():
    assert log_likelihood(golden_model("llada_tiny"), [], ANSWER) < 0
    assert log_likelihood(tiny_model("bert"), PROMPT, ANSWER, cfg_scale=1.0) < 0


def test_greedy_match_stops_at_the_first_difference(monkeypatch):
    model, calls = golden_model("llada_tiny"), []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    assert greedy_matches(model, [(PROMPT, [126 - 1] * 10)]) == [False]
    assert len(calls) < 10


@pytest.mark.parametrize(
    ("prompt", "answer", "settings", "words"),
    [
        (PROMPT, [], {}, "is empty"),
        (PROMPT, [1, 126], {}, "mask id 126"),
        ([126], [1], {}, "mask id 126"),
        (PROMPT, [136], {}, "token id 136"),
        ([1] * 5000, [1], {}, "5001 tokens"),
        (PROMPT, ANSWER, {"samples": 0}, "samples 0"),
        (PROMPT, ANSWER, {"cfg_scale": -1.0}, "cfg_scale -1.0"),
        (PROMPT, ANSWER, {"cfg_scale": float("nan")}, "cfg_scale nan"),
        (PROMPT, ANSWER, {"estimator": "best"}, "none of auto"),
        (PROMPT, [1] * 40, {"estimator": "exact"}, "2^40 subsets"),
    ],
)
def test_bad_input(prompt, answer, settings, words):
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        log_likelihood(golden_model("llada_tiny"), prompt, answer, **settings)
    assert "\n" not in str(error.value)


def test_stock_is_drawn_anew_for_each_option():
    assert len(stock(5, 40, np.random.default_rng(0)).masks) == 40
