"""Schedules, rules and confidences as values: each says what its source says."""

import pytest
import torch

from llada_core.sampling.params import SamplingParams
from llada_core.sampling.proposals import (
    CONFIDENCES,
    Confidence,
    RowNoise,
    margin,
    negative_entropy,
    noise_key,
    probability,
)
from llada_core.sampling.unmask import (
    cosine_noise,
    entropy_bound,
    even_transfer,
    factor,
    linear_noise,
    ranks,
    rule_of,
    sampled_transfer,
    threshold,
    top_k,
)

CLOSED = -torch.inf


def scores(*rows):
    values = torch.tensor(rows, dtype=torch.float64)
    return Confidence(values, values)


def places(rule, scores, state=None, **settings):
    """Where a rule commits, row by row; one without a memory takes nothing back and leaves its state alone."""
    commit, back, after = rule(scores, scores.key > CLOSED, state or {}, **settings)
    assert back is None
    assert after == {} or after["step"].tolist() == [1] * len(commit)
    return [row.nonzero()[:, 0].tolist() for row in commit]


def counts(*rows):
    """The state of `top_k` before the first step of a block."""
    return {"counts": torch.tensor(rows)[:, None], "step": torch.zeros(len(rows), dtype=torch.long)}


def test_top_k_takes_the_surest_and_the_leftmost_of_equals():
    s = scores([0.5, 0.9, 0.5, CLOSED], [0.1, CLOSED, 0.3, 0.2])
    assert places(top_k, s, counts(2, 1)) == [[0, 1], [2]]


def test_top_k_never_commits_a_closed_position():
    assert places(top_k, scores([CLOSED, 0.1]), counts(2)) == [[1]]


def test_threshold_includes_its_value_and_always_commits_one():
    s = scores([0.9, 0.89, 0.95, CLOSED], [0.1, 0.2, 0.2, CLOSED])
    assert places(threshold, s, value=0.9) == [[0, 2], [1]]


def test_factor_asks_more_of_each_further_position():
    # 1 - 0.5/(r+1): 0.75, 0.833, 0.875, 0.9 for r = 1..4
    s = scores([0.88, 0.9, 0.1, 0.84], [0.2, 0.1, CLOSED, CLOSED])
    assert places(factor, s, value=0.5) == [[0, 1], [0]]


def test_entropy_bound_adds_up_all_entropies_but_the_largest():
    nats = torch.tensor([[0.3, 0.1, 0.2, 5.0], [2.0, 3.0, 4.0, torch.inf]], dtype=torch.float64)
    confidence = Confidence((-nats).exp(), torch.where(nats < torch.inf, -nats.log(), CLOSED))
    assert places(entropy_bound, confidence, value=0.31) == [[0, 1, 2], [0]]
    assert places(entropy_bound, confidence, value=0.59) == [[0, 1, 2], [0]]
    assert places(entropy_bound, confidence, value=0.61) == [[0, 1, 2, 3], [0]]


def test_every_rule_commits_one_position_even_of_confidence_zero():
    for settings in ({"threshold": 0.9}, {"factor": 0.1}, {"entropy_bound": 0.0, "remasking": "entropy"}):
        rule = rule_of(SamplingParams(max_new_tokens=4, block_length=4, steps=4, **settings))
        assert places(rule, scores([CLOSED, 0.0, 0.0, 0.0])) == [[1]]


def test_ranks_are_a_permutation_that_keeps_ties_in_order():
    assert ranks(scores([0.2, 0.9, 0.2, CLOSED]).key).tolist() == [[1, 0, 2, 3]]


def test_even_transfer_of_rows_with_budgets_of_their_own():
    quotas = even_transfer(torch.tensor([7, 5]), torch.tensor([3, 2]), 3)
    assert quotas.tolist() == [[3, 2, 2], [3, 2, 0]]


@pytest.mark.parametrize("noise", [linear_noise, cosine_noise])
def test_sampled_transfer_is_the_reverse_process(noise):
    """Each token stays masked with chance noise(s)/noise(t): after each step the expected share left is noise(s)."""
    rows, open_here, steps = 4000, 12, 5
    uniforms = torch.rand(rows, open_here, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    uniforms[0, 4:] = torch.nan
    quotas = sampled_transfer(uniforms, torch.full((rows,), steps), steps, noise=noise)
    assert quotas.sum(1).tolist() == [4] + [12] * (rows - 1)
    counts = torch.zeros(steps)
    edges = noise(torch.arange(steps - 1, -1, -1).double() / steps)
    for j in range(steps):
        before = 1.0 if j == 0 else edges[j - 1]
        counts[j] = ((uniforms[1:] < before) & (uniforms[1:] >= edges[j])).double().sum(1).mean()
    expected = torch.cat([torch.ones(1), edges]).double().diff().neg() * open_here
    assert torch.allclose(counts.double(), expected, atol=0.1)
    assert (quotas[:, 0] > 0).all(), "steps that commit nothing are left out"


def test_sampled_transfer_counts_what_it_drew():
    uniforms = torch.tensor([[0.95, 0.05, 0.5, 0.55]], dtype=torch.float64)
    assert sampled_transfer(uniforms, torch.tensor([4]), 4, noise=linear_noise).tolist() == [[1, 2, 1, 0]]


def test_probability_is_that_of_the_softmax():
    logits = torch.tensor([[30.0, 0.0, 0.0], [31.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    p = probability(logits, logits.argmax(-1)).value
    assert torch.allclose(p, logits.double().softmax(-1).amax(-1), atol=1e-12)
    assert p[1] > p[0]
    assert logits.softmax(-1)[0, 0] == logits.softmax(-1)[1, 0] == 1


@pytest.mark.parametrize("name", ["low_confidence", "margin", "entropy"])
def test_keys_order_what_is_sure_beyond_the_numbers_between_0_and_1(name):
    """Gaps of 10 to 600 nats: the probability of the first is 1 in float64 from 37, the margin in float32 from 18."""
    gaps = torch.arange(10.0, 600.0, 0.5)
    logits = torch.stack([gaps, torch.zeros_like(gaps), torch.full_like(gaps, -1.0)], 1)
    found = CONFIDENCES[name](logits, logits.argmax(-1), None)
    assert (found.key.diff() > 0).all()
    assert (found.value.diff() >= 0).all()
    assert found.value[-1] == 1
    laid_out = Confidence(found.value[None], found.key[None])
    assert places(top_k, laid_out, counts(3)) == [[len(gaps) - 3, len(gaps) - 2, len(gaps) - 1]]


def test_keys_grow_with_the_values_where_those_tell_apart():
    logits = torch.randn(500, 7, generator=torch.Generator().manual_seed(0)) * 4
    for name in ("low_confidence", "margin", "entropy"):
        found = CONFIDENCES[name](logits, logits.argmax(-1), None)
        order = found.key.argsort()
        assert (found.value[order].diff() >= 0).all(), name


def test_margin_and_entropy():
    logits = torch.log(torch.tensor([[0.7, 0.2, 0.1], [0.4, 0.35, 0.25]]))
    tokens = torch.tensor([0, 0])
    assert torch.allclose(margin(logits, tokens).value, torch.tensor([0.5, 0.05], dtype=torch.float64), atol=1e-6)
    expected = torch.distributions.Categorical(logits=logits).entropy().double()
    assert torch.allclose(negative_entropy(logits, tokens).value, (-expected).exp(), atol=1e-6)
    assert torch.allclose(negative_entropy(logits, tokens).key, -expected.log(), atol=1e-6)


def test_entropy_of_forbidden_tokens_is_finite():
    found = negative_entropy(
        torch.tensor([[0.0, -torch.inf, 0.0], [0.0, -torch.inf, -torch.inf]]), torch.tensor([0, 0])
    )
    assert found.value.tolist() == pytest.approx([0.5, 1.0])
    assert found.key.isfinite().all()


def test_equal_tokens_have_no_margin_and_stay_open_to_be_committed():
    found = margin(torch.zeros(1, 3), torch.tensor([0]))
    assert found.value.item() == 0
    assert found.key.item() > CLOSED


def noise_of(*keys):
    return RowNoise(torch.tensor(keys), torch.zeros(len(keys), dtype=torch.long))


def uniforms(noise, counts, width):
    """The next numbers of each row, so many, and the noise after them."""
    counts = torch.tensor(counts)
    rows = torch.repeat_interleave(torch.arange(len(counts)), counts)
    ranks = torch.cat([torch.arange(int(count)) for count in counts])
    return noise.draw(rows, ranks, counts).uniforms(width), noise.after(counts)


def test_a_rows_draws_are_its_own_whatever_shares_the_batch():
    keys = [noise_key(torch.tensor(ids), 3, copy) for ids, copy in (([5, 6], 0), ([7], 0), ([5, 6], 1))]
    first, alone = uniforms(noise_of(keys[0]), [2], 40)
    both, together = uniforms(noise_of(*keys), [2, 3, 1], 40)
    assert torch.equal(first, both[:2])
    assert not torch.isclose(both[:1], both[5:]).any(1).all(), "equal prompts draw numbers of their own"
    later = RowNoise(together.keys[[0, 2]], together.drawn[[0, 2]])
    assert torch.equal(uniforms(alone, [1], 60)[0][:, :40], uniforms(later, [1, 1], 40)[0][:1])
    assert not torch.isclose(first, both[2:4]).all()


def test_numbers_that_are_drawn_next_are_others():
    counts = torch.tensor([2])
    draw = noise_of(5).draw(torch.tensor([0, 0]), torch.arange(2), counts)
    following, _ = uniforms(noise_of(5).after(counts), [2], 7)
    assert torch.equal(draw.next().uniforms(7), following)


def test_draws_have_53_bits_and_are_uniform():
    u, _ = uniforms(noise_of(noise_key(torch.tensor([1]), 0, 0), noise_key(torch.tensor([2]), 0, 0)), [300, 300], 500)
    assert u.dtype == torch.float64
    assert ((u * 2.0**53) % 2 == 1).double().mean().item() == pytest.approx(0.5, abs=0.01)
    share = torch.histc(u, 20, 0, 1) / u.numel()
    assert share.sub(0.05).abs().max() < 6 * (0.05 * 0.95 / u.numel()) ** 0.5
    for a, b in ((u[:, 1:], u[:, :-1]), (u[1:], u[:-1]), (u[:300], u[300:])):
        assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 5 / a.numel() ** 0.5
