"""A step as one function of fixed shapes: compiled without a break, once for each kind of step, and equal to the plain one."""

from functools import partial

import pytest
import torch
from torch import _dynamo

from llada_core.sampling import generate
from llada_core.sampling.engine import Engine
from llada_core.sampling.params import SamplingParams
from llada_core.sampling.requests import to_answer
from tests.reference import golden_model
from tests.sampling.test_ragged import BASE, MODES

PROMPTS = ([5, 9, 30], [7], [9] * 12)
KINDS = {"even": 1, "temperature": 1, "dual": 2}


@pytest.fixture
def traced(monkeypatch):
    """Compiled as far as that is one graph without a break, and not translated into kernels, which takes a minute each."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    _dynamo.reset()
    _dynamo.utils.counters.clear()
    yield
    _dynamo.reset()


def written(model, params, prompts=PROMPTS):
    engine = Engine(model, compiled="graph")
    answers = engine.submit(to_answer(model, prompts, params)[0])
    engine.finish(answers)
    return answers


def graphs():
    return _dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("mode", KINDS)
def test_a_generation_is_one_graph_for_each_kind_of_step(traced, mode):
    model, params = golden_model("llada_tiny"), SamplingParams(**{**BASE, **MODES[mode]})
    model(torch.tensor([[5] * 64]))  # the rotary tables are there
    for answer, prompt in zip(written(model, params), PROMPTS, strict=True):
        alone = generate(model, [prompt], params)
        assert torch.equal(answer.tokens, alone.tokens[0])
        assert answer.forwards == alone.forwards
    assert graphs() == KINDS[mode]
    written(model, params, ([5, 8], [7, 1, 1, 1], [9] * 3))
    assert graphs() == KINDS[mode], "other prompts on a canvas of the same width are the same function"
    assert not _dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("mode", ["stop", "dual, threshold", "guided"])
def test_rows_that_leave_and_steps_of_other_shapes_are_written_as_without(traced, mode):
    model, params = golden_model("llada_tiny_eos"), SamplingParams(**{**BASE, **MODES[mode]})
    for answer, prompt in zip(written(model, params), PROMPTS, strict=True):
        assert torch.equal(answer.tokens, generate(model, [prompt], params).tokens[0])


def test_a_compiled_step_writes_what_the_plain_one_writes():
    model, params = golden_model("llada_tiny"), SamplingParams(**{**BASE, **MODES["temperature"]})
    model(torch.tensor([[5] * 64]))
    _dynamo.reset()
    _dynamo.utils.counters.clear()
    for answer, prompt in zip(written(model, params), PROMPTS, strict=True):
        assert torch.equal(answer.tokens, generate(model, [prompt], params).tokens[0])
    assert graphs() == 1
    _dynamo.reset()
