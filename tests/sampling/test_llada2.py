"""The samplers of LLaDA2.0 and 2.1 against the published ones: tokens, forwards, and the canvas of every forward."""

import dataclasses

import pytest
import torch

from llada_core.modeling import load_model
from llada_core.modeling.families import FAMILIES
from llada_core.sampling import generate, infill, stream
from llada_core.sampling.engine import Engine
from llada_core.sampling.params import RECOMMENDED, SamplingParams, preset
from llada_core.sampling.proposals import Confidence
from llada_core.sampling.requests import to_answer
from llada_core.sampling.unmask import edit, quota
from llada_core.settings import ConfigError
from llada_core.usage import Usage
from tests.reference import BLOCKS, GOLDEN, arrays, block_cases, golden_model

OLD, NEW = "sampler_llada2", "sampler_llada21"
ALL = [(file, name) for file in (OLD, NEW) for name in block_cases(file) if name != "batch2"]
MODELS = {OLD: "llada2_tiny", NEW: "llada21_tiny"}


def params_of(file: str, name: str, **changes) -> SamplingParams:
    """A case in our words: their `steps` are bounded by minimal_topk, and 2.0 always stops once a block is whole."""
    case = block_cases(file)[name]
    values = {
        "max_new_tokens": case["gen_length"],
        "block_length": case["block_length"],
        "threshold": case["threshold"],
    }
    if file == NEW:
        names = ("editing_threshold", "max_post_steps", "num_to_transfer")
        values |= {
            "sampler": "llada2.1",
            "steps": 1,
            "stop_at_eos": case["eos_early_stop"],
            **{n: case[n] for n in names},
        }
    else:
        steps = min(case["steps"], case["gen_length"] // case["minimal_topk"])
        early = case.get("eos_early_stop", False)
        values |= {"sampler": "llada2.0", "steps": steps, "stop_at_eos": True, "finish_block": not early}
    return SamplingParams(**{**values, **changes})


def fed_by(model, monkeypatch) -> list[torch.Tensor]:
    """What every forward is fed from now on."""
    fed, forward = [], model.forward

    def watched(tokens, *args, **how):
        fed.append(tokens.clone())
        return forward(tokens, *args, **how)

    monkeypatch.setattr(model, "forward", watched)
    return fed


def assert_answer(answer: torch.Tensor, theirs: torch.Tensor, *, stopped: bool) -> None:
    """They cut after the first end token; where ours has stopped there, the rest of its room is end tokens."""
    assert torch.equal(answer[: len(theirs)], theirs)
    if len(theirs) < len(answer):
        assert theirs[-1] == BLOCKS.eos_id
        assert not stopped or (answer[len(theirs) :] == BLOCKS.eos_id).all()


@pytest.mark.parametrize(("file", "name"), ALL)
def test_tokens_forwards_and_every_canvas(file, name, monkeypatch):
    data, case, params = arrays(file), block_cases(file)[name], params_of(file, name)
    model, prompt = golden_model(MODELS[file]), data[f"{name}__prompt"][None]
    fed = fed_by(model, monkeypatch)
    result = generate(model, prompt, params)
    assert result.forwards == case["nfe"]
    canvases = [row[row >= 0] for row in data[f"{name}__trajectory"]]
    assert len(fed) == len(canvases)
    assert all(torch.equal(ours[0], theirs) for ours, theirs in zip(fed, canvases, strict=True))
    assert_answer(result.answers[0], data[f"{name}__output"], stopped=params.stop_at_eos)


@pytest.mark.parametrize(("file", "name"), ALL)
def test_cached_the_same_and_a_finished_block_is_fed_once_more_and_never_again(file, name, monkeypatch):
    data, case, params = arrays(file), block_cases(file)[name], params_of(file, name, cache="prefix")
    model, prompt = golden_model(MODELS[file]), data[f"{name}__prompt"][None]
    fed = fed_by(model, monkeypatch)
    result = generate(model, prompt, params)
    assert result.forwards == case["nfe"]
    assert_answer(result.answers[0], data[f"{name}__output"], stopped=params.stop_at_eos)
    block, width = params.block_length, prompt.shape[1]
    assert fed[0].shape[1] == (width // block + 1) * block
    assert {tokens.shape[1] for tokens in fed[1:]} <= {block, 2 * block}


@pytest.mark.parametrize("name", [n for n in block_cases(OLD) if n.startswith(("eos", "b8_prompt11"))])
def test_without_a_stop_the_whole_room_is_written(name):
    case, prompt = block_cases(OLD)[name], arrays(OLD)[f"{name}__prompt"]
    result = generate(
        golden_model("llada2_tiny"), prompt[None], params_of(OLD, name, stop_at_eos=False, finish_block=False)
    )
    canvas = arrays(OLD)[f"{name}__canvas_without_eos_stop"][len(prompt) :]
    assert torch.equal(result.answers[0], canvas[: case["gen_length"]])
    assert result.forwards == case["nfe_without_eos_stop"]


def test_two_rows_at_once_are_the_published_ones():
    data = arrays(OLD)
    params = params_of(OLD, "batch2", stop_at_eos=False, finish_block=False)
    result = generate(golden_model("llada2_tiny"), data["batch2__prompt"], params)
    for answer, canvas in zip(result.answers, data["batch2__canvas_without_eos_stop"], strict=True):
        assert torch.equal(answer, canvas[11 : 11 + 16])


PROMPTS = [
    torch.randint(0, 150, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (3, 8, 1, 17, 5, 0, 9, 24)
]
MODES = {
    "2.0": {"sampler": "llada2.0", "threshold": 0.6},
    "2.0, cached": {"sampler": "llada2.0", "threshold": 0.6, "cache": "prefix"},
    "2.0, hot, cached": {"sampler": "llada2.0", "threshold": 0.3, "temperature": 0.7, "seed": 1, "cache": "prefix"},
    "2.0, guided, cached": {"sampler": "llada2.0", "threshold": 0.4, "cfg_scale": 0.5, "cache": "prefix"},
    "2.1": {"sampler": "llada2.1", "threshold": 0.7, "editing_threshold": 0.5},
    "2.1, cached": {"sampler": "llada2.1", "threshold": 0.5, "editing_threshold": 0.0, "cache": "prefix"},
    "2.1, stop, cached": {"sampler": "llada2.1", "threshold": 0.6, "stop_at_eos": True, "cache": "prefix"} | {
        "editing_threshold": 0.5
    },
    "even, cached": {"cache": "prefix"},
    "linear": {"schedule": "linear", "steps": 6},
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_of_eight_ragged_prompts_equals_eight_singles(mode):
    params = SamplingParams(**{"max_new_tokens": 20, "block_length": 8, "steps": 8, **MODES[mode]})
    model = golden_model("llada21_tiny" if "2.1" in mode else "llada2_tiny")
    together = generate(model, PROMPTS, params)
    assert not (together.tokens == BLOCKS.mask_id).any()
    for answer, prompt in zip(together.answers, PROMPTS, strict=True):
        assert torch.equal(answer, generate(model, [prompt], params).answers[0])


@pytest.mark.parametrize(("rows", "compiled"), [pytest.param(4, "graph", marks=pytest.mark.slow), (9, "off")])
def test_random_arrivals_are_answered_as_alone(monkeypatch, rows, compiled):
    """Of all modes and block lengths, with prompts of several blocks that join amid others, some left half written.

    A compiled step has seats in which nothing is written; experts in float32 are not compiled themselves.
    """
    monkeypatch.setattr(torch, "compile", lambda step, **_: step)
    monkeypatch.setattr("llada_core.sampling.batch.compiles", lambda _: True)
    model, generator = golden_model("llada2_tiny"), torch.Generator().manual_seed(rows)
    engine, asked, written = Engine(model, rows=rows, compiled=compiled), [], []
    for number in range(45):
        length = int(torch.randint(0, 60 if number % 5 == 0 else 20, (), generator=generator))
        prompt = torch.randint(0, 150, (length,), generator=generator).tolist()
        values = {"max_new_tokens": 12 + number % 9, "block_length": 8 if number % 6 else 4, "steps": 8}
        asked.append((prompt, SamplingParams(**{**values, **MODES[[*MODES][number % len(MODES)]]})))
    gone = []
    while len(written) < len(asked) or engine.busy:
        for prompt, params in asked[len(written) :][: int(torch.randint(0, 4, (), generator=generator))]:
            written += engine.submit(to_answer(model, [prompt], params)[0], watched=True)
        engine.step()
        if engine.active and len(gone) < 5 and torch.rand((), generator=generator) < 0.1:
            gone.append(engine.active[0])
            engine.cancel(gone[-1])
    for (prompt, params), answer in zip(asked, written, strict=True):
        if answer in gone:
            continue
        alone = generate(model, [prompt], params)
        assert torch.equal(answer.tokens[len(prompt) :], alone.answers[0]), (prompt, params)
        assert answer.forwards == alone.forwards_each[0]
        assert torch.equal(answer.steps[-1].tokens[0], answer.tokens)


def test_a_long_prompt_that_joins_is_fed_alone():
    """The others would else be fed windows as long as it."""
    model, params = golden_model("llada2_tiny"), params_of(OLD, "b8_divides", cache="prefix")
    engine = Engine(model)
    engine.submit(to_answer(model, [[5] * 8, [6] * 9, [7] * 3], params)[0])
    engine.step()
    before = engine.fed
    engine.submit(to_answer(model, [[9] * 100], params)[0])
    engine.step()
    assert engine.fed - before <= 4 * 16 + 104


@torch.no_grad()
@pytest.mark.parametrize(("file", "name"), [(OLD, "b8_prompt11"), (OLD, "b32_prompt37"), (NEW, "quality_b8_prompt11")])
def test_the_cache_is_exact(file, name, monkeypatch):
    """In float64: what every step is given differs by rounding alone."""
    model = load_model(GOLDEN / MODELS[file], special_tokens=BLOCKS, dtype=torch.float64).eval()
    given, forward = [], model.forward

    def watched(*args, **how):
        found = forward(*args, **how)
        given.append(found.logits)
        return found

    monkeypatch.setattr(model, "forward", watched)
    prompt, seen, tokens = arrays(file)[f"{name}__prompt"][None], {}, {}
    for cache in ("none", "prefix"):
        given.clear()
        tokens[cache] = generate(model, prompt, params_of(file, name, cache=cache)).tokens
        seen[cache] = list(given)
    assert torch.equal(tokens["none"], tokens["prefix"])
    for plain, cached in zip(seen["none"], seen["prefix"], strict=True):
        torch.testing.assert_close(plain, cached, atol=1e-12, rtol=0)


def test_an_end_token_in_the_prompt_ends_nothing():
    """The published early stop finds that one first, and returns nothing (golden quirk_eos_in_prompt)."""
    data = arrays(OLD)
    params = SamplingParams(32, 8, 8, sampler="llada2.0", threshold=0.6, stop_at_eos=True)
    answer = generate(golden_model("llada2_tiny"), data["quirk_eos_in_prompt__prompt"][None], params).answers[0]
    assert_answer(answer, data["quirk_eos_in_prompt__sensible_output"], stopped=True)


def test_steps_show_what_is_asked_for_and_mark_what_was_replaced():
    data, params = arrays(NEW), params_of(NEW, "quality_b8_prompt11")
    prompt = data["quality_b8_prompt11__prompt"][None]
    steps = list(stream(golden_model("llada21_tiny"), prompt, params))
    assert {tuple(step.tokens.shape) for step in steps} == {(1, 11 + 24)}
    # Their count holds edits in the tail of the last block too, which nobody asked for.
    replaced = sum(int(step.replaced.sum()) for step in steps)
    assert 0 < replaced <= block_cases(NEW)["quality_b8_prompt11"]["tokens_edited"]
    assert not any(step.replaced[:, :11].any() for step in steps)
    for step in steps:
        assert torch.equal(step.tokens[step.replaced], step.proposal[step.replaced])
        assert (step.tokens[step.replaced] != step.before[step.replaced]).all()


def test_a_template_is_filled_by_blocks_and_nothing_given_is_edited():
    mask = BLOCKS.mask_id
    template = [5, mask, 9, mask, mask, 30, mask, mask, 7, 2, mask]
    params = SamplingParams(1, 4, 4, sampler="llada2.1", threshold=0.3, editing_threshold=0.0)
    filled = infill(golden_model("llada21_tiny"), [template], params).answers[0]
    given = torch.tensor(template) != mask
    assert torch.equal(filled[given], torch.tensor(template)[given])
    assert not (filled == mask).any()


def sure(*values: float) -> Confidence:
    return Confidence(torch.tensor([values], dtype=torch.float64), torch.tensor([values], dtype=torch.float64))


SHUT = -torch.inf


def test_rules_hand_to_hand():
    is_open = torch.tensor([[True, True, False, True]])
    written, back, state = quota(sure(0.9, 0.95, SHUT, 0.99), is_open, {}, value=0.95, least=(1, 1))
    assert (written.tolist(), back, state["step"].tolist()) == ([[False, True, False, True]], None, [1])  # two surest
    written, _, _ = quota(sure(0.9, 0.96, SHUT, 0.99), is_open, state, value=0.95, least=(1, 1))
    assert written.tolist() == [[False, True, False, True]]  # strictly above, as many as they are

    written, _, _ = quota(sure(0.9, 0.95, SHUT, 0.96), is_open, {}, value=0.95, least=(1, 0))
    assert written.tolist() == [[False, False, False, True]]  # as sure as it is no more

    numbers = {"value": 0.5, "editing": 0.2, "least": 1, "most": 2}
    written, _, state = edit(sure(0.6, 0.1, 0.3, 0.1), torch.tensor([[True, True, False, False]]), {}, **numbers)
    assert (written.tolist(), state["held"].tolist()) == ([[True, False, True, False]], [False])  # written and edited
    nothing_open = torch.zeros(1, 4, dtype=torch.bool)
    written, _, state = edit(sure(SHUT, 0.1, SHUT, SHUT), torch.tensor([[False, True, False, False]]), state, **numbers)
    assert (written.tolist(), state["held"].tolist()) == ([[False, True, False, False]], [True])
    written, _, state = edit(sure(SHUT, SHUT, 0.9, SHUT), nothing_open, state, **numbers)
    assert (written.tolist(), state["held"].tolist()) == ([[False, False, True, False]], [True])
    _, _, after = edit(sure(SHUT, SHUT, 0.9, SHUT), nothing_open, state, **numbers)
    assert after["held"].tolist() == [False]  # two looks after it became whole
    _, _, after = edit(sure(SHUT, SHUT, 0.1, SHUT), nothing_open, {"looks": torch.tensor([1])}, **numbers)
    assert after["held"].tolist() == [False]  # nothing was edited


BASE = {"max_new_tokens": 32, "block_length": 32, "steps": 32}


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"sampler": "llada2.0"}, "sampler 'llada2.0' needs a threshold; 0.95 is published"),
        (
            {"sampler": "llada2.1", "threshold": 0.5, "editing_threshold": 0.7},
            "editing_threshold 0.7 is above threshold",
        ),
        ({"editing_threshold": 0.5}, "editing_threshold 0.5 is for the sampler llada2.1"),
        (
            {"sampler": "llada2.0", "threshold": 0.5, "max_post_steps": 3},
            "max_post_steps 3 is for the sampler llada2.1",
        ),
        ({"finish_block": True}, "finish_block says when stop_at_eos stops"),
        ({"sampler": "llada2.2", "threshold": 0.5}, "sampler"),
        ({"sampler": "llada2.0", "threshold": 0.5, "factor": 1.0}, "threshold and factor are rules for one choice"),
        ({"sampler": "llada2.1", "threshold": 0.5, "editing_threshold": -0.1}, "editing_threshold"),
        ({"sampler": "llada2.0", "threshold": 0.5, "remasking": "entropy"}, "judges probabilities"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(values, told):
    with pytest.raises(ConfigError, match=told) as error:
        SamplingParams(**BASE, **values)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"cache": "dual"}, "cache 'dual' keeps what follows the block, which this model never sees"),
        ({"cache": "prefix", "cache_refresh": 2}, "this model's cache is exact"),
        ({"right_shift_logits": True}, "right_shift_logits reads the position before a block"),
    ],
)
def test_what_attention_by_blocks_cannot_do_is_one_line(values, told):
    with pytest.raises(ValueError, match=told):
        generate(golden_model("llada2_tiny"), [[5]], SamplingParams(**BASE, **values))


def test_what_the_model_did_not_learn_is_allowed_and_said():
    old, new = (Usage(sampling=RECOMMENDED[n]) for n in ("llada2.0", "speed"))
    assert new.doubts(new.sampling, 32) == old.doubts(old.sampling, 32) == new.doubts(old.sampling, 32) == []
    assert old.doubts(new.sampling, 32) == [
        "sampler llada2.1 edits what is written, which this model does not say it was taught (LLaDA2.1)"
    ]
    shorter = dataclasses.replace(old.sampling, block_length=8)
    assert old.doubts(shorter, 32) == ["block_length 8: this model was trained with blocks of 32"]
    assert Usage().doubts(old.sampling, None) == [
        "sampler llada2.0 is for models that attend by blocks; this one sees all positions"
    ]
    assert not Usage().doubts(Usage().sampling, None)


def test_lengths_and_presets_leave_the_blocks_as_they_were_trained():
    params = SamplingParams(512, 32, 32, sampler="llada2.1", threshold=0.7, editing_threshold=0.5, cache="prefix")
    assert params.at_length(7) == dataclasses.replace(params, max_new_tokens=7)
    assert preset("fast", params) == params
    assert preset("speed", params) == dataclasses.replace(
        params, threshold=0.5, editing_threshold=0.0, stop_at_eos=True
    )
    with pytest.raises(ValueError, match="for models with a sampler of their own"):
        preset("quality", SamplingParams(**BASE))
    exact = preset("exact", params)
    assert (exact.sampler, exact.threshold, exact.block_length, exact.steps) == ("llada2.0", 1.0, 32, 32)
    model = golden_model("llada21_tiny")
    assert generate(model, [[5]], dataclasses.replace(exact, max_new_tokens=31)).forwards == 31


def test_a_folder_that_says_nothing_is_asked_as_its_family_recommends(tmp_path):
    """2.0 and 2.1 have the same files: 2.0 unless the folder's usage.json says otherwise."""
    found = Usage.load(GOLDEN / "llada2_tiny").sampling
    assert (found.sampler, found.threshold, found.cache, found.stop_at_eos) == ("llada2.0", 0.95, "prefix", True)
    made = {name: RECOMMENDED[name] for name in FAMILIES["llada2"].recommended}
    assert {name: (p.sampler, p.threshold, p.editing_threshold) for name, p in made.items()} == {
        "llada2.0": ("llada2.0", 0.95, 0.9), "quality": ("llada2.1", 0.7, 0.5), "speed": ("llada2.1", 0.5, 0.0),
    }  # fmt: skip
    (tmp_path / "config.json").write_bytes((GOLDEN / "llada2_tiny" / "config.json").read_bytes())
    Usage(sampling=made["speed"]).save(tmp_path)
    assert Usage.load(tmp_path).sampling == made["speed"]
    assert Usage.load(GOLDEN / "llada_tiny") is None
    newer = tmp_path / "LLaDA2.1-mini"
    newer.mkdir()
    (newer / "config.json").write_bytes((GOLDEN / "llada2_tiny" / "config.json").read_bytes())
    assert Usage.load(newer).sampling == made["quality"]
