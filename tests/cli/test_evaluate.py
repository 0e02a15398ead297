"""`llada eval`: a puzzle is asked on the canvas that params.yaml names, not on a default one."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from cli.measure import _over_the_projects, budget_hours, with_settings
from llada_core.evaluation.params import BenchmarkSettings, EvaluateParams
from llada_core.sampling.params import SamplingParams
from llada_core.usage import Usage
from tasks.work import measure

PUZZLE = {"id": "0", "task": "seats", "prompt": "seats 123", "answer": {"order": "123"}}
TALK = ({"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A."})
PARAMS = """
name: mine
stages: [evaluate]
evaluate:
  benchmarks: [seats]
  models: [m]
  puzzles: {sampling: {max_new_tokens: 6, block_length: 3, steps: 6}}
"""


def test_puzzles_are_measured_with_the_settings_of_the_project(call, tiny, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    Path("data/eval").mkdir(parents=True)
    Path("data/eval/seats.jsonl").write_text(json.dumps(PUZZLE) + "\n")
    Path("params.yaml").write_text(PARAMS)
    result = call("eval", "seats", "--model", tiny, "--out", "out")
    assert result.exit_code == 0, result.stderr
    (measured,) = json.loads(Path("out/seats.json").read_text())["models"].values()
    assert measured["settings"] == {"max_new_tokens": 6, "block_length": 3, "steps": 6}


def test_without_a_project_puzzles_are_measured_as_the_model_is_to_be_asked(call, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    Path("data/eval").mkdir(parents=True)
    Path("data/eval/seats.jsonl").write_text(json.dumps(PUZZLE) + "\n")
    own = shutil.copytree(tiny, tmp_path / "own")
    Usage(sampling=SamplingParams(6, 3, 6), system="Be brief.", examples=("Why?",)).save(own)
    result = call("eval", "seats", "--model", str(own), "--out", "out")
    assert result.exit_code == 0, result.stderr
    (measured,) = json.loads(Path("out/seats.json").read_text())["models"].values()
    lengths = ("max_new_tokens", "block_length", "steps")
    assert {name: measured["settings"][name] for name in lengths} == dict(zip(lengths, (6, 3, 6), strict=True))
    exported = call("export", "copy", "--model", str(own))
    assert exported.exit_code == 0, exported.stderr
    assert Usage.load(Path("copy")) == Usage.load(own)
    card = Path("copy/README.md").read_text()
    assert all(
        line in card
        for line in ("- **conversations**: several turns", "- **system prompt**: Be brief.", "- **for example**: Why?")
    )


@pytest.mark.parametrize("another", [False, True])
def test_a_model_of_another_run_is_asked_puzzles_as_was_saved_with_it(tmp_path, another):
    (tmp_path / "params.yaml").write_text(PARAMS)
    usage = Usage(sampling=SamplingParams(12, 4, 12))
    found = _over_the_projects(tmp_path / "params.yaml", {"benchmarks": ("seats",)}, usage, another=another)
    assert found.puzzles.sampling["max_new_tokens"] == (12 if another else 6)


def test_puzzles_are_those_of_the_project_else_of_the_workspace_that_trained_the_model(tmp_path, monkeypatch):
    home, there = tmp_path / "home", tmp_path / "home/workspaces/mine-1"
    model = there / "models/sft"
    for folder in (model, there / "data/eval"):
        folder.mkdir(parents=True)
    kept = SimpleNamespace(tags={"folder": str(there)})
    monkeypatch.setattr(measure, "version_of", lambda project, name, which: kept)
    for name in (str(model), "models:/mine@champion"):
        assert measure._puzzles_of(name, home) == there / "data/eval"
    assert measure.trained_in("/model") == Path("/")
    elsewhere = measure._puzzles_of("GSAI-ML/LLaDA-8B-Base", home)
    (home / "data/eval").mkdir(parents=True)
    assert measure._puzzles_of(str(model), home) == elsewhere == home / "data/eval"


def test_a_budget_asks_the_share_of_questions_that_fits(call, tiny, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    monkeypatch.setattr("llada_core.evaluation.answering.Responder.tokens_per_second", lambda *_: 1.0)
    Path("data/eval").mkdir(parents=True)
    rows = [{**PUZZLE, "id": str(i)} for i in range(40)]
    Path("data/eval/seats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("params.yaml").write_text(PARAMS)
    result = call("eval", "seats", "--model", tiny, "--out", "out", "--budget", "1h")
    assert result.exit_code == 0, result.stderr
    (measured,) = json.loads(Path("out/seats.json").read_text())["models"].values()
    assert 0 < measured["n"] < 40
    assert measured["subset"] == f"{measured['n']} of 40 questions"
    assert "1.00 h are for" in result.stdout
    assert "seats †" in Path("out/table.md").read_text()
    refused = call("eval", "seats", "--model", tiny, "--out", "out", "--budget", "0.1m")
    assert refused.exit_code == 2
    assert "give more time" in refused.stderr


def test_times_and_settings_for_all_benchmarks():
    assert (budget_hours("4h"), budget_hours("90m"), budget_hours("1.5 h")) == (4.0, 1.5, 1.5)
    with pytest.raises(ValueError, match="such as 4h"):
        budget_hours("4 days")
    params = EvaluateParams(overrides={"a": BenchmarkSettings(samples=3)})
    changed = with_settings(params, ["a", "b"], {"estimator": "stock", "share": None})
    assert changed.overrides == {
        "a": BenchmarkSettings(samples=3, estimator="stock"),
        "b": BenchmarkSettings(estimator="stock"),
    }
    assert with_settings(params, ["a"], {"estimator": None}) is params


def test_speed_is_told_beside_exact_and_kept(call, tiny, monkeypatch):
    monkeypatch.setattr("llada_core.evaluation.speed.HALF", 0.0)
    Path("data/eval").mkdir(parents=True)
    Path("data/eval/seats.jsonl").write_text(json.dumps(PUZZLE) + "\n")
    Path("params.yaml").write_text(PARAMS)
    result = call(
        "eval", "seats", "--model", tiny, "--out", "out", "--speed", "threshold=0.01", "--speed", "cache=dual"
    )
    assert result.exit_code == 0, result.stderr
    kept = Path("out/speed-seats.md").read_text()
    assert all(f"| {name}" in kept for name in ("exact", "threshold=0.01", "cache=dual"))
    assert kept.strip() in result.stdout
    values = json.loads(Path("out/speed-seats.json").read_text())
    assert (values["model"], values["benchmark"]) == (str(tiny), "seats")
    assert [row["setting"] for row in values["rows"]] == ["exact", "threshold=0.01", "cache=dual"]
    assert values["rows"][2]["sampling"]["cache"] == "dual"
    assert not list(Path("out").glob(".speed*")), "nothing half written is left"
    assert Path("out/speed-seats.png").read_bytes().startswith(b"\x89PNG")


def test_with_json_stdout_is_one_object(call, tiny, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    Path("data/eval").mkdir(parents=True)
    Path("data/eval/seats.jsonl").write_text(json.dumps(PUZZLE) + "\n")
    Path("params.yaml").write_text(PARAMS)
    result = call("eval", "seats", "nowhere", "--model", tiny, "--out", "out", "--json")
    found = json.loads(result.stdout)
    assert (found["model"], found["results"], found["benchmarks"]["seats"]["n"]) == (tiny, "out", 1)
    assert "there is no benchmark 'nowhere'" in found["benchmarks"]["nowhere"]["error"]
    assert result.exit_code == 1
    assert "results are in out" in result.stderr
    assert "leave out --json" in call("eval", "seats", "-m", tiny, "--speed", "usual", "--json").stderr


def test_a_file_of_questions_and_answers_is_a_benchmark(call, tiny, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    Path("params.yaml").write_text(PARAMS)
    Path("town.CSV").write_text("question,answer\nWhen?,At nine.\nWhere?,Here.\n")
    result = call("eval", "./town.CSV", "--model", tiny, "--out", "out", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["benchmarks"]["town"]["n"] == 2
    rows = [json.loads(line) for line in Path("out/town").glob("*.samples.jsonl").__next__().read_text().splitlines()]
    assert [json.loads(row["target"]) for row in rows] == [{"answer": "At nine."}, {"answer": "Here."}]
    Path("talk.jsonl").write_text(json.dumps({"messages": [{"role": "system", "content": "s"}, *TALK]}))
    refused = call("eval", "talk.jsonl", "--model", tiny)
    assert (refused.exit_code, "row 1: expected one question" in refused.stderr) == (2, True)
