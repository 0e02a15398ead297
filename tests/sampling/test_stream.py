"""What a step tells: canvas, commits, proposals, confidence, block, forwards; and where a row stops."""

from itertools import pairwise

import torch

from llada_core.sampling import generate, infill, stream, stream_infill
from llada_core.sampling.params import SamplingParams
from tests.reference import golden_model

MASK, EOS, EOT = 126, 120, 122
BASE = {"max_new_tokens": 16, "block_length": 8, "steps": 8}
PROMPTS = [[5, 9, 30], [7]]


def test_last_step_is_what_generate_returns():
    model, params = golden_model("llada_tiny"), SamplingParams(**BASE)
    steps = list(stream(model, PROMPTS, params))
    result = generate(model, PROMPTS, params)
    assert torch.equal(steps[-1].tokens, result.tokens)
    assert [step.forwards for step in steps] == list(range(1, result.forwards + 1))


def test_each_step_continues_the_last():
    steps = list(stream(golden_model("llada_tiny"), PROMPTS, SamplingParams(**BASE)))
    for step, following in pairwise(steps):
        assert torch.equal(step.tokens, following.before)
        assert torch.equal(step.open, following.before == MASK)
        assert not (step.committed & step.open).any()


def test_commits_are_proposals_inside_the_block():
    for step in stream(golden_model("llada_tiny"), PROMPTS, SamplingParams(**BASE)):
        assert torch.equal(step.tokens[step.committed], step.proposal[step.committed])
        column = torch.arange(step.tokens.shape[1])
        inside = (column >= step.block[:, :1]) & (column < step.block[:, 1:])
        assert not (step.committed & ~inside).any()
        asked = (step.before == MASK) & inside
        assert torch.equal(asked, step.proposal >= 0)
        assert torch.equal(asked, ~step.confidence.isnan())
        assert ((step.confidence[asked] > 0) & (step.confidence[asked] <= 1)).all()


def test_blocks_are_where_the_caller_sees_them():
    """Short prompts are padded on the left, so every answer begins at the same column."""
    steps = list(stream(golden_model("llada_tiny"), PROMPTS, SamplingParams(**BASE)))
    assert [step.block.tolist() for step in steps] == [[[3, 11]] * 2] * 4 + [[[11, 19]] * 2] * 4
    assert torch.equal(steps[0].before[1, :3], torch.tensor([EOS, EOS, 7]))


def test_look_ahead_adds_proposals_and_changes_nothing():
    model = golden_model("llada_tiny")
    for extra in (
        {},
        {"temperature": 1.0, "seed": 1},
        {"remasking": "random", "seed": 1},
        {"right_shift_logits": True},
    ):
        params = SamplingParams(**BASE, **extra)
        plain = list(stream(model, PROMPTS, params))
        ahead = list(stream(model, PROMPTS, params, look_ahead=True))
        for a, b in zip(plain, ahead, strict=True):
            assert torch.equal(a.tokens, b.tokens)
            assert torch.equal(b.proposal >= 0, b.before == MASK)
            assert torch.equal(a.proposal[a.proposal >= 0], b.proposal[a.proposal >= 0])


def test_look_ahead_is_left_out_of_cached_forwards():
    params = SamplingParams(**BASE, cache="dual")
    steps = list(stream(golden_model("llada_tiny"), PROMPTS, params, look_ahead=True))
    assert not (steps[0].proposal[:, 11:] >= 0).any()


def test_stop_keeps_the_text_up_to_the_end_token():
    model = golden_model("llada_tiny_eos")
    for extra in ({}, {"temperature": 1.0, "seed": 3}, {"threshold": 0.5}, {"cache": "dual"}):
        settings = {"max_new_tokens": 24, "block_length": 8, "steps": 24, **extra}
        for prompt in ([101, 49, 20], [5], [60, 61, 62, 63]):
            whole = generate(model, [prompt], SamplingParams(**settings)).answers[0]
            stopped = generate(model, [prompt], SamplingParams(**settings, stop_at_eos=True))
            end = int(torch.isin(whole, torch.tensor([EOS, EOT])).float().argmax())
            assert torch.isin(whole[end], torch.tensor([EOS, EOT]))
            assert torch.equal(stopped.answers[0][: end + 1], whole[: end + 1])
            assert (stopped.answers[0][end + 1 :] == EOS).all()
            assert stopped.forwards < generate(model, [prompt], SamplingParams(**settings)).forwards


def test_pinned_words_stand_where_they_were_put():
    model = golden_model("llada_tiny")
    result = generate(model, PROMPTS, SamplingParams(**BASE), pinned={0: 55, 9: 66})
    assert torch.equal(result.tokens[:, [3, 12]], torch.tensor([[55, 66]] * 2))
    assert result.forwards == 8
    template = torch.tensor([[5, 9, 30] + [MASK] * 16])
    template[0, [3, 12]] = torch.tensor([55, 66])
    as_template = SamplingParams(max_new_tokens=1, block_length=19, steps=7, schedule="linear")
    assert torch.equal(infill(model, template, as_template).tokens[0, [3, 12]], torch.tensor([55, 66]))


def test_streamed_infill_ends_with_the_filled_templates():
    model, params = golden_model("llada_tiny"), SamplingParams(**{**BASE, "schedule": "linear"})
    templates = [[5, MASK, MASK, 9], [MASK, 3]]
    filled = infill(model, templates, params)
    last = list(stream_infill(model, templates, params))[-1]
    assert torch.equal(last.tokens, filled.tokens)
    assert filled.answers[1].shape == (2,)
    assert filled.answers[0][[0, 3]].tolist() == [5, 9]


def test_an_empty_prompt_is_written_after_bos():
    model, params = golden_model("llada_tiny"), SamplingParams(**BASE)
    alone = generate(model, [[]], params)
    assert alone.tokens.shape == (1, 16)
    assert torch.equal(alone.tokens, generate(model, [[121]], params).tokens[:, 1:])


def test_several_turns_are_one_prompt():
    """A conversation is a longer prompt: what was answered is given, the next answer follows it."""
    model, params = golden_model("llada_tiny"), SamplingParams(**BASE)
    first = generate(model, [[5, 9]], params).tokens[0].tolist()
    second = generate(model, [[*first, 7]], params).tokens[0]
    assert second[: len(first) + 1].tolist() == [*first, 7]


def test_training_mode_comes_back():
    model = golden_model("llada_tiny")
    model.train()
    try:
        generate(model, [[5]], SamplingParams(**BASE))
        assert model.training
    finally:
        model.eval()


def test_tokens_fed_are_counted():
    model = golden_model("llada_tiny")
    exact = generate(model, [[5, 9, 30]], SamplingParams(**BASE))
    assert exact.fed == exact.forwards * (3 + 16)
    dual = generate(model, [[5, 9, 30]], SamplingParams(**BASE, cache="dual"))
    assert dual.fed == 2 * (3 + 16) + (dual.forwards - 2) * 8
    prefix = generate(model, [[5, 9, 30]], SamplingParams(**BASE, cache="prefix"))
    assert prefix.fed == 2 * (3 + 16) + 3 * 16 + 3 * 8
    assert generate(model, [[5, 9, 30]], SamplingParams(**BASE, cfg_scale=1.0)).fed == 2 * exact.fed
