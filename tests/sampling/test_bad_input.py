"""A caller's mistake is one line that names the value, what is allowed, and what to do."""

import re

import pytest
import torch

from llada_core.sampling import generate, infill, stream
from llada_core.sampling.params import SamplingParams
from llada_core.settings import ConfigError
from tests.reference import golden_model
from tests.tiny import tiny_model

BASE = {"max_new_tokens": 16, "block_length": 8, "steps": 16}
LINEAR = {**BASE, "schedule": "linear"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: Input should be greater than"),
        ({"block_length": 0}, "block_length: Input should be greater than"),
        ({"steps": 0}, "steps: Input should be greater than"),
        ({"temperature": -0.1}, "temperature: Input should be greater than"),
        ({"temperature": float("nan")}, "temperature"),
        ({"threshold": -0.1}, "threshold: Input should be greater than"),
        ({"threshold": 0.0}, "threshold 0 takes every position only with a sampler of LLaDA2; set it above 0"),
        ({"threshold": 1.01}, "(got 1.01)"),
        ({"threshold": float("nan")}, "threshold"),
        ({"factor": 0.0}, "factor: Input should be greater than"),
        ({"cfg_scale": -1.0}, "cfg_scale: Input should be greater than"),
        ({"remasking": "confidence"}, "low_confidence"),
        ({"cache": "both"}, "'dual'"),
        ({"thresold": 0.9}, "did you mean 'threshold'"),
        ({"threshold": 0.9, "factor": 1.0}, "threshold and factor"),
        ({"threshold": 0.9, "remasking": "random"}, "another remasking"),
        ({"entropy_bound": 1.0}, "set remasking to 'entropy'"),
        ({"stochastic_transfer": True}, "schedule to linear or cosine"),
        ({"cfg_keep_tokens": (3,)}, "set cfg_scale above 0"),
        ({"cache_window": 4}, "needs cache 'dual'"),
        ({"cache_refresh": 4}, "needs cache"),
        ({"cache": "dual", "right_shift_logits": True}, "set cache to 'none'"),
    ],
)
def test_settings(settings, words):
    with pytest.raises(ConfigError) as error:
        SamplingParams(**{**BASE, **settings})
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("prompt", "settings", "words"),
    [
        ([], BASE, "one empty prompt"),
        (torch.zeros(0, 3, dtype=torch.long), BASE, "B of 1 or more"),
        (torch.zeros(3, dtype=torch.long), BASE, "(B, P)"),
        (torch.zeros(1, 3), BASE, "int64"),
        ([[1, 126]], BASE, "template to infill()"),
        ([[1], [1, 136]], BASE, "prompt 1 holds token id 136"),
        ([[-1]], BASE, "token id -1"),
        ([[1], [1.5]], BASE, "prompt 1 holds 1.5"),
        ([[1] * 4000], BASE, "4016 tokens"),
        ([[1]], {**BASE, "block_length": 5}, "use 4 or 8"),
        ([[1]], {**BASE, "block_length": 32}, "does not divide"),
        ([[1]], {**BASE, "steps": 15}, "use 14 or 16"),
        ([[1]], {**BASE, "steps": 1}, "use 2 or 4"),
        ([[1]], {**BASE, "max_new_tokens": 10**12}, "1000000000001 tokens is longer"),
        ([[1]], {**BASE, "steps": 10**9}, "steps 1000000000: of this model an answer takes at most 4096"),
        ([[1]], {**LINEAR, "steps": 10**30}, f"steps {10**30}: of this model an answer takes at most 4096"),
        ([[1]], {**BASE, "forbid_tokens": (999,)}, "forbid_tokens holds token id 999"),
        ([[1]], {**BASE, "defer_tokens": (-2,)}, "defer_tokens holds token id -2"),
        ([[1]], {**BASE, "forbid_tokens": tuple(range(136))}, "no token that could be produced"),
    ],
)
def test_prompts(prompt, settings, words):
    for call in (generate, stream):
        with pytest.raises(ValueError, match=re.escape(words)) as error:
            call(golden_model("llada_tiny"), prompt, SamplingParams(**settings))
        assert "\n" not in str(error.value)


def test_attention_masks():
    model, params = golden_model("llada_tiny"), SamplingParams(**BASE)
    with pytest.raises(ValueError, match="must have the prompts' shape"):
        generate(model, torch.ones(1, 3, dtype=torch.long), params, attention_mask=torch.ones(1, 4))
    with pytest.raises(ValueError, match="belongs to a prompt tensor"):
        generate(model, [[1]], params, attention_mask=torch.ones(1, 1))


def test_pinned_words():
    model, params = golden_model("llada_tiny"), SamplingParams(**BASE)
    for words, match in (
        ({16: 5}, "outside the answer 0..15"),
        ({0: 126}, "leave it out"),
        ({0: 500}, "outside the model's vocabulary"),
        (dict.fromkeys(range(16), 5), "nothing to write"),
    ):
        with pytest.raises(ValueError, match=match):
            generate(model, [[1]], params, pinned=words)


def test_templates():
    model = golden_model("llada_tiny")
    with pytest.raises(ValueError, match="nothing to fill"):
        infill(model, [[1, 126], [1, 2]], SamplingParams(**LINEAR))
    with pytest.raises(ValueError, match="template 0 has no mask id 126"):
        infill(model, [[]], SamplingParams(**LINEAR))
    with pytest.raises(ValueError, match="5000 tokens is longer than the model's"):
        infill(model, [[126] * 5000], SamplingParams(**LINEAR))
    with pytest.raises(ValueError, match="filled to its end"):
        infill(model, [[1, 126]], SamplingParams(**LINEAR, stop_at_eos=True))
    with pytest.raises(ValueError, match="template 0 holds token id 400"):
        infill(model, [[400, 126]], SamplingParams(**LINEAR))


def test_a_masked_lm_has_no_cache():
    with pytest.raises(ValueError, match="set cache 'none'"):
        generate(tiny_model("bert"), [[1]], SamplingParams(**BASE, cache="dual"))


def test_nothing_was_computed_before_the_error(monkeypatch):
    model = golden_model("llada_tiny")
    monkeypatch.setattr(model, "forward", None)
    with pytest.raises(ValueError, match="does not divide"):
        stream(model, [[1]], SamplingParams(**{**BASE, "block_length": 5}))
