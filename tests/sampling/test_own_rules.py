"""Rules of one's own, named by a dotted path: a plain one, and one with a memory that takes tokens back.

The two rules at the top are what an addition is: a function, and a test.
"""

import dataclasses
from itertools import pairwise

import pytest
import torch

from llada_core.sampling import generate, infill, stream
from llada_core.sampling.params import SamplingParams, as_values
from llada_core.sampling.proposals import Confidence
from llada_core.sampling.unmask import ending, ranks, rule_of
from llada_core.settings import ConfigError
from llada_core.training.params import GRPOParams
from tests.reference import golden_model
from tests.sampling.test_ragged import BASE, MASK, prompts

HERE = "tests.sampling.test_own_rules."
STOPPING = "llada_tiny_eos"


def leftmost(scores, is_open, state):
    """Writes from left to right, two at a time."""
    return is_open & (is_open.cumsum(1) <= 2), None, state


def remask(scores, is_open, state):
    """Writes the two surest, and takes back the least sure token of the block while an open one is surer than it was.

    In the spirit of ReMDM's confidence-based remasking (arXiv:2503.00307): `sure` (B, W) remembers how sure each token
    was when it was written, 0 where there is none.
    """
    sure = state.get("sure", torch.zeros_like(scores.value))
    commit = is_open & (ranks(scores.key) < 2)
    least = torch.where(sure > 0, sure, torch.inf)
    back = (sure > 0) & (least == least.amin(1, keepdim=True)) & (sure < scores.value.amax(1, keepdim=True))
    sure = torch.where(commit, scores.value, sure).masked_fill(back, 0.0)
    return commit, back, {"sure": sure}


def greedy(scores, is_open, state):
    """Writes everything and takes everything back, whether it may or not."""
    return torch.ones_like(is_open), torch.ones_like(is_open), state


def restless(scores, is_open, state):
    """Writes one token and takes all others back, for ever."""
    return is_open & (ranks(scores.key) == 0), ~is_open, state


def idle(scores, is_open, state):
    """Writes nothing."""
    return torch.zeros_like(is_open), None, state


SETTINGS = {
    "leftmost": {"rule": HERE + "leftmost"},
    "leftmost, hot": {"rule": HERE + "leftmost", "temperature": 1.0, "remasking": "random", "seed": 2},
    "remask": {"rule": HERE + "remask"},
    "remask, uneven blocks": {"rule": HERE + "remask", "block_length": 7},
    "remask, hot": {"rule": HERE + "remask", "temperature": 0.7, "seed": 5},
    "remask, prefix": {"rule": HERE + "remask", "cache": "prefix"},
    "remask, dual, refreshed": {"rule": HERE + "remask", "cache": "dual", "cache_refresh": 2},
    "remask, guided": {"rule": HERE + "remask", "cfg_scale": 0.5},
    "remask, stop": {"rule": HERE + "remask", "stop_at_eos": True},
    "restless": {"rule": HERE + "restless"},
    "idle": {"rule": HERE + "idle"},
}


NEWER = {
    "rule",
    "sampler",
    "editing_threshold",
    "max_post_steps",
    "num_to_transfer",
    "finish_block",
    "top_k",
    "top_p",
    "variable_length",
}


def settings(mode):
    return SamplingParams(**{**BASE, **SETTINGS[mode]})


@pytest.mark.parametrize("mode", SETTINGS)
def test_a_batch_of_eight_equals_eight_singles_and_ends(mode):
    model, params = golden_model(STOPPING if "stop" in mode else "llada_tiny"), settings(mode)
    together = generate(model, prompts(), params)
    assert not (together.tokens == MASK).any()
    for answer, prompt in zip(together.answers, prompts(), strict=True):
        alone = generate(model, [prompt], params)
        assert torch.equal(answer, alone.answers[0])
        assert alone.forwards <= 2 * params.max_new_tokens


def test_a_plain_rule_writes_where_it_says():
    steps = list(stream(golden_model("llada_tiny"), [[5, 9, 30]], settings("leftmost")))
    assert [step.committed[0].nonzero()[:, 0].tolist() for step in steps] == [[3 + i, 4 + i] for i in range(0, 24, 2)]


@pytest.mark.parametrize("mode", ["remask", "remask, hot", "remask, dual, refreshed"])
def test_a_taken_back_token_is_a_mask_again_and_is_written_anew(mode):
    steps = list(stream(golden_model("llada_tiny"), prompts(), settings(mode)))
    assert any(step.taken_back.any() for step in steps)
    for step, following in pairwise(steps):
        assert torch.equal(step.tokens, following.before)
        assert (step.tokens[step.taken_back] == MASK).all()
        assert not (step.committed & step.taken_back).any()
        assert torch.equal(step.tokens[step.committed], step.proposal[step.committed])
        column = torch.arange(step.tokens.shape[1])
        inside = (column >= step.block[:, :1]) & (column < step.block[:, 1:])
        assert not ((step.committed | step.taken_back) & ~inside).any()
    assert not steps[-1].open.any()


def test_what_was_given_is_never_taken_back():
    template = [[5, MASK, 9, MASK, MASK, 30, MASK, MASK, 7], [MASK, 8, MASK]]
    for rule in ("remask", "greedy", "restless"):
        filled = infill(golden_model("llada_tiny"), template, SamplingParams(**BASE, rule=HERE + rule))
        for answer, row in zip(filled.answers, template, strict=True):
            given = torch.tensor(row) != MASK
            assert torch.equal(answer[given], torch.tensor(row)[given])


def test_a_block_of_n_masks_takes_less_than_2n_steps():
    """Here each block of 8 has 8 steps in which tokens come back, and is filled in the 7 after them."""
    steps = list(stream(golden_model("llada_tiny"), [[5]], settings("restless")))
    assert [int(step.taken_back.sum()) for step in steps] == ([0] + [1] * 7 + [0] * 7) * 3


def test_a_rule_that_writes_nothing_writes_the_surest():
    steps = list(stream(golden_model("llada_tiny"), [[5]], settings("idle")))
    assert [int(step.committed.sum()) for step in steps] == [1] * 24
    one_by_one = generate(golden_model("llada_tiny"), [[5]], SamplingParams(**BASE))
    assert torch.equal(steps[-1].tokens, one_by_one.tokens)


def test_an_ending_rule_reopens_only_what_was_open_when_the_block_began():
    values = torch.tensor([[0.9, -torch.inf, 0.8, 0.7]], dtype=torch.float64)
    scores, rule = Confidence(values, values), ending(greedy)
    commit, back, state = rule(scores, torch.tensor([[True, False, True, True]]), {})
    assert (commit.tolist(), back.tolist()) == ([[True, False, True, True]], [[False] * 4])
    for step in range(1, 4):
        commit, back, state = rule(scores, torch.tensor([[True, False, False, True]]), state)
        assert commit.tolist() == [[True, False, False, True]]
        assert back.tolist() == [[False, False, step < 3, False]], "three masks: three steps may take tokens back"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"rule": "leftmost"}, "or package.module.function"),
        ({"rule": HERE + "leftmots"}, "did you mean 'leftmost'"),
        ({"rule": "no_such_package.rules.mine"}, "no module named 'no_such_package'"),
    ],
)
def test_a_path_without_a_function_is_one_line(values, words):
    with pytest.raises(ConfigError, match=words) as error:
        rule_of(SamplingParams(**BASE, **values))
    assert "\n" not in str(error.value)


def test_two_rules_are_refused():
    with pytest.raises(ConfigError, match="threshold and rule are rules for one choice"):
        SamplingParams(**BASE, threshold=0.9, rule=HERE + "leftmost")


def test_a_checkpoint_from_before_there_was_a_rule_knows_its_settings_again():
    """GRPO's checkpoints hash these values: a setting that is newer must be left out while it says nothing."""
    block = {"max_steps": 1, "beta": 0.0, "sampling": BASE}
    before = {
        "max_new_tokens": 24, "block_length": 8, "steps": 24, "temperature": 0.0, "remasking": "low_confidence",
        "cfg_scale": 0.0, "threshold": None, "factor": None, "cache": "none", "forbid_tokens": [], "defer_tokens": [],
        "stop_at_eos": False, "seed": None, "entropy_bound": None, "schedule": "even", "stochastic_transfer": False,
        "cfg_keep_tokens": [], "cache_refresh": None, "cache_window": 0, "right_shift_logits": False,
    }  # fmt: skip
    assert GRPOParams.parse(block, "grpo").determining()["sampling"] == before
    own = GRPOParams.parse({**block, "sampling": {**BASE, "rule": HERE + "remask"}}, "grpo")
    assert own.determining()["sampling"] == {**before, "rule": HERE + "remask"}
    assert before.keys() | NEWER == {field.name for field in dataclasses.fields(SamplingParams)}


def test_receipts_name_a_rule_only_where_there_is_one():
    """A receipt may be read by an older checkout that shares the same home."""
    values = as_values(SamplingParams(**BASE))
    assert values == {k: v for k, v in dataclasses.asdict(SamplingParams(**BASE)).items() if k not in NEWER}
    assert SamplingParams(**as_values(settings("remask"))) == settings("remask")
