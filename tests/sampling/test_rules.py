"""Schedules, rules and confidences as values: each says what its source says."""

import pytest
import torch

from llada_core.config.sampling import SamplingParams
from llada_core.sampling.confidence import certainty, entropy, margin, probability
from llada_core.sampling.unmask import (
    above,
    cosine_noise,
    drawn_quotas,
    even_quotas,
    linear_noise,
    ranks,
    rule_of,
    top_quota,
    within_entropy,
    within_factor,
)

CLOSED = -torch.inf


def scores(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def places(commit):
    return [row.nonzero()[:, 0].tolist() for row in commit]


def test_top_quota_takes_the_surest_and_the_leftmost_of_equals():
    s = scores([0.5, 0.9, 0.5, CLOSED], [0.1, CLOSED, 0.3, 0.2])
    assert places(top_quota(s, torch.tensor([2, 1]))) == [[0, 1], [2]]


def test_top_quota_never_commits_a_closed_position():
    assert places(top_quota(scores([CLOSED, 0.1]), torch.tensor([2]))) == [[1]]


def test_threshold_includes_its_value_and_always_commits_one():
    s = scores([0.9, 0.89, 0.95, CLOSED], [0.1, 0.2, 0.2, CLOSED])
    assert places(above(s, None, threshold=0.9)) == [[0, 2], [1]]


def test_factor_asks_more_of_each_further_position():
    # 1 - 0.5/(r+1): 0.75, 0.833, 0.875, 0.9 for r = 1..4
    s = scores([0.88, 0.9, 0.1, 0.84], [0.2, 0.1, CLOSED, CLOSED])
    assert places(within_factor(s, None, factor=0.5)) == [[0, 1], [0]]


def test_entropy_bound_adds_up_all_entropies_but_the_largest():
    nats = torch.tensor([[0.3, 0.1, 0.2, 5.0], [2.0, 3.0, 4.0, torch.inf]], dtype=torch.float64)
    assert places(within_entropy((-nats).exp(), None, bound=0.31)) == [[0, 1, 2], [0]]
    assert places(within_entropy((-nats).exp(), None, bound=0.59)) == [[0, 1, 2], [0]]
    assert places(within_entropy((-nats).exp(), None, bound=0.61)) == [[0, 1, 2, 3], [0]]


def test_every_rule_commits_one_position_even_of_confidence_zero():
    for settings in ({"threshold": 0.9}, {"factor": 0.1}, {"entropy_bound": 0.0, "remasking": "entropy"}):
        rule = rule_of(SamplingParams(max_new_tokens=4, block_length=4, steps=4, **settings))
        assert places(rule(scores([CLOSED, 0.0, 0.0, 0.0]), None)) == [[1]]


def test_ranks_are_a_permutation_that_keeps_ties_in_order():
    assert ranks(scores([0.2, 0.9, 0.2, CLOSED])).tolist() == [[1, 0, 2, 3]]


def test_even_quotas_of_rows_with_budgets_of_their_own():
    quotas = even_quotas(torch.tensor([7, 5]), torch.tensor([3, 2]))
    assert quotas.tolist() == [[3, 2, 2], [3, 2, 0]]


@pytest.mark.parametrize("noise", [linear_noise, cosine_noise])
def test_drawn_quotas_are_the_reverse_process(noise):
    """Each token stays masked with chance noise(s)/noise(t): after each step the expected share left is noise(s)."""
    rows, open_here, steps = 4000, 12, 5
    uniforms = torch.rand(rows, open_here, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    uniforms[0, 4:] = torch.nan
    quotas = drawn_quotas(uniforms, torch.full((rows,), steps), noise=noise)
    assert quotas.sum(1).tolist() == [4] + [12] * (rows - 1)
    counts = torch.zeros(steps)
    edges = noise(torch.arange(steps - 1, -1, -1).double() / steps)
    for j in range(steps):
        before = 1.0 if j == 0 else edges[j - 1]
        counts[j] = ((uniforms[1:] < before) & (uniforms[1:] >= edges[j])).double().sum(1).mean()
    expected = torch.cat([torch.ones(1), edges]).double().diff().neg() * open_here
    assert torch.allclose(counts.double(), expected, atol=0.1)
    assert (quotas[:, 0] > 0).all(), "steps that commit nothing are left out"


def test_drawn_quotas_count_what_they_drew():
    uniforms = torch.tensor([[0.95, 0.05, 0.5, 0.55]], dtype=torch.float64)
    assert drawn_quotas(uniforms, torch.tensor([4]), noise=linear_noise).tolist() == [[1, 2, 1, 0]]


def test_probability_orders_what_float32_cannot_tell_apart():
    logits = torch.tensor([[30.0, 0.0, 0.0], [31.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    p = probability(logits, logits.argmax(-1))
    assert torch.allclose(p, logits.double().softmax(-1).amax(-1), atol=1e-12)
    assert p[1] > p[0]
    assert logits.softmax(-1)[0, 0] == logits.softmax(-1)[1, 0] == 1


def test_margin_and_entropy():
    logits = torch.log(torch.tensor([[0.7, 0.2, 0.1], [0.4, 0.35, 0.25]]))
    tokens = torch.tensor([0, 0])
    assert torch.allclose(margin(logits, tokens), torch.tensor([0.5, 0.05], dtype=torch.float64), atol=1e-6)
    expected = torch.distributions.Categorical(logits=logits).entropy().double()
    assert torch.allclose(entropy(logits), expected, atol=1e-6)
    assert torch.allclose(certainty(logits, tokens), (-expected).exp(), atol=1e-6)


def test_entropy_of_forbidden_tokens_is_finite():
    assert entropy(torch.tensor([[0.0, -torch.inf, 0.0]])).item() == pytest.approx(0.6931, abs=1e-4)
