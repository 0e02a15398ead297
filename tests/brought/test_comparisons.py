"""Comparisons as people ask for them: `llada diff` and `llada runs` on whatever folder a command of ours has left.

A new case from a bug report is a line of one of the tables.
"""

import json
from pathlib import Path

import pytest

from llada_core.settings import ConfigError
from tasks.folders import safe, write_json
from tasks.launch.status import COLUMNS, line_of
from tasks.record.runs import RunFolder
from tasks.work.measure import diff, side, told

MODEL = "models:/toy@champion"
ODD = "a line\u2028and a paragraph\u2029 and \x85, in one reply"
REQUEST = {"stage": "evaluate@sums", "root": "/elsewhere", "settings": {}, "code": {}, "inputs": {}}


def record(number: int, score: float) -> dict:
    return {"id": f"q{number}", "score": score, "prompt": f"{number}?", "target": "1", "reply": "1"}


def measured(out: Path, scores: dict[str, list[float]], run: str | None = None) -> Path:
    """A folder of results as `llada eval` (or, with a `run`, the stage) leaves it: results, answers, tables."""
    models = {}
    for model, values in scores.items():
        lines = [json.dumps(record(n, s), ensure_ascii=False) + "\n" for n, s in enumerate(values)]
        (out / "sums").mkdir(parents=True, exist_ok=True)
        (out / "sums" / f"{model}.samples.jsonl").write_text("".join(lines), encoding="utf-8")
        fixed = {"recipe": "sums", "metric": "correct", "chance": 0.0, "low": 0.0, "high": 1.0, "n": len(values)}
        shown = {"settings": {"steps": 4}, "shots": 0, "subset": "", "variant": "official", "also": {}}
        models[model] = {**fixed, **shown, "score": sum(values) / len(values)}
    write_json(out / "sums.json", {"benchmark": "sums", "models": models} | ({"run": run} if run else {}))
    return out


def with_tables(folder: Path, model: str) -> None:
    """The JSON that the report leaves beside (or above) results."""
    write_json(folder / "table.json", {"models": [model], "rows": [{"benchmark": "sums"}], "commit": "0"})
    write_json(folder / "scores.json", {"sums": {model: 1.0}})


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a week of work leaves: the stage's results, two of `llada eval`, a workspace's, a run's, and tables."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LLADAFLOW_HOME", raising=False)
    right, wrong = [1.0] * 30, [0.0] * 30
    key = "evaluate-sums-0123456789abcdef"
    measured(Path("reports/eval"), {"sft": wrong, "grpo": right}, run=key)
    with_tables(Path("reports"), "grpo")
    for name, values in ((safe(MODEL), right), ("models__sft", wrong), ("a b:c", right)):
        with_tables(measured(Path("reports/checkpoints") / name, {name.replace(":", "-"): values}), name)
    measured(Path("workspaces/smoke-1/reports/eval"), {"sft": right})
    measured(Path(f"runs/{key}/tree/reports/eval"), {"grpo": right})
    write_json(Path(f"runs/{key}/request.json"), REQUEST)
    write_json(Path("reports/registered.json"), {"name": "toy"})
    return tmp_path


SIDES = [
    "grpo",
    "reports/eval:grpo",
    "reports:grpo",
    ".:grpo",
    f"reports/checkpoints/{safe(MODEL)}",
    f"reports/checkpoints/{safe(MODEL)}/",
    f"reports/checkpoints/{safe(MODEL)}:{MODEL}",
    f"reports/checkpoints/{safe(MODEL)}:{safe(MODEL)}",
    "reports/checkpoints/a b:c",
    "workspaces/smoke-1",
    "workspaces/smoke-1/reports/eval:sft",
    "runs/evaluate-sums-0123456789abcdef",
    "evaluate-sums-0123",
    "evaluate@sums",
]


@pytest.mark.parametrize("text", SIDES)
def test_a_side_is_whatever_a_command_left(project: Path, text: str) -> None:
    for first in ("sft", "reports/checkpoints/models__sft"):
        found = diff(first, text)
        assert found["sums"]["difference"]["value"] == 1.0, text
        assert "sums: 30 questions in common" in told(found)


REFUSED = [
    ("nowhere", "has no results of 'nowhere'"),
    ("grp", "has no results of 'grp'; did you mean 'grpo'"),
    ("reports/eval", "results of grpo, sft; say of which: reports/eval:grpo"),
    ("reports/checkpoints", "has no results of .reports/checkpoints"),
    ("reports/eval:", "results of grpo, sft; say of which"),
]


@pytest.mark.parametrize(("text", "line"), REFUSED)
def test_a_side_that_says_too_little_is_told_what_there_is(project: Path, text: str, line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        side(text)


DAMAGED = [
    ("reports/eval/sums.json", '{"benchmark"', "sums.json is damaged"),
    ("reports/eval/sums/sft.samples.jsonl", '{"id": "q1", "sco', r"sft\.samples\.jsonl, line 1: no record"),
    ("reports/eval/sums/sft.samples.jsonl", '{"id": "q1"}\n', r"sft\.samples\.jsonl, line 1: no record"),
    ("reports/eval/sums/sft.samples.jsonl", "[1]\n", r"sft\.samples\.jsonl, line 1: no record"),
]


@pytest.mark.parametrize(("file", "text", "line"), DAMAGED)
def test_a_damaged_result_is_named(project: Path, file: str, text: str, line: str) -> None:
    Path(file).write_text(text)
    with pytest.raises(ValueError, match=line):
        diff("sft", "grpo")


def test_a_score_that_is_no_number_is_left_out(project: Path) -> None:
    measured(Path("reports/eval"), {"sft": [0.0] * 30, "grpo": [float("nan"), *[1.0] * 29]})
    assert diff("sft", "grpo")["sums"]["questions"]["common"] == 29


def test_a_reply_with_an_odd_line_end_is_one_record(project: Path) -> None:
    line = json.dumps(record(0, 1.0) | {"reply": ODD}, ensure_ascii=False)
    Path("reports/eval/sums/grpo.samples.jsonl").write_text(line + "\n", encoding="utf-8")
    assert diff("sft", "grpo")["sums"]["questions"]["common"] == 1


TORN = [("request.json", "{"), ("request.json", ""), ("request.json", "[]"), ("job.json", "{}"), ("job.json", "nul")]
TORN += [("SUCCESS", ""), ("exit", "none"), ("metrics.jsonl", '{"step": 3}\n{"st\n'), ("metrics.jsonl", "{}\n{")]


@pytest.mark.parametrize(("file", "text"), TORN)
def test_a_run_with_a_torn_file_is_a_line_as_others_are(project: Path, file: str, text: str) -> None:
    run = RunFolder(project / "runs/evaluate-sums-0123456789abcdef")
    (run.path / file).write_text(text)
    assert len(line_of(run)) == len(COLUMNS)
    assert line_of(run)[0] == run.key
