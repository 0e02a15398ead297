"""A step as one function of fixed shapes: compiled without a break, once for each kind of step, and equal to the plain one."""

import threading
from collections.abc import Callable
from copy import deepcopy
from dataclasses import is_dataclass
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, _dynamo

from llada_core.sampling import generate
from llada_core.sampling.engine import Engine
from llada_core.sampling.params import SamplingParams
from llada_core.sampling.query import columns, seats
from llada_core.sampling.requests import to_answer
from tests.reference import golden_model
from tests.sampling.test_own_rules import SETTINGS as OWN
from tests.sampling.test_ragged import BASE, MODES

PROMPTS = ([5, 9, 30], [7], [9] * 12)
ROOM = {"max_new_tokens": 24, "block_length": 8, "threshold": 0.7}
EDITS = {"sampler": "llada2.1", "steps": 1, "editing_threshold": 0.5}
BY_BLOCKS = {
    "blocks": {**ROOM, "sampler": "llada2.0", "steps": 8},
    "blocks, cached": {**ROOM, "sampler": "llada2.0", "steps": 8, "cache": "prefix"},
    "blocks, edited": {**ROOM, **EDITS},
    "blocks, edited, cached": {**ROOM, **EDITS, "cache": "prefix"},
    "blocks, guided, cached": {**ROOM, "sampler": "llada2.0", "steps": 8, "cache": "prefix", "cfg_scale": 0.5},
}
# Functions for each number of seats: what a step feeds, and once more where a rule remembers nothing yet.
KINDS = {
    "temperature": 1,
    "guided": 1,
    "dual": 2,
    "dual, threshold": 3,
    "prefix": 3,
    "growing": 1,
    "growing, dual": 3,
    "blocks": 2,
    "blocks, edited, cached": 4,
}


def without_host(graph: torch.fx.GraphModule, _: Any, **__: Any) -> Callable[..., Any]:
    """The graph as it is, not translated into kernels, which takes a minute each; and nothing in it is the host's.

    One with a tensor of the CPU's is not captured on a GPU, and one that asks for a value ends there.
    """
    nodes = list(graph.graph.nodes)
    assert not [node for node in nodes if node.target in (torch.tensor, torch.as_tensor, "item", "tolist", "cpu")]
    casts = [node for node in nodes if node.target == "to"]
    assert not [n for n in casts if any(isinstance(x, torch.device) for x in (*n.args, *n.kwargs.values()))]
    return graph.forward


@pytest.fixture
def traced(monkeypatch):
    """Compiled as far as that is one graph without a break, of which nothing is the host's."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=without_host))
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


def arriving(model, params, lengths, rows, every):
    """The most seats that there were for prompts of these lengths, of which one comes after so many steps, and one is given up."""
    engine, answers, most = Engine(model, rows=rows, compiled="graph"), [], 0
    for number, length in enumerate(lengths):
        answers += engine.submit(to_answer(model, [[number + 5] * length], params)[0])
        for _ in range(every):
            engine.step()
            most = max(most, *(len(batch.rows) for batch in engine.batches), 0)
        if number == 4:
            engine.cancel(answers[2])
    engine.finish([answer for answer in answers if not answer.cancelled])
    for number, (answer, length) in enumerate(zip(answers, lengths, strict=True)):
        if not answer.cancelled:
            alone = generate(model, [[number + 5] * length], params)
            assert torch.equal(answer.tokens[: len(alone.tokens[0])], alone.tokens[0])
            assert answer.forwards == alone.forwards
    return most


def case(mode, model="llada_tiny"):
    """A model, and settings that it can be asked with."""
    if mode in BY_BLOCKS:
        return deepcopy(golden_model(model)).by_blocks(8), SamplingParams(**BY_BLOCKS[mode])
    return golden_model(model), SamplingParams(**{**BASE, **{**MODES, **OWN}[mode]})


LENGTHS = [3, 17, 9, 30, 1, 12, 25, 4, 8]


SLOW = ("prefix", "blocks")  # seconds of tracing, and nothing that the other modes have not


@pytest.mark.parametrize("mode", [pytest.param(mode, marks=[pytest.mark.slow] * (mode in SLOW)) for mode in KINDS])
def test_rows_that_join_and_leave_are_written_by_one_function_for_each_number_of_seats(traced, mode):
    model, params = case(mode)
    model(torch.tensor([[5] * 64]))  # the rotary tables are there
    assert arriving(model, params, LENGTHS, rows=2, every=3) == 2
    arriving(model, params, LENGTHS[::-1], rows=2, every=3)
    assert graphs() <= 2 * KINDS[mode], "one seat and two"
    assert not _dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("mode", [*MODES, *OWN, *BY_BLOCKS])
def test_every_mode_is_written_on_seats_as_alone(monkeypatch, mode):
    monkeypatch.setattr(torch, "compile", lambda step, **_: step)
    assert arriving(*case(mode, "llada_tiny_eos"), LENGTHS, rows=7, every=1) > 1


def test_experts_in_float32_are_written_by_the_plain_step_of_a_compiling_engine():
    model, params = golden_model("llada_moe_tiny"), SamplingParams(**BASE)
    for answer, prompt in zip(written(model, params), PROMPTS, strict=True):
        assert torch.equal(answer.tokens, generate(model, [prompt], params).tokens[0])


def test_seats_and_columns_are_few():
    assert [seats(n) for n in (1, 2, 3, 5, 33, 64, 65)] == [1, 2, 4, 8, 64, 64, 128]
    widths = {columns(n) for n in range(1, 4097)}
    assert len(widths) == 20
    assert all(0 <= columns(n) - n < max(64, n / 4) for n in range(1, 4097))


def test_what_is_refused_counts_the_seats_of_a_compiled_step():
    model, params = golden_model("llada_tiny"), SamplingParams(**BASE)
    engine = Engine(model, positions=60, compiled="graph")
    with pytest.raises(ValueError, match="a canvas of 64 tokens is larger than the 60 that fit here"):
        engine.submit(to_answer(model, [[5]], params)[0])


def test_what_an_engine_may_take_is_told_before():
    model = golden_model("llada_tiny")
    assert Engine(model, rows=4, positions=1000).told() == (
        "4 answers at once over 1,000 positions; with a cache 1,024 bytes a position, 0.00 GB at most"
    )
    told = Engine(model, rows=64, positions=1000, compiled="graph").told()
    assert "compile graph: at most 7 x 4 shapes of rows and columns, with a cache several functions each" in told


@pytest.mark.slow
def test_a_compiled_step_writes_what_the_plain_one_writes():
    model, params = golden_model("llada_tiny"), SamplingParams(**{**BASE, **MODES["temperature"]})
    model(torch.tensor([[5] * 64]))
    _dynamo.reset()
    _dynamo.utils.counters.clear()
    for answer, prompt in zip(written(model, params), PROMPTS, strict=True):
        assert torch.equal(answer.tokens, generate(model, [prompt], params).tokens[0])
    assert graphs() == 1
    _dynamo.reset()


class Captured:
    """A step as torch keeps a captured graph: what it returned lies in memory that its next run writes over."""

    threads: ClassVar[set[int]] = set()

    def __init__(self, step: Callable[..., Any], **_: Any) -> None:
        self.step, self.pool = step, []

    def __call__(self, *arguments: Any) -> Any:
        self.threads.add(threading.get_ident())
        batch = self.step.__self__
        given = [*tensors(arguments), *(x for part in batch.parts for x in tensors([part.state, part.noise]))]
        pool = {x.untyped_storage().data_ptr() for x in self.pool}
        assert not pool & {x.untyped_storage().data_ptr() for x in given}, "fed from the graph's own memory"
        for kept in self.pool:
            kept.fill_(77)
        result = self.step(*arguments)
        mine = [x for part in batch.parts for x in tensors([part.state, part.noise])]
        old = {x.untyped_storage().data_ptr() for x in given}
        self.pool = [x for x in (*tensors([result]), *mine) if x.untyped_storage().data_ptr() not in old]
        return result


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return tensors(list(value.values()))
    if isinstance(value, list | tuple):
        return [x for each in value for x in tensors(each)]
    return tensors(list(vars(value).values())) if is_dataclass(value) else []


@pytest.mark.parametrize("mode", [*MODES, *BY_BLOCKS])
def test_nothing_is_read_from_memory_that_a_captured_graph_writes_over(monkeypatch, mode):
    monkeypatch.setattr(torch, "compile", Captured)
    arriving(*case(mode, "llada_tiny_eos"), LENGTHS, rows=4, every=1)


def test_one_thread_replays_the_graphs_of_an_engine(monkeypatch):
    monkeypatch.setattr(torch, "compile", Captured)
    Captured.threads.clear()
    model, params = golden_model("llada_tiny"), SamplingParams(**BASE)
    engine = Engine(model, compiled="graph")
    for prompt in PROMPTS:
        answers = engine.submit(to_answer(model, [prompt], params)[0])
        thread = threading.Thread(target=engine.finish, args=(answers,))
        thread.start()
        thread.join()
        assert answers[0].finished
    assert len(Captured.threads) == 1


def test_a_cache_that_a_captured_step_writes_into_is_said_to_stay(monkeypatch):
    monkeypatch.setattr(torch, "compile", Captured)
    model, params = golden_model("llada_tiny"), SamplingParams(**{**BASE, **MODES["dual"]})
    engine = Engine(model, compiled="graph")
    engine.submit(to_answer(model, PROMPTS, params)[0])
    engine.step()
    (batch,) = engine.batches
    given = batch.canvas.given
    for _ in range(2):
        engine.step()
    assert batch.canvas.given is given, "what a step passes on is not copied"
    kept = batch.denoiser.cache
    assert all(hasattr(x, "_dynamo_static_input_type") for x in (*kept.keys, *kept.values))
