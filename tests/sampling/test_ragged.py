"""A batch of different lengths equals its singles, token for token, in every mode; nothing depends on the
neighbours."""

from dataclasses import replace

import pytest
import torch

from llada_core.sampling import generate, infill, stream
from llada_core.sampling.params import SamplingParams
from tests.reference import golden_model
from tests.tiny import tiny_model

MASK = 126
BASE = {"max_new_tokens": 24, "block_length": 8, "steps": 24}
MODES = {
    "even": {},
    "few steps": {"steps": 6},
    "linear": {"schedule": "linear", "steps": 10, "block_length": 7},
    "cosine": {"schedule": "cosine", "steps": 10},
    "stochastic": {"schedule": "linear", "stochastic_transfer": True, "seed": 3},
    "reverse process": {
        "schedule": "cosine", "stochastic_transfer": True, "remasking": "random", "temperature": 1.0, "seed": 4,
    },
    "temperature": {"temperature": 0.8, "seed": 1},
    "top k and p": {"temperature": 1.3, "seed": 1, "top_k": 20, "top_p": 0.7},
    "top p, threshold": {"temperature": 0.7, "seed": 1, "top_p": 0.9, "threshold": 0.2},
    "random": {"remasking": "random", "seed": 2},
    "margin": {"remasking": "margin"},
    "entropy": {"remasking": "entropy"},
    "guided": {"cfg_scale": 1.0},
    "guided, some kept": {"cfg_scale": 0.5, "cfg_keep_tokens": (5, 9)},
    "forbid and defer": {"forbid_tokens": (120, 13), "defer_tokens": (53,)},
    "shifted": {"right_shift_logits": True},
    "threshold": {"threshold": 0.4},
    "threshold, hot": {"threshold": 0.3, "temperature": 0.5, "seed": 8},
    "factor": {"factor": 1.0},
    "entropy bound": {"remasking": "entropy", "entropy_bound": 3.0},
    "prefix": {"cache": "prefix", "steps": 12},
    "prefix, threshold": {"cache": "prefix", "threshold": 0.4},
    "dual": {"cache": "dual"},
    "dual, threshold": {"cache": "dual", "threshold": 0.4},
    "dual, factor, hot": {"cache": "dual", "factor": 0.8, "temperature": 0.7, "seed": 5},
    "dual, guided, threshold": {"cache": "dual", "cfg_scale": 0.5, "threshold": 0.4},
    "dual, refreshed": {"cache": "dual", "cache_refresh": 3, "threshold": 0.5},
    "dual, vicinity": {"cache": "dual", "cache_window": 4, "threshold": 0.4},
    "dual, uneven blocks": {"cache": "dual", "schedule": "linear", "block_length": 7},
    "prefix, uneven, refreshed": {"cache": "prefix", "schedule": "linear", "block_length": 7, "cache_refresh": 2},
    "growing": {"variable_length": True},
    "growing, guided, hot": {"variable_length": True, "cfg_scale": 0.5, "temperature": 0.5, "seed": 6},
    "growing, prefix, threshold": {"variable_length": True, "cache": "prefix", "threshold": 0.4},
    "growing, dual": {"variable_length": True, "cache": "dual", "cache_window": 4, "cache_refresh": 3},
    "growing, stop": {"variable_length": True, "stop_at_eos": True, "finish_block": True, "threshold": 0.5},
    "stop": {"stop_at_eos": True},
    "stop, hot, dual": {"stop_at_eos": True, "cache": "dual", "temperature": 1.0, "seed": 11},
}  # fmt: skip


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    lengths = (3, 7, 1, 12, 5, 0, 9, 2)
    return [torch.randint(0, 119, (n,), generator=generator).tolist() for n in lengths]


def model_for(mode: str):
    return golden_model("llada_tiny_eos" if "stop" in mode else "llada_tiny")


@pytest.mark.parametrize("mode", MODES)
def test_batch_equals_singles(mode):
    params, model = SamplingParams(**{**BASE, **MODES[mode]}), model_for(mode)
    together = generate(model, prompts(), params)
    for answer, prompt in zip(together.answers, prompts(), strict=True):
        assert torch.equal(answer, generate(model, [prompt], params).answers[0])
    assert together.tokens.shape == (8, 12 + 24)
    assert not (together.tokens == MASK).any()


def test_a_growing_canvas_is_another_one_and_feeds_less():
    """Masks behind the block change an answer; with a cache made anew in every step nothing is approximated."""
    model, asked = golden_model("llada_tiny"), SamplingParams(**BASE, variable_length=True)
    whole, grown = generate(model, prompts(), SamplingParams(**BASE)), generate(model, prompts(), asked)
    assert not torch.equal(whole.tokens, grown.tokens)
    assert grown.fed == sum(8 * (12 + end) for end in (8, 16, 24) for _ in range(8)) < whole.fed
    for cache in ("prefix", "dual"):
        fresh = replace(asked, cache=cache, cache_refresh=1)
        assert torch.equal(generate(model, prompts(), fresh).tokens, grown.tokens)
    with pytest.raises(ValueError, match="variable_length is for answers"):
        infill(model, [[5, MASK, 7]], asked)
    assert not replace(asked, stop_at_eos=True, finish_block=True).filling().variable_length


@pytest.mark.parametrize("mode", ["even", "temperature", "dual, threshold", "guided"])
def test_padded_tensor_equals_list(mode):
    params, model = SamplingParams(**{**BASE, **MODES[mode]}), model_for(mode)
    rows = prompts()
    padded = torch.full((8, 12), 77)
    mask = torch.zeros(8, 12, dtype=torch.long)
    for i, row in enumerate(rows):
        padded[i, 12 - len(row) :] = torch.tensor(row, dtype=torch.long)
        mask[i, 12 - len(row) :] = 1
    result = generate(model, padded, params, attention_mask=mask)
    assert torch.equal(result.tokens[:, :12], padded)
    assert torch.equal(result.tokens[:, 12:], torch.stack(generate(model, rows, params).answers))


@pytest.mark.parametrize("mode", ["even", "dual, threshold"])
def test_moe_batch_equals_singles(mode):
    params, model = SamplingParams(**{**BASE, **MODES[mode]}), golden_model("llada_moe_tiny")
    rows = prompts()[:4]
    together = generate(model, rows, params)
    for answer, prompt in zip(together.answers, rows, strict=True):
        assert torch.equal(answer, generate(model, [prompt], params).answers[0])


@pytest.mark.parametrize("kind", ["bert", "distilbert", "modernbert"])
def test_masked_lm_batch_equals_singles(kind):
    model = tiny_model(kind)
    params = SamplingParams(**BASE, temperature=0.7, seed=0)
    together = generate(model, prompts(), params)
    for answer, prompt in zip(together.answers, prompts(), strict=True):
        assert torch.equal(answer, generate(model, [prompt], params).answers[0])


@pytest.mark.parametrize("mode", ["even", "linear", "dual, threshold", "temperature", "guided"])
def test_templates_batch_equals_singles(mode):
    params, model = SamplingParams(**{**BASE, **MODES[mode]}), model_for(mode)
    generator = torch.Generator().manual_seed(1)
    templates = []
    for n in (9, 14, 6, 20):
        row = torch.randint(0, 119, (n,), generator=generator)
        templates.append(row.masked_fill(torch.rand(n, generator=generator) < 0.5, MASK))
        templates[-1][[0, n // 2]] = torch.tensor([n, MASK])
    together = infill(model, templates, params)
    for filled, template in zip(together.answers, templates, strict=True):
        assert torch.equal(filled, infill(model, [template], params).answers[0])
        assert torch.equal(filled[template != MASK], template[template != MASK])
        assert not (filled == MASK).any()


def test_equal_prompts_get_answers_of_their_own():
    """A group of samples of one prompt differs; its first equals the prompt alone, whatever else is in the batch."""
    params, model = SamplingParams(**BASE, temperature=1.0, seed=7), golden_model("llada_tiny")
    group = generate(model, [[5, 6], [9], [5, 6], [5, 6]], params).answers
    alone = generate(model, [[5, 6]], params).answers[0]
    assert torch.equal(group[0], alone)
    assert not torch.equal(group[0], group[2])
    assert not torch.equal(group[2], group[3])


def test_seed_none_follows_torchs_global_seed():
    params, model = SamplingParams(**BASE, temperature=1.0), golden_model("llada_tiny")
    torch.manual_seed(1)
    first, second = generate(model, [[5]], params).tokens, generate(model, [[5]], params).tokens
    torch.manual_seed(1)
    assert torch.equal(generate(model, [[5]], params).tokens, first)
    assert not torch.equal(first, second)


def test_global_generator_is_left_alone():
    params, model = SamplingParams(**BASE, temperature=1.0, remasking="random", seed=0), golden_model("llada_tiny")
    before = torch.get_rng_state()
    generate(model, [[5]], params)
    assert torch.equal(torch.get_rng_state(), before)


def test_finished_rows_leave_the_batch(monkeypatch):
    """Rows that stop early are fed no longer, and the canvas sheds the columns of the longest."""
    fed, model = [], golden_model("llada_tiny_eos")
    forward = model.forward

    def watched(tokens, *args, **kwargs):
        fed.append(tuple(tokens.shape))
        return forward(tokens, *args, **kwargs)

    monkeypatch.setattr(model, "forward", watched)
    steps = list(stream(model, prompts(), SamplingParams(**BASE, stop_at_eos=True)))
    assert len({rows for rows, _ in fed}) > 2
    lengths = torch.tensor([max(1, len(p)) + 24 for p in prompts()])
    assert fed == [(len(step.rows), int(lengths[step.rows].max())) for step in steps]


@pytest.mark.parametrize("mode", ["temperature", "random", "margin", "guided"])
def test_many_logits_are_looked_at_row_by_row(mode, monkeypatch):
    params, model = SamplingParams(**{**BASE, **MODES[mode]}), model_for(mode)
    together = generate(model, prompts(), params)
    monkeypatch.setattr("llada_core.sampling.proposals.CHUNK", 1)
    assert torch.equal(generate(model, prompts(), params).tokens, together.tokens)
