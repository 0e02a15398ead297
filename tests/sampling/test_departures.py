"""Where a peer is wrong, ours is right; each test says which behaviour it departs from."""

import pytest
import torch

from llada_core.sampling import generate, infill, stream
from llada_core.sampling.params import SamplingParams
from llada_core.tokenizer import SpecialTokens
from tests.reference import golden_model
from tests.tiny import tiny_model

BASE = {"max_new_tokens": 16, "block_length": 8, "steps": 16}


def mask_lover():
    """A model that would predict MASK everywhere."""
    model = tiny_model()
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        head[126] = head.sum(0) * 0 + 50 * head[5]
        head[5] *= 0.99
    return model


@pytest.mark.parametrize(
    "extra", [{}, {"temperature": 1.0, "seed": 0}, {"threshold": 0.9}, {"cache": "dual"}, {"cfg_scale": 1.0}]
)
def test_mask_is_never_produced(extra):
    """ML-GSAI, dllm and Fast-dLLM write MASK where the model prefers it, and leave masks in the output."""
    model = mask_lover()
    result = generate(model, [[1, 2, 3]], SamplingParams(**BASE, **extra))
    assert not (result.tokens == 126).any()
    filled = infill(model, [[1, 126, 3, 126]], SamplingParams(**{**BASE, "schedule": "linear"}, **extra))
    assert not (filled.tokens == 126).any()


def test_the_model_really_prefers_mask():
    model = mask_lover()
    logits = model(torch.tensor([[1, 2, 3, 126, 126]])).logits
    assert (logits[0, 3:].argmax(-1) == 126).any()


def test_guidance_without_attention_mask():
    """ML-GSAI's generate raises UnboundLocalError for cfg_scale > 0 without an attention mask."""
    model, prompt = golden_model("llada_tiny"), torch.tensor([[5, 9, 30]])
    params = SamplingParams(**BASE, cfg_scale=1.0)
    masked = generate(model, prompt, params, attention_mask=torch.ones_like(prompt))
    assert torch.equal(generate(model, prompt, params).tokens, masked.tokens)


def test_deferral_holds_at_temperature():
    """ML-GSAI's switch lands on the noisy logits after the argmax, so that EOS is not deferred at temperature > 0."""
    model = golden_model("llada_tiny_eos")
    params = SamplingParams(**BASE, temperature=1.0, seed=0, defer_tokens=(120, 122))
    steps = list(stream(model, [[101, 49, 20]], params))
    deferred_before = False
    for step in steps:
        proposals = step.proposal[step.before == 126]
        proposals = proposals[proposals >= 0]
        written = step.tokens[step.committed]
        others = ~torch.isin(proposals, torch.tensor([120, 122]))
        if others.any():
            assert not torch.isin(written, torch.tensor([120, 122])).any()
        deferred_before |= bool((~others).any())
    assert deferred_before, "the model must propose EOS for the test to mean anything"


def test_one_step_per_block_with_a_cache():
    """Fast-dLLM's cached loops raise IndexError with one step per block."""
    for cache in ("prefix", "dual"):
        params = SamplingParams(max_new_tokens=16, block_length=8, steps=2, cache=cache)
        result = generate(golden_model("llada_tiny"), [[1, 2, 3]], params)
        assert result.forwards == 2
        assert not (result.tokens == 126).any()


def test_threshold_with_few_steps_leaves_no_mask():
    """dllm's dual loop stops after steps/blocks iterations: with a threshold and few steps half the output stays
    MASK."""
    params = SamplingParams(max_new_tokens=16, block_length=8, steps=2, cache="dual", threshold=0.95)
    assert not (generate(golden_model("llada_tiny"), [[1, 2, 3]], params).tokens == 126).any()


def test_a_row_done_before_its_steps_takes_no_more_forwards():
    """LLaDA spends a forward on every step of a budget above the number of masks; its counts are zero there."""
    params = SamplingParams(max_new_tokens=4, block_length=4, steps=9)
    assert generate(golden_model("llada_tiny"), [[1, 2]], params).forwards == 4


def test_guidance_hides_what_was_given_and_nothing_else():
    """The unguided look masks what was given (dllm's way), never what was written since; kept tokens stay."""
    seen = []
    model = tiny_model()
    forward = model.forward

    def watched(tokens, *args, **kwargs):
        seen.append(tokens.clone())
        return forward(tokens, *args, **kwargs)

    model.forward = watched
    infill(
        model, [[7, 126, 9, 126]], SamplingParams(**{**BASE, "schedule": "linear"}, cfg_scale=1.0, cfg_keep_tokens=(9,))
    )
    blind = torch.stack([tokens[1] for tokens in seen])
    assert (blind[:, 0] == 126).all()
    assert (blind[:, 2] == 9).all()
    assert blind[1:, [1, 3]].ne(126).any()


def test_special_ids_are_the_models():
    """ML-GSAI hard-codes ids 126081 and 126348: wrong for MoE and iLLaDA."""
    special = SpecialTokens(mask_id=5, eos_id=6, pad_id=6, eot_id=7)
    model = tiny_model(special=special)
    assert not (generate(model, [[1, 2, 120]], SamplingParams(**BASE)).tokens == 5).any()


def test_random_remasking_at_the_right_rate():
    """javiersgjavi remasks with chance s instead of s/t: 99 % of tokens are fixed after 66 of 512 steps."""
    model = tiny_model("distilbert")
    params = SamplingParams(
        max_new_tokens=100,
        block_length=100,
        steps=50,
        schedule="linear",
        stochastic_transfer=True,
        remasking="random",
        seed=0,
    )
    left = [int(step.open.sum()) for step in stream(model, [[]], params)]
    assert 35 <= left[len(left) // 2] <= 65
    assert left[-1] == 0


def test_random_remasking_has_no_favourite_place():
    """One token a step, 8 places, 64 seeds: each place comes first 8 times on average, a place never in one run of 600."""
    model = tiny_model()
    first = []
    for seed in range(64):
        params = SamplingParams(max_new_tokens=8, block_length=8, steps=8, remasking="random", seed=seed)
        before = next(iter(stream(model, [[1, 2, 120]], params)))
        first.append(int(before.committed[0].nonzero()[0]))
    assert len(set(first)) == 8
    assert max(map(first.count, first)) <= 24


def test_multinomial_and_greedy_reverse_process_on_a_masked_lm():
    """Unconditional text from CLS ... SEP, with MASK and whatever else is forbidden never in it."""
    model = tiny_model("bert")
    for temperature in (0.0, 1.0):
        params = SamplingParams(
            max_new_tokens=20, block_length=20, steps=10, schedule="linear", stochastic_transfer=True,
            remasking="random", temperature=temperature, seed=1, forbid_tokens=(121, 0),
        )  # fmt: skip
        result = generate(model, [[], []], params)
        assert result.tokens.shape == (2, 20)
        assert not torch.isin(result.tokens, torch.tensor([126, 121, 0])).any()
        whole = list(stream(model, [[]], params))[-1].tokens[0]
        assert whole[0] == 121
        assert whole[-1] == 120
        assert torch.equal(whole[1:-1], result.answers[0])
