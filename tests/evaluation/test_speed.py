"""Speed-ups under several wordings: which count, the worst beside the mean, and accuracy under parallelism."""

import json
import math

import pytest

from llada_core.data import puzzle_rows
from llada_core.data.params import PuzzlesParams
from llada_core.evaluation import speed, taskset
from llada_core.evaluation.answering import Responder, ResponderOptions
from llada_core.evaluation.benchmark import Benchmark, benchmark
from llada_core.evaluation.params import BenchmarkSettings, EvaluateParams
from llada_core.evaluation.recipes import Recipe
from llada_core.evaluation.speed import (
    EXACT,
    Point,
    accuracy_under_parallelism,
    as_values,
    picture,
    settings_of,
    study,
    table,
    told,
)
from llada_core.files import line_of
from llada_core.settings import ConfigError
from tests.tiny import tiny_pair

QUICK = BenchmarkSettings(sampling={"max_new_tokens": 8, "block_length": 8, "steps": 4, "threshold": 0.999})


def point(right, n=20, tokens=10.0, forwards=10.0):
    return Point((1.0,) * right + (0.0,) * (n - right), tokens, forwards, 5.0)


@pytest.fixture
def asked():
    row = {"task": "seats", "prompt": "seats 12", "answer": '{"order": "12"}', "in_training": False}
    fixed = {"definition": "puzzles", "version": 1.0, "kind": "generate", "metric": "correct,none", "shots": 0}
    values = {"name": "seats", "task": "seats", "chat": True, "chance": 0.0, "settings": QUICK, **fixed}
    rows = [{"id": str(i), **row} for i in range(3)]
    return Benchmark("seats", Recipe.parse(values, "seats"), taskset.puzzles("seats", rows), QUICK)


def test_area_as_d3llm_defines_it():
    points = [(1.0, 0.8), (2.0, 0.8), (4.0, 0.76), (6.0, 0.7)]
    weight = math.exp(-3 * (1 - 76 / 80))
    assert accuracy_under_parallelism(points) == pytest.approx(80 + 80 + 2 * (80 + 76 * weight) / 2)
    assert accuracy_under_parallelism([(1.0, 0.0)]) == 0.0
    higher = accuracy_under_parallelism(points, best=0.9)
    assert higher < accuracy_under_parallelism(points)


def test_the_picture_has_every_setting_and_the_line_of_the_best(tmp_path):
    points = {
        EXACT: {"a": point(18), "b": point(16)},
        "fast": {"a": point(18, forwards=5.0), "b": point(8, forwards=5.0)},
    }
    picture("seats", points, tmp_path / "out" / "speed-seats.png")
    picture("seats", points, tmp_path / "again.png")
    assert (tmp_path / "out" / "speed-seats.png").read_bytes() == (tmp_path / "again.png").read_bytes()
    picture("none", {EXACT: {"a": point(1)}}, tmp_path / "empty.png")
    assert (tmp_path / "empty.png").stat().st_size < (tmp_path / "again.png").stat().st_size


def test_a_wording_counts_where_exact_solves_half_and_the_worst_is_named():
    points = {
        EXACT: {"a": point(18), "b": point(16), "c": point(4)},
        "fast": {"a": point(18, forwards=5.0), "b": point(8, forwards=5.0)},
        "slow": {"a": point(17), "b": point(15)},
        "as fast": {"a": point(18, forwards=5.0), "b": point(8, forwards=5.0)},
    }
    exact, fast, slow, alike = table(points)
    assert (exact["mean"], exact["worst"], exact["worst_wording"]) == (pytest.approx(0.85), 0.8, "b")
    assert (fast["mean"], fast["worst"], fast["worst_wording"]) == (pytest.approx(0.65), 0.4, "b")
    assert (fast["tokens_per_forward"], fast["difference"]) == (2.0, pytest.approx(-0.2))
    assert fast["high"] < 0
    assert [row["pareto"] for row in (exact, fast, slow, alike)] == [True, True, False, True]
    text = told("seats", points)
    assert "wordings in which exact solves half: a, b" in text
    assert "not counted, by exact: c 20 %" in text
    assert "| fast * | 65.0 | 40.0 (b) |" in text
    assert told("seats", {EXACT: {"a": point(1)}}).endswith("not counted, by exact: a 5 %")


def test_exact_is_a_token_a_forward_whatever_the_recipe_says(asked):
    found = settings_of(asked, ["threshold=0.9,cache=dual", "usual"])
    assert found[EXACT]["steps"] == 8
    assert found[EXACT]["threshold"] is None
    assert (found["threshold=0.9,cache=dual"]["threshold"], found["threshold=0.9,cache=dual"]["cache"]) == (0.9, "dual")
    assert len(speed.wordings(asked)) >= 3
    assert "cache=dual" in found
    assert not any("dual" in name for name in settings_of(asked, ["usual"], by_blocks=True))
    with pytest.raises(ConfigError, match="treshold"):
        settings_of(asked, ["treshold=0.9"])


def test_every_wording_reaches_the_model_and_forwards_are_counted(asked, monkeypatch):
    model, tokenizer = tiny_pair()
    seen = []
    reworded = speed.RewordedLM._reworded
    monkeypatch.setattr(speed.RewordedLM, "_reworded", lambda lm, *p: seen.append(reworded(lm, *p)) or seen[-1])
    monkeypatch.setattr(speed, "HALF", 0.0)
    found = study(asked, Responder(model, tokenizer, ResponderOptions()), ["threshold=0.01"], limit=2)
    contents = {prompt.messages[-1]["content"] for prompt in seen}
    assert contents == {wording({}, "seats 12") for wording in speed.wordings(asked).values()}
    assert contents >= {"seats 12", "Question: seats 12\nAnswer:"}
    assert {point.forwards for point in found[EXACT].values()} == {8.0}
    assert max(point.forwards for point in found["threshold=0.01"].values()) < 8.0
    assert all(len(point.scores) == 2 for point in found[EXACT].values())


def test_interrupted_between_two_it_goes_on_and_ends_as_an_undisturbed_one(asked, monkeypatch, tmp_path):
    model, tokenizer = tiny_pair()
    monkeypatch.setattr(speed, "HALF", 0.0)
    calls, forward, run = [], model.forward, speed.run
    monkeypatch.setattr(model, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))

    def forwards(**how):
        calls.clear()
        found = study(asked, Responder(model, tokenizer, ResponderOptions()), ["threshold=0.01"], **how)
        return len(calls), found

    whole, undisturbed = forwards()
    done = []

    def killed(*given, **how):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(1)
        return run(*given, **how)

    monkeypatch.setattr(speed, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        forwards(kept=tmp_path)
    before = len(calls)
    first = json.loads(next(tmp_path.glob("*/answers-*.jsonl")).read_text().splitlines()[0])
    assert first["seconds"] > 0
    monkeypatch.setattr(speed, "run", run)
    left, resumed = forwards(kept=tmp_path)
    assert 0 < before < whole
    assert left == whole - before
    for setting, own in undisturbed.items():
        for wording, each in own.items():
            again = resumed[setting][wording]
            assert (again.scores, again.tokens, again.forwards) == (each.scores, each.tokens, each.forwards)
    none, again = forwards(kept=tmp_path)
    took = resumed[EXACT]["as_asked"].tokens_per_second
    assert (none, again[EXACT]["as_asked"].tokens_per_second) == (0, pytest.approx(took, rel=1e-3))


def test_puzzles_are_asked_in_the_wordings_of_their_training(tmp_path, monkeypatch):
    counts = {name: {"evaluate": 3} for name in ("sudoku", "countdown", "seats")}
    made = puzzle_rows.benchmarks(PuzzlesParams.model_validate(counts), 0, [])
    for each in made:
        (tmp_path / f"{each.name}.jsonl").write_text("".join(line_of(row) for row in each.rows))
    for each in made:
        put = benchmark(each.name, EvaluateParams(), root=None, puzzles=tmp_path)
        worded = speed.wordings(put)
        assert len(worded) == 3
        for row in taskset.read_puzzles(tmp_path / f"{each.name}.jsonl"):
            texts = {wording(row, "not used") for wording in worded.values()}
            assert len(texts) == 3
            assert row["prompt"] in texts, "the wording in which it is asked is one of them"
    (tmp_path / "mixed.jsonl").write_text("".join(line_of(each.rows[0]) for each in made))
    mixed = benchmark("mixed", EvaluateParams(), root=None, puzzles=tmp_path)
    assert "as_asked" in speed.wordings(mixed), "rows of several tasks have no wordings in common"

    model, tokenizer = tiny_pair()
    seen = []
    reworded = speed.RewordedLM._reworded
    monkeypatch.setattr(speed.RewordedLM, "_reworded", lambda lm, *p: seen.append(reworded(lm, *p)) or seen[-1])
    put = benchmark("seats", EvaluateParams(puzzles=QUICK), root=None, puzzles=tmp_path)
    study(put, Responder(model, tokenizer, ResponderOptions()), [], limit=1)
    order = json.loads(taskset.read_puzzles(tmp_path / "seats.jsonl")[0]["answer"])["order"]
    assert {prompt.messages[-1]["content"] for prompt in seen} >= {
        f"Give everyone a new seat: {order}",
        f"Nobody may keep a seat: {order}",
        f"Seat these people anew: {order}",
    }


def test_what_was_measured_is_kept_as_json():
    points = {
        EXACT: {"a": point(18), "b": point(4)},
        "threshold=0.9": {"a": point(17, forwards=5.0)},
    }
    sampling = {"threshold=0.9": {"threshold": 0.9}}
    kept = json.loads(json.dumps(as_values("seats", points, sampling)))
    assert kept["wordings"] == {"a": {"exact": 0.9, "counts": True}, "b": {"exact": 0.2, "counts": False}}
    exact, fast = kept["rows"]
    assert (exact["sampling"], fast["sampling"]) == (None, {"threshold": 0.9})
    assert (fast["mean"], fast["tokens_per_forward"], fast["wordings"]) == (0.85, 2.0, ["a"])
    assert kept["points"]["threshold=0.9"]["a"]["scores"] == [1.0] * 17 + [0.0] * 3
    assert f"AUP {kept['aup']['mean']:.1f} of the means" in told("seats", points)
    assert as_values("seats", {EXACT: {"a": point(1)}})["rows"] == []
