"""Likelihood of a model that attends by blocks: each block given the clean ones before it, against brute force."""

from itertools import permutations
from math import factorial

import pytest
import torch

from llada_core.likelihood import Likelihood, greedy_matches, log_likelihood, log_likelihoods, spans
from llada_core.modeling.attention import BlockCausal
from llada_core.sampling import generate
from llada_core.sampling.params import SamplingParams
from tests.reference import BLOCKS, golden_model

MASK, BLOCK = BLOCKS.mask_id, 32
PROMPT = torch.randint(0, 150, (30,), generator=torch.Generator().manual_seed(0)).tolist()
ANSWER = [7, 99, 12, 55, 3]  # its first two tokens end a block, three stand in the next one


@torch.no_grad()
def by_hand(prompt: list[int], answer: list[int]) -> float:
    """The mean over all orders in which a block's tokens can be uncovered, block after block: rows are whole blocks."""
    model, total = golden_model("llada2_tiny"), 0.0
    for first, last in spans(len(prompt), len(answer), BLOCK):
        places = range(first, last)
        for order in permutations(places):
            row = prompt + answer[:first] + [MASK] * (last - first)
            row += [MASK] * (-len(row) % BLOCK)
            for at in order:
                logits = model(torch.tensor([row]), block_causal=BlockCausal(BLOCK)).logits[0, len(prompt) + at]
                total += float(logits.double().log_softmax(-1)[answer[at]]) / factorial(last - first)
                row[len(prompt) + at] = answer[at]
    return total


def test_stretches_of_an_answer():
    assert spans(30, 5, 32) == [(0, 2), (2, 5)]
    assert spans(32, 5, 32) == [(0, 5)]
    assert spans(3, 20, 8) == [(0, 5), (5, 13), (13, 20)]
    assert spans(8, 8, 8) == [(0, 8)]
    assert spans(3, 20, None) == [(0, 20)]


@pytest.mark.parametrize("prompt", [PROMPT, PROMPT[:5], [], [*PROMPT, 9, 9]])
def test_enumerated_equals_the_mean_over_all_orders(prompt):
    found = log_likelihood(golden_model("llada2_tiny"), prompt, ANSWER, estimator="exact")
    assert found == pytest.approx(by_hand(prompt, ANSWER), abs=1e-4)


def test_estimates_agree_with_it():
    model, pairs = golden_model("llada2_tiny"), [(PROMPT, ANSWER)]
    exact = log_likelihoods(model, pairs, estimator="exact")[0]
    for estimator in ("stock", "antithetic"):
        seeds = [log_likelihoods(model, pairs, samples=8, seed=s, estimator=estimator)[0] for s in range(60)]
        error = torch.tensor(seeds).std().item() / 60**0.5
        assert abs(sum(seeds) / 60 - exact) < 4 * error + 1e-4


def test_what_shares_the_call_changes_nothing_and_a_block_is_enumerated_for_itself():
    model = golden_model("llada2_tiny")
    pairs = [(PROMPT, ANSWER), (PROMPT[:9], [3]), (PROMPT, [7, 99, 12, 55, 4]), ([], [5] * 40)]
    together = log_likelihoods(model, pairs, samples=12)
    for pair, value in zip(pairs, together, strict=True):
        assert log_likelihoods(model, [pair], samples=12)[0] == pytest.approx(value, abs=1e-4)
    scorer = Likelihood(model)
    scorer.scores([(PROMPT, ANSWER)])
    assert scorer.num_samples == 3 + 7


def test_guidance_looks_by_blocks_too():
    model = golden_model("llada2_tiny")
    plain = log_likelihood(model, PROMPT, ANSWER, estimator="exact")
    barely = log_likelihood(model, PROMPT, ANSWER, estimator="exact", cfg_scale=1e-6)
    assert barely == pytest.approx(plain, abs=1e-3)
    assert log_likelihood(model, PROMPT, ANSWER, estimator="exact", cfg_scale=1.0) != pytest.approx(plain, abs=1e-2)


def test_labels_share_a_probability():
    """One token behind a prompt: what all tokens but MASK have together is 1."""
    model = golden_model("llada2_tiny")
    values = log_likelihoods(model, [(PROMPT[:7], [token]) for token in range(160) if token != MASK])
    masked = torch.tensor([PROMPT[:7] + [MASK] * 25])
    with torch.no_grad():
        rest = model(masked, block_causal=BlockCausal(BLOCK)).logits[0, 7].softmax(-1)[MASK]
    assert torch.tensor(values, dtype=torch.float64).exp().sum().item() == pytest.approx(1 - float(rest), abs=1e-4)


def test_what_greedy_decoding_would_write():
    model = golden_model("llada2_tiny")
    own = (
        generate(model, [PROMPT], SamplingParams(8, BLOCK, BLOCK, sampler="llada2.0", threshold=1.0))
        .answers[0]
        .tolist()
    )
    other = [*own[:-1], own[-1] ^ 1]
    assert greedy_matches(model, [(PROMPT, own), (PROMPT, other)]) == [True, False]
