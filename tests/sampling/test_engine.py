"""Requests join and leave between steps; each answer is what it would be alone, and a place is free at once."""

import dataclasses
import functools
import threading
from collections import Counter
from copy import deepcopy

import pytest
import torch

from llada_core.modeling.predictor import KVCache
from llada_core.sampling import batch as batch_module
from llada_core.sampling import engine as module
from llada_core.sampling import generate, infill, stream
from llada_core.sampling.engine import Engine
from llada_core.sampling.params import SamplingParams
from llada_core.sampling.requests import to_answer, to_fill
from tests.reference import golden_model
from tests.sampling.naive import naive
from tests.sampling.test_own_rules import SETTINGS as OWN
from tests.sampling.test_ragged import BASE, MASK, MODES
from tests.waiting import wait_for

CLOSE = 1e-4


def drawn(number):
    """A request of its own settings, and how it is written alone."""
    generator = torch.Generator().manual_seed(number)
    modes = [*MODES, *OWN]
    name = modes[number % len(modes)]
    params = SamplingParams(**{**BASE, **{**MODES, **OWN}[name]})
    if params.seed is not None:
        params = dataclasses.replace(params, seed=number % 3)
    if number % 4 == 1 and params.schedule != "even":
        params = params.at_length(11 + number % 9)
    if number % 5 == 2:  # numbers that rows of one batch do not have in common
        own = {"temperature": 0.3 + number % 7 / 10} if params.temperature else {}
        own |= {"threshold": 0.2 + number % 7 / 10} if params.threshold else {}
        params = dataclasses.replace(params, steps=BASE["steps"] // 2, **own)
    prompt = torch.randint(0, 119, (int(torch.randint(0, 20, (), generator=generator)),), generator=generator).tolist()
    return prompt, params


@functools.cache
def alone_of(model_name, number):
    """What a request of `drawn` comes to alone."""
    prompt, params = drawn(number)
    return generate(golden_model(model_name), [prompt], params)


def excused(model, prompt, params, steps):
    """Whether the first step that differs was decided by less than `CLOSE`: the same canvas, all but the same confidences."""
    for alone, together in zip(stream(model, [prompt], params), steps, strict=False):
        if not torch.equal(alone.tokens, together.tokens):
            gaps = alone.confidences.sort().values.diff().abs()
            same = torch.equal(alone.before, together.before) and len(alone.asked) == len(together.asked)
            return same and bool(len(gaps) and gaps.min() < CLOSE)
    return False


@pytest.mark.parametrize("model_name", ["llada_tiny_eos", "llada_tiny_gqa_qknorm_bias", "llada_moe_tiny"])
@pytest.mark.parametrize("rows", [5, 13])
def test_random_arrivals_are_answered_as_alone(model_name, rows):
    model = golden_model(model_name)
    count = 2 * (len(MODES) + len(OWN)) if model_name == "llada_tiny_eos" else 40
    engine, generator = Engine(model, rows=rows), torch.Generator().manual_seed(rows)
    asked = [drawn(number * 7 + 5) for number in range(count)]
    written, seen = [], Counter()
    while len(written) < count or engine.busy:
        for prompt, params in asked[len(written) :][: int(torch.randint(0, 4, (), generator=generator))]:
            written += engine.submit(to_answer(model, [prompt], params)[0], watched=True)
        engine.step()
        assert len(engine.active) <= rows
        seen[max((len(batch.answers) for batch in engine.batches), default=0)] += 1
    assert max(seen) > 2, "rows did share forwards"
    close = 0
    for number, ((prompt, params), answer) in enumerate(zip(asked, written, strict=True)):
        alone = alone_of(model_name, number * 7 + 5)
        if not torch.equal(answer.tokens[-len(alone.tokens[0]) :], alone.tokens[0]):
            assert excused(model, prompt, params, answer.steps), (prompt, params)
            close += 1
        else:
            assert answer.forwards == alone.forwards
            assert torch.equal(answer.steps[-1].tokens[0], answer.tokens)
    assert close <= count // 50 + 1, f"{close} of {count} answers were decided by less than {CLOSE}"


@pytest.mark.parametrize(
    "mode",
    [
        "even",
        "few steps",
        "threshold",
        "factor",
        "margin",
        "temperature",
        "random",
        "guided",
        "growing",
        "growing, guided, hot",
    ],
)
def test_one_row_among_others_equals_the_naive_loop(mode):
    model, params = golden_model("llada_tiny"), SamplingParams(**{**BASE, **MODES[mode]})
    engine = Engine(model)
    others = engine.submit(to_answer(model, [[9] * n for n in (2, 17, 8)], SamplingParams(**BASE))[0])
    engine.step()
    found = engine.submit(to_answer(model, [[5, 9, 30], [7], [5, 9, 30]], params)[0])
    engine.finish([*found, *others])
    for answer, (prompt, copy) in zip(found, (([5, 9, 30], 0), ([7], 0), ([5, 9, 30], 1)), strict=True):
        assert answer.tokens.tolist() == naive(model, prompt, params, copy)


@pytest.mark.parametrize(
    ("name", "values", "other"),
    [
        ("threshold", (0.9, 0.2, 0.05), {}),
        ("factor", (0.1, 1.0, 4.0), {}),
        ("entropy_bound", (0.1, 2.0, 9.0), {"remasking": "entropy"}),
        ("temperature", (0.3, 1.0, 2.0), {"seed": 1}),
        ("steps", (24, 6, 12), {}),
        ("block_length", (24, 12, 8), {}),
    ],
)
def test_the_numbers_of_rows_that_are_chosen_alike_are_each_rows_own(name, values, other):
    model, engine = golden_model("llada_tiny"), Engine(golden_model("llada_tiny"))
    asked = [SamplingParams(**{**BASE, **other, name: value}) for value in values]
    answers = engine.submit([to_answer(model, [[5, 9]], params)[0][0] for params in asked])
    engine.step()
    assert [len(batch.parts) for batch in engine.batches] == [1]
    engine.finish(answers)
    for answer, params in zip(answers, asked, strict=True):
        alone = generate(model, [[5, 9]], params)
        assert (answer.tokens.tolist(), answer.forwards) == (alone.tokens[0].tolist(), alone.forwards)


def test_templates_and_answers_share_a_batch():
    model, params = golden_model("llada_tiny"), SamplingParams(**{**BASE, "schedule": "linear"})
    template = [5, MASK, MASK, 9, MASK, 30, MASK]
    engine = Engine(model)
    answers = engine.submit([*to_answer(model, [[5, 9]], params)[0], *to_fill(model, [template], params)])
    engine.step()
    assert [len(batch.answers) for batch in engine.batches] == [2]
    engine.finish(answers)
    assert torch.equal(answers[0].tokens[2:], generate(model, [[5, 9]], params).answers[0])
    assert torch.equal(answers[1].tokens, infill(model, [template], params).answers[0])


def test_steps_of_a_watched_answer_are_those_of_a_stream():
    model, params = golden_model("llada_tiny_eos"), SamplingParams(**BASE, stop_at_eos=True, temperature=0.5, seed=1)
    engine = Engine(model)
    first = engine.submit(to_answer(model, [[7] * 9], SamplingParams(**BASE))[0], watched=True)[0]
    engine.step()
    (second,) = engine.submit(to_answer(model, [[5, 9, 30]], params, ahead=True)[0], watched=True)
    for ours, alone in zip(engine.follow(second), stream(model, [[5, 9, 30]], params, look_ahead=True), strict=True):
        for name in ("tokens", "before", "open", "committed", "proposal", "block"):
            assert torch.equal(getattr(ours, name), getattr(alone, name)), name
        assert torch.allclose(ours.confidence, alone.confidence, atol=1e-6, equal_nan=True)
        assert ours.forwards == alone.forwards
    engine.finish([first])
    assert len(first.steps) == 24


def test_a_finished_row_frees_its_place_for_the_next_in_line():
    model = golden_model("llada_tiny")
    short, long = SamplingParams(**{**BASE, "max_new_tokens": 8, "steps": 8}), SamplingParams(**BASE)
    engine = Engine(model, rows=2)
    a, b, c, d = (engine.submit(to_answer(model, [[n]], p)[0])[0] for n, p in enumerate((long, short, long, short)))
    for _ in range(8):
        engine.step()
        assert engine.active in ([a, b], [a])
    assert b.finished
    engine.step()
    assert engine.active == [a, c], "nobody overtakes"
    engine.finish([d])
    assert a.finished
    assert engine.forwards == 32, "the fourth took the first one's place while the third was written"


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_rows_that_come_and_go_leave_the_others_keys_where_they_are(monkeypatch, cache):
    model, params = golden_model("llada_tiny"), SamplingParams(**BASE, cache=cache)
    engine = Engine(model, rows=4)
    first, second, third = engine.submit(to_answer(model, [[5], [6, 6], [7]], params)[0])
    engine.step()
    kept = engine.batches[0].denoiser.cache
    moved, replace = [], KVCache.replace
    monkeypatch.setattr(
        KVCache, "replace", lambda self, index, anew: moved.append(index.tolist()) or replace(self, index, anew)
    )
    engine.cancel(first)
    assert engine.active == [third, second]
    assert engine.batches[0].denoiser.cache.keys[0] is kept.keys[0]
    assert moved == [[0]], "the last row took the place of the first, and no other was copied"
    (fourth,) = engine.submit(to_answer(model, [[8]], params)[0])
    engine.step()
    assert engine.batches[0].denoiser.cache.keys[0] is kept.keys[0]
    assert moved == [[0], [2]], "what the newcomer's own first look found"
    engine.finish([second, third, fourth])
    for answer, prompt in ((second, [6, 6]), (third, [7]), (fourth, [8])):
        assert torch.equal(answer.tokens, generate(model, [prompt], params).tokens[0])


def test_a_cancelled_row_frees_its_place_before_the_next_step():
    model, params = golden_model("llada_tiny"), SamplingParams(**BASE)
    engine = Engine(model, rows=1)
    first, second, third = engine.submit(to_answer(model, [[5], [6], [7]], params)[0], watched=True)
    steps = engine.follow(first)
    next(steps)
    assert engine.active == [first]
    steps.close()
    assert engine.active == []
    engine.cancel(second)
    engine.finish([third])
    assert (first.finished, second.finished, third.finished) == (False, False, True)
    assert not engine.busy


def test_what_cannot_fit_is_refused_with_the_number():
    model, params = golden_model("llada_tiny"), SamplingParams(**BASE)
    engine = Engine(model, rows=4, positions=64, waiting=3)
    with pytest.raises(ValueError, match="a canvas of 65 tokens is larger than the 64 that fit here"):
        engine.submit(to_answer(model, [[5] * 41], params)[0])
    answers = engine.submit(to_answer(model, [[5], [6], [7, 8, 9]], params)[0])
    with pytest.raises(ValueError, match="3 requests are waiting, and 3 may"):
        engine.submit(to_answer(model, [[5]], params)[0])
    engine.step()
    assert engine.active == answers[:2], "the third would make three rows of 27 positions"
    engine.finish(answers)


@pytest.mark.parametrize("where", ["step", "join"])
def test_an_error_in_a_step_is_told_to_its_batch_and_the_others_go_on(monkeypatch, where):
    model = golden_model("llada_tiny")
    engine = Engine(model)
    plain = engine.submit(to_answer(model, [[5]], SamplingParams(**BASE))[0])
    guided = engine.submit(to_answer(model, [[5], [6]], SamplingParams(**BASE, cfg_scale=1.0))[0])
    engine.step()
    failing = next(batch for batch in engine.batches if guided[0] in batch.answers)

    def fails(*_given):
        raise torch.OutOfMemoryError("no room")

    if where == "step":
        failing.denoiser.logits = fails
    else:
        guided += engine.submit(to_answer(model, [[7]], SamplingParams(**BASE, cfg_scale=1.0))[0])
        monkeypatch.setattr(batch_module.Canvas, "of", fails)
    for answer in guided:
        with pytest.raises(torch.OutOfMemoryError, match="no room"):
            engine.finish([answer])
    monkeypatch.undo()
    engine.finish(plain)
    assert engine.active == []
    again = engine.submit(to_answer(model, [[5]], SamplingParams(**BASE, cfg_scale=1.0))[0])
    engine.finish(again)


def test_threads_that_write_at_once_share_steps():
    model, params = golden_model("llada_tiny"), SamplingParams(**BASE, threshold=0.9)
    engine, results, ready = Engine(model), {}, threading.Barrier(8)

    def write(number):
        (answer,) = engine.submit(to_answer(model, [[number, 9]], params)[0], watched=True)
        ready.wait(30)
        results[number] = list(engine.follow(answer))

    threads = [threading.Thread(target=write, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = [generate(model, [[n, 9]], params) for n in range(8)]
    assert all(torch.equal(results[n][-1].tokens, alone[n].tokens) for n in range(8))
    assert [len(results[n]) for n in range(8)] == [each.forwards for each in alone]
    assert engine.forwards == max(each.forwards for each in alone)


def test_who_gives_the_turn_back_does_not_have_it_again_while_another_waits():
    engine, had = Engine(golden_model("llada_tiny")), []

    def other():
        engine.get_turn()
        had.append("other")
        engine.turn.release()

    engine.get_turn()
    thread = threading.Thread(target=other)
    thread.start()
    wait_for("the other", engine._next.locked)
    engine.turn.release()
    engine.get_turn()
    assert had == ["other"]
    engine.turn.release()
    thread.join()


def test_two_engines_behind_one_queue_write_what_one_writes():
    model, params = golden_model("llada_tiny"), SamplingParams(**BASE)
    first = Engine(model, rows=2)
    second = Engine(deepcopy(model), rows=2, beside=first)
    answers = first.submit(to_answer(model, [[n, 9] for n in range(6)], params)[0], watched=True)
    first.step()
    second.step()
    assert (first.active, second.active) == (answers[:2], answers[2:4]), "the next in line goes to who has room"
    first.cancel(answers[0])
    first.step()
    assert first.active == [answers[1], answers[4]]
    found = {}

    def read(number):
        found[number] = list((first, second)[number % 2].follow(answers[number]))

    threads = [threading.Thread(target=read, args=(number,)) for number in range(1, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, steps in found.items():
        alone = generate(model, [[number, 9]], params)
        assert torch.equal(steps[-1].tokens, alone.tokens)
        assert [step.forwards for step in steps] == list(range(1, alone.forwards + 1))
    assert len(found) == 5
    assert not first.busy


class Asked:
    """A lock that says when another thread than its maker's asks for it."""

    def __init__(self):
        self.lock, self.maker, self.asked = threading.Lock(), threading.get_ident(), threading.Event()

    def __enter__(self):
        if threading.get_ident() != self.maker:
            self.asked.set()
        self.lock.acquire()

    def __exit__(self, *_error):
        self.lock.release()

    def acquire(self, blocking=True):
        return self.lock.acquire(blocking)

    def release(self):
        self.lock.release()


def test_the_last_step_is_not_lost_to_who_looks_while_it_is_made(monkeypatch):
    """Another's turn finishes an answer: between its being finished and its last step's being told, its reader looks."""
    model, params = golden_model("llada_tiny"), SamplingParams(**{**BASE, "max_new_tokens": 8, "steps": 8})
    engine, found = Engine(model), []
    engine.turn = Asked()
    mine, other = engine.submit(to_answer(model, [[5], [6]], params)[0], watched=True)
    reader = threading.Thread(target=lambda: (found.extend(engine.follow(other)), engine.turn.asked.set()))
    tell = module._tell

    def looked_at_meanwhile(moment):
        if other.finished:
            other.steps.clear()
            reader.start()
            assert engine.turn.asked.wait(30)
        tell(moment)

    monkeypatch.setattr(module, "_tell", looked_at_meanwhile)
    engine.finish([mine])
    reader.join()
    assert [step.forwards for step in found] == [8]
