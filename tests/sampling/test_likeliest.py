"""top_k and top_p: among which tokens is drawn, that nothing else is touched, and what is refused."""

import pytest
import torch

from llada_core.sampling import generate
from llada_core.sampling.engine import Engine
from llada_core.sampling.params import SamplingParams, as_values
from llada_core.sampling.proposals import Proposer, likeliest
from llada_core.sampling.requests import to_answer
from llada_core.settings import ConfigError
from tests.tiny import tiny_model

BASE = {"max_new_tokens": 12, "block_length": 12, "steps": 12}
PROMPTS = [[5, 9, 11, 30], [3, 8], [7], [90, 80, 70], [1, 2, 3, 4, 5], [60], [44, 45], [99, 1, 50]]


def by_hand(logits, temperature, top_k, top_p):
    """Indices that stay of one row, token by token, as LLaDA2's sampler says: k first, ties stay, then p."""
    stays = set(range(len(logits)))
    if top_k is not None:
        last = sorted(logits, reverse=True)[min(top_k, len(logits)) - 1]
        stays = {i for i in stays if logits[i] >= last}
    if top_p is None:
        return stays
    weights = {i: torch.tensor(logits[i] / temperature, dtype=torch.float64).exp().item() for i in stays}
    total, passed, last = sum(weights.values()), 0.0, None
    for i in sorted(stays, key=lambda i: -weights[i]):
        if passed > top_p:
            break
        passed, last = passed + weights[i] / total, weights[i]
    return {i for i in stays if weights[i] >= last}


@pytest.mark.parametrize("top_k", [None, 1, 3, 50])
@pytest.mark.parametrize("top_p", [None, 0.01, 0.6, 0.95, 1.0])
def test_what_stays_is_what_was_published(top_k, top_p):
    logits = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
    logits[1, :5] = 2.0  # equals at the edge
    logits[2] = 0.0
    logits[3, 7] = -torch.inf
    temperature = torch.tensor([0.1, 0.7, 1.0, 1.0, 2.0, 5.0], dtype=torch.float64)[:, None]
    kept = likeliest(logits, temperature, top_k, top_p)
    for row, found in enumerate(kept):
        stays = {i for i in range(20) if found[i] > -torch.inf}
        wanted = by_hand(logits[row].tolist(), temperature[row, 0].item(), top_k, None if top_p == 1.0 else top_p)
        assert stays == {i for i in wanted if logits[row, i] > -torch.inf}
        assert torch.equal(found[found > -torch.inf], logits[row][found > -torch.inf])


def test_at_temperature_0_they_change_nothing_and_above_they_bound_the_draw():
    model = tiny_model(seed=4)
    plain = generate(model, PROMPTS, SamplingParams(**BASE)).answers
    cut = generate(model, PROMPTS, SamplingParams(**BASE, top_k=2, top_p=0.5)).answers
    assert all(torch.equal(a, b) for a, b in zip(plain, cut, strict=True))
    likely = generate(model, PROMPTS, SamplingParams(**BASE, temperature=3.0, seed=1, top_k=1)).answers
    wild = generate(model, PROMPTS, SamplingParams(**BASE, temperature=3.0, seed=1)).answers
    tiny = generate(model, PROMPTS, SamplingParams(**BASE, temperature=3.0, seed=1, top_p=1e-9)).answers
    whole = generate(model, PROMPTS, SamplingParams(**BASE, temperature=3.0, seed=1, top_k=10_000, top_p=1.0)).answers
    assert all(torch.equal(a, b) for a, b in zip(likely, plain, strict=True)), "of one token there is no choice"
    assert all(torch.equal(a, b) for a, b in zip(tiny, plain, strict=True)), "the likeliest always stays"
    assert all(torch.equal(a, b) for a, b in zip(whole, wild, strict=True)), "all of them are all"
    assert not all(torch.equal(a, b) for a, b in zip(wild, plain, strict=True))


def test_requests_with_other_bounds_share_forwards_and_each_draws_by_its_own():
    model = tiny_model(seed=4)
    bounds = [
        {},
        {"top_k": 1},
        {"top_k": 5},
        {"top_p": 0.3},
        {"top_p": 0.9},
        {"top_k": 9, "top_p": 0.5},
        {},
        {"top_k": 1},
    ]
    each = [SamplingParams(**BASE, temperature=2.0, seed=7, **bound) for bound in bounds]
    alone = [generate(model, [p], s).answers[0] for p, s in zip(PROMPTS, each, strict=True)]
    engine = Engine(model)
    answers = engine.submit([to_answer(model, [p], s)[0][0] for p, s in zip(PROMPTS, each, strict=True)])
    engine.finish(answers)
    assert all(torch.equal(a.tokens[-12:], b) for a, b in zip(answers, alone, strict=True))
    assert {answer.forwards for answer in answers} == {12}


def test_mask_is_left_out_before_and_confidence_is_that_of_all_tokens():
    logits = torch.tensor([[9.0, 5.0, 4.0, 1.0]])
    params = SamplingParams(**BASE, temperature=1.0, top_k=1)
    temperature = torch.ones(1, 1, dtype=torch.float64)

    class One:
        def uniforms(self, width):
            return torch.full((1, width), 0.5, dtype=torch.float64)

        def next(self):
            return self

    tokens, confidence = Proposer.of(params, 0, torch.device("cpu")).propose(logits, One(), temperature)
    assert tokens.tolist() == [1]
    assert confidence.value.item() == pytest.approx(logits.softmax(-1)[0, 1].item())


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"top_k": 0}, "top_k: Input should be greater than or equal to 1"),
        ({"top_k": 1.5}, "top_k"),
        ({"top_p": 0.0}, "top_p: Input should be greater than 0"),
        ({"top_p": 1.1}, "top_p: Input should be less than or equal to 1"),
        ({"top_p": float("nan")}, "top_p"),
    ],
)
def test_what_is_out_of_range_is_refused_in_one_line(given, says):
    with pytest.raises(ConfigError, match=says) as told:
        SamplingParams(**BASE, **given)
    assert "\n" not in str(told.value)


def test_settings_that_say_nothing_are_not_written():
    assert not {"top_k", "top_p"} & as_values(SamplingParams(**BASE)).keys()
    assert as_values(SamplingParams(**BASE, top_p=0.9))["top_p"] == 0.9
