"""The score by confidence: an answer's tokens revealed one by one, the surest first, against a loop written by hand."""

from copy import deepcopy

import pytest
import torch

from llada_core.likelihood import Likelihood, log_likelihood, log_likelihoods, spans
from llada_core.modeling import load_model
from llada_core.modeling.attention import BlockCausal
from llada_core.sampling import generate
from llada_core.sampling.params import SamplingParams
from tests.reference import GOLDEN, special_of

PROMPT = torch.randint(0, 110, (30,), generator=torch.Generator().manual_seed(0)).tolist()
PAIRS = [(PROMPT[: 30 - 3 * i], torch.randint(0, 110, (1 + i,), generator=torch.Generator().manual_seed(i)).tolist()) for i in range(8)]  # fmt: skip


@pytest.fixture(scope="module", params=["llada_tiny", "llada2_tiny"])
def model(request):
    return load_model(GOLDEN / request.param, special_tokens=special_of(request.param)).double().eval()


@torch.no_grad()
def by_hand(model, prompt, answer, guidance=0.0):
    """One answer, one forward a token, blocks after each other; whole ones, where the model attends by them."""
    block, mask = model.block_length, model.special_tokens.mask_id
    how, total = {} if block is None else {"block_causal": BlockCausal(block)}, 0.0
    for first, last in spans(len(prompt), len(answer), block):
        row = prompt + answer[:first] + [mask] * (last - first)
        row += [mask] * (-len(row) % (block or 1))
        left = set(range(first, last))
        while left:
            logits = model(torch.tensor([row]), **how).logits[0]
            if guidance:
                hidden = [mask] * len(prompt) + row[len(prompt) :]
                without = model(torch.tensor([hidden]), **how).logits[0]
                logits = without + (guidance + 1) * (logits - without)
            log_p = logits.log_softmax(-1)
            found = {at: float(log_p[len(prompt) + at, answer[at]]) for at in left}
            surest = max(found, key=found.get)
            total += found[surest]
            row[len(prompt) + surest] = answer[surest]
            left.remove(surest)
    return total


@pytest.mark.parametrize("guidance", [0.0, 0.7])
def test_a_batch_of_eight_equals_the_loop_by_hand(model, guidance):
    expected = [by_hand(model, *pair, guidance) for pair in PAIRS]
    for batch_tokens in (1, 70, 8192):
        scorer = Likelihood(model, cfg_scale=guidance, estimator="confidence", batch_tokens=batch_tokens)
        assert scorer.scores(PAIRS) == pytest.approx(expected, rel=1e-6)  # a network keeps its losses in float32
        assert scorer.num_samples >= 8
    assert scorer.forwards == max(len(answer) for _, answer in PAIRS) or model.block_length


def test_one_token_is_its_likelihood_and_no_seed_matters(model):
    options = [(PROMPT[:7], [token]) for token in range(4)]
    scorer = Likelihood(model, estimator="confidence")
    assert scorer.scores(options) == pytest.approx(log_likelihoods(model, options), abs=1e-12)
    assert (scorer.forwards, scorer.num_samples) == (1, 1)
    scores = {log_likelihood(model, *PAIRS[4], estimator="confidence", samples=s, seed=s) for s in (1, 2)}
    assert len(scores) == 1


def test_what_the_model_writes_by_confidence_scores_what_its_tokens_had():
    """The surest token of all masks is committed at each step: its own order is the one that its answer is scored in."""
    model = load_model(GOLDEN / "llada_tiny", special_tokens=special_of("llada_tiny")).eval()
    out = generate(model, [PROMPT[:9]], SamplingParams(max_new_tokens=6, block_length=6, steps=6))
    own = out.answers[0].tolist()
    scores = log_likelihoods(model, [(PROMPT[:9], own), (PROMPT[:9], own[::-1])], estimator="confidence")
    assert scores[0] == pytest.approx(by_hand(model, PROMPT[:9], own), abs=1e-4)
    assert scores[0] > scores[1]


def test_a_frame_stands_around_each_pair_and_is_not_scored():
    """iLLaDA's evaluation: BOS before the prompt, an end token behind the answer (add_bos_token, padd_eos)."""
    model = load_model(GOLDEN / "llada_tiny", special_tokens=special_of("llada_tiny")).eval()
    special, (prompt, answer) = model.special_tokens, PAIRS[4]
    row, total = [special.bos_id, *prompt, *[special.mask_id] * len(answer), special.eos_id], 0.0
    first = 1 + len(prompt)
    for _ in answer:
        log_p = model(torch.tensor([row])).logits[0].detach().double().log_softmax(-1)
        left = [i for i in range(len(answer)) if row[first + i] == special.mask_id]
        surest = max(left, key=lambda i: float(log_p[first + i, answer[i]]))
        total += float(log_p[first + surest, answer[surest]])
        row[first + surest] = answer[surest]
    asked = {"estimator": "confidence", "framed": True}
    assert log_likelihoods(model, [PAIRS[4]], **asked) == pytest.approx([total], rel=1e-6)
    assert log_likelihoods(model, PAIRS, **asked)[4] == pytest.approx(total, rel=1e-6)
    assert log_likelihoods(model, PAIRS, framed=True) != log_likelihoods(model, PAIRS)
    full = list(range(model.max_length - 3))
    with pytest.raises(ValueError, match="shorten the prompt"):
        log_likelihoods(model, [([i % 100 for i in full], [5, 6])], framed=True)
    with pytest.raises(ValueError, match="framed: for a model with a BOS token"):
        Likelihood(deepcopy(model).by_blocks(4), framed=True)
