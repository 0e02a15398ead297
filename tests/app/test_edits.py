"""What LLaDA2.1's sampler replaces is marked in the frames, the replay and the counts, and looked at by blocks."""

import json
import re
from types import SimpleNamespace

import numpy as np

from app import render
from app.canvas import DONE, FRESH, OPEN, REPLACED, Trace, find_runners_up
from app.chat import ComparedColumn, CompareView
from app.conversation import Conversation
from app.fill import FIRST, InfillView, SudokuView
from app.panel import Panel
from app.server.answers import Draft
from app.server.schema import SAMPLER, SamplingFields
from llada_core.sampling import stream
from llada_core.sampling.params import SamplingParams
from llada_core.sampling.requests import to_answer
from tests.reference import arrays, block_cases, golden_model
from tests.sampling.test_llada2 import NEW, params_of

CASE = "quality_b8_prompt11"


def written() -> tuple[Trace, list]:
    """A golden case as a trace, and its steps."""
    prompt = arrays(NEW)[f"{CASE}__prompt"].tolist()
    steps = list(stream(golden_model("llada21_tiny"), [prompt], params_of(NEW, CASE)))
    trace = Trace(prompt, blocks=8)
    for step in steps:
        trace.add(step)
        trace.spell(str)
    return trace, steps


def test_frames_tell_what_was_replaced_from_what_was_written():
    trace, steps = written()
    for frame, step in zip(trace.frames, steps, strict=True):
        assert ((frame.state == REPLACED) == step.replaced[0, 11:].numpy()).all()
        assert ((frame.state == OPEN) == step.open[0, 11:].numpy()).all()
    replaced = sum(int((frame.state == REPLACED).sum()) for frame in trace.frames)
    # Their count holds edits behind the answer too, in the rest of its last block, which nobody asked for.
    assert 0 < replaced <= block_cases(NEW)[CASE]["tokens_edited"]
    once = sum(int((frame.state == FRESH).sum()) for frame in trace.frames)
    assert once == 24, "a token is counted when it is first written"
    assert set(trace.frames[-1].settled().state.tolist()) == {DONE}
    last = [frame.step for frame in trace.frames if frame.state[3] in (FRESH, REPLACED)][-1]
    assert trace.committed_at[3] == last


def test_the_replay_marks_it():
    trace, _ = written()
    data = json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', render.document(trace), re.S)[1]
    )
    assert [f["s"].count("e") for f in data["frames"]] == [int((f.state == REPLACED).sum()) for f in trace.frames]
    assert 'e: "d f e"' in render.document(trace)


def test_runners_up_are_looked_at_by_blocks():
    """Whatever stands in later blocks: the likeliest token of a position is the one that was written there."""
    trace, _ = written()
    model = golden_model("llada21_tiny")
    find_runners_up(trace, model, str)
    inner = [at for at in trace.runners if at < 21]  # the last block holds masks behind the answer, written meanwhile
    assert len(inner) > 15
    for at in inner:
        assert trace.runners[at][0][0] == trace.frames[-1].tokens[at]
        np.testing.assert_allclose(trace.runners[at][0][1], trace.frames[-1].confidence[at], rtol=1e-4)


def test_a_server_tells_no_text_that_may_still_be_edited(loaded):
    params = SamplingParams(16, 8, 8, sampler="llada2.1", threshold=0.0, editing_threshold=0.0)
    prompt = loaded.tokenizer.chat_ids([{"role": "user", "content": "12 + 3"}])
    steps = list(loaded.write(prompt, params))
    assert sum(bool(step.replaced.any() and not step.open.any()) for step in steps) > 1, "edited when all was written"
    ((request,), _) = to_answer(loaded.model, [prompt], params)
    draft, told, left = Draft(loaded, request, prompt), [], iter(steps)
    while draft.finish is None:
        told.append(draft.advance(next(left, None)))
    assert "".join(told) == loaded.tokenizer.answer_text(steps[-1].tokens[0, len(prompt) :].tolist())


def test_a_request_may_name_every_setting_and_an_older_sampler():
    """What a model's settings say of editing goes with its sampler."""
    assert set(SAMPLER) - {"max_new_tokens"} <= SamplingFields.model_fields.keys()
    base = SamplingParams(64, 32, 32, sampler="llada2.1", threshold=0.7, editing_threshold=0.5)
    asked = SamplingFields(model="tiny", sampler="llada2.0", max_tokens=40)
    assert asked.settings(base) == SamplingParams(40, 32, 32, sampler="llada2.0", threshold=0.7)
    assert SamplingFields(model="tiny", editing_threshold=0.0).settings(base).editing_threshold == 0


def test_a_conversation_says_what_its_model_did_not_learn(loaded):
    chat = Conversation()
    chat.ask("12 + 3")
    for _ in chat.reply(loaded, SamplingParams(8, 8, 8, sampler="llada2.0", threshold=0.5)):
        pass
    assert "Sampler llada2.0 is for models that attend by blocks; this one sees all positions." in chat.last.note


def test_infill_sudoku_and_compare_say_it_as_well(loaded):
    index = SimpleNamespace(scores=lambda name: {}, usage=lambda name: loaded.usage)
    state = SimpleNamespace(
        loaded=lambda name: (loaded, ""), speeds={"instant": 0.0}, seconds=120.0, index=index, model="tiny"
    )
    params = SamplingParams(32, 32, 32, sampler="llada2.0", threshold=0.5)
    names = [name for name in vars(params) if name != "rule"]
    side = Panel("model", "preset", "guesses", {name: name for name in names})
    values = {name: getattr(params, name) for name in names}
    values |= {"model": "tiny", "guesses": False, "speed": "instant", "text": "a [[2]]", "pins": "", "keep": False}
    values |= {"question": "12 + 3", "left": "as in the sidebar", "right": "recommended"}
    values |= {cell: digit.replace("0", "") for cell, digit in zip(range(16), FIRST, strict=True)}
    columns = tuple(ComparedColumn("model", name, None, None, None) for name in ("left", "right"))
    views = (
        InfillView(state, side, "text", "pins", "speed").fill,
        SudokuView(state, side, list(range(16)), "keep", "speed").solve,
        CompareView(state, side, "question", "speed", columns).run,
    )
    for view in views:
        *_, last = view(values)
        doubted = [shown for shown in last if "this one sees all positions" in str(shown)]
        assert len(doubted) == 1, view  # of two that are compared, where it holds
