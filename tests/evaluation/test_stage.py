"""The stage `evaluate` and the sweep of any checkpoint, at tiny width."""

import json
import os
import subprocess
import sys
import weakref
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from llada_core.data.contamination import QUESTIONS, value_of
from llada_core.evaluation import speed
from llada_core.evaluation.answering import Responder
from llada_core.evaluation.params import BenchmarkSettings, EvaluateParams, ReportParams, SpeedParams
from llada_core.modeling import save_model
from llada_core.settings import ConfigError
from tasks.folders import safe
from tasks.work.evaluate import Places, answering, measure, measure_speed
from tasks.work.measure import sweep, tell_costs
from tasks.work.report import write_report
from tests.tiny import tiny_pair

QUICK = {"max_new_tokens": 8, "block_length": 8, "steps": 8}
PARAMS = EvaluateParams(puzzles=BenchmarkSettings(sampling=QUICK), batch_size=3, models=("sft", "grpo"))
HERE = Path(__file__).parents[2]


@pytest.fixture
def places(tmp_path):
    folder = tmp_path / "data" / "eval"
    folder.mkdir(parents=True)
    rows = [
        {
            "id": f"sudoku-{i}",
            "task": "sudoku",
            "prompt": f"Solve {i}",
            "answer": {"puzzle": "0" * 16},
            "in_training": i == 0,
        }
        for i in range(7)
    ]
    (folder / "sudoku.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for seed, name in enumerate(PARAMS.models):
        model, tokenizer = tiny_pair(seed=seed)
        save_model(model, tmp_path / "models" / name, tokenizer)
    return Places(None, folder, tmp_path / "reports" / "eval", tmp_path / "answers")


def evaluate(places, model="sft", params=PARAMS):
    with answering(places.out.parents[1] / "models" / model, params) as answerer:
        return measure("sudoku", model, answerer, params, places)


def written(places):
    files = (p for p in sorted(places.out.rglob("*")) if p.is_file() and p.suffix != ".lock")
    return {p.relative_to(places.out).as_posix(): p.read_bytes() for p in files}


def test_results_have_scores_intervals_and_settings_and_no_clock(places):
    line = evaluate(places)
    evaluate(places, "grpo")
    values = json.loads((places.out / "sudoku.json").read_text())
    assert sorted(values["models"]) == ["grpo", "sft"]
    result = values["models"]["sft"]
    assert (result["n"], result["score"], result["low"], result["chance"]) == (7, 0.0, 0.0, 0.0)
    assert result["settings"] == QUICK
    assert 0 < result["tokens_per_answer"] <= result["forwards_per_answer"] == 8
    assert not any("second" in key for key in result)
    assert line["seconds"] > 0
    records = [json.loads(text) for text in (places.out / "sudoku" / "sft.samples.jsonl").read_text().splitlines()]
    assert [r["id"] for r in records] == [f"sudoku-{i}" for i in range(7)]
    assert records[0]["in_training"]
    assert records[0]["prompt"].endswith("assistant<|end_header_id|>\n\n")


def test_the_report_holds_what_faster_settings_cost_each_model(places, monkeypatch):
    monkeypatch.setattr(speed, "HALF", 0.0)  # a model of noise solves nothing
    asked = SpeedParams(benchmarks=("sudoku",), settings=("threshold=0.001", "cache=prefix"), limit=3)
    params = PARAMS.model_copy(update={"benchmarks": ("sudoku",), "speed": asked})
    for model in ("sft", "grpo"):
        evaluate(places, model, params)
        with answering(places.out.parents[1] / "models" / model, params) as answerer:
            measure_speed("sudoku", model, answerer, params, places)
    report = write_report(places.out, ["sudoku"], ReportParams(), places.out.parent)
    rows = report["speed"]["sudoku"]["sft"]
    assert [row["setting"] for row in rows] == ["exact", "threshold=0.001", "cache=prefix"]
    assert rows[0]["forwards"] == rows[2]["forwards"] == 8 > rows[1]["forwards"]
    lines = (places.out.parent / "table.md").read_text().splitlines()
    shown = [line.split(" | ")[:3] for line in lines if line.startswith("| sudoku | ") and line.count("|") == 9]
    wanted = [(row["setting"], model) for row in rows for model in ("grpo", "sft")]
    assert shown[-6:] == [["| sudoku", *pair] for pair in wanted]
    head, rule = next((a, b) for a, b in pairwise(lines) if "tokens/forward" in a)
    assert head.count("|") == rule.count("|") == 9
    choice = SimpleNamespace(recipe=SimpleNamespace(kind="choice"))
    monkeypatch.setattr("llada_core.evaluation.benchmark.benchmark", lambda *_, **__: choice)
    with pytest.raises(ConfigError, match=r"evaluate\.speed: piqa writes nothing"):
        measure_speed("piqa", "sft", None, params, places)


def test_speed_names_what_is_evaluated():
    with pytest.raises(
        ValueError, match=r"speed\.benchmarks names 'sudoko', which benchmarks does not list; did you mean 'sudoku'"
    ):
        EvaluateParams(benchmarks=("sudoku",), speed=SpeedParams(benchmarks=("sudoko",), settings=("usual",)))
    one = SpeedParams(benchmarks=("sudoku",), settings=("usual",), models=("grpo",))
    assert one.asks("sudoku", "grpo")
    assert not one.asks("sudoku", "sft")
    assert not one.asks("seats", "grpo")
    assert SpeedParams(benchmarks=("sudoku",), settings=("usual",)).asks("sudoku", "sft")


def test_killed_and_resumed_is_byte_for_byte_undisturbed(places, monkeypatch):
    evaluate(places)
    undisturbed = written(places)
    for path in [*places.out.rglob("*.json*"), *places.answers.rglob("*.jsonl")]:
        path.unlink()
    work, calls = Responder.generate, []

    def dies(self, asked):
        calls.append(len(asked))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return work(self, asked)

    with monkeypatch.context() as patched:
        patched.setattr(Responder, "generate", dies)
        with pytest.raises(KeyboardInterrupt):
            evaluate(places)
    assert written(places) == {}
    calls.clear()
    monkeypatch.setattr(Responder, "generate", lambda self, asked: (calls.append(len(asked)), work(self, asked))[1])
    evaluate(places)
    assert written(places) == undisturbed
    assert sum(calls) == 4  # the first batch of three was kept


def test_right_answers_are_told_from_wrong_ones(places, monkeypatch):
    grid = "1234341221434321"
    text = {"text": grid, "tokens": 16, "forwards": 1}
    wrong = {"text": "no", "tokens": 1, "forwards": 1}
    monkeypatch.setattr(Responder, "generate", lambda self, asked: [text, *[wrong] * (len(asked) - 1)])
    assert evaluate(places)["score"] == pytest.approx(3 / 7)
    result = json.loads((places.out / "sudoku.json").read_text())["models"]["sft"]
    assert (result["in_training"], result["score_unseen"]) == (1, pytest.approx(2 / 6))  # the first was right


def test_a_model_that_was_measured_is_given_back(places):
    with answering(places.out.parents[1] / "models" / "sft", PARAMS) as answerer:
        measure("sudoku", "sft", answerer, PARAMS, places)
        model = weakref.ref(answerer.model)
        del answerer
    assert model() is None, "the next one would stand beside it on a GPU"


def test_an_absent_published_set_is_a_result_not_a_failure(places):
    with answering(places.out.parents[1] / "models" / "sft", PARAMS) as answerer:
        measure("sudoku_published", "sft", answerer, PARAMS, places)
    values = json.loads((places.out / "sudoku_published.json").read_text())
    assert "no data root holds" in values["models"]["sft"]["absent"]


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "empty"), ('{"id": 1}\n', "line 1: expected a JSON object"), ('{"id": 1, "ta', "line 1")],
)
def test_a_damaged_puzzle_file_is_told_with_its_line(places, text, message):
    (places.puzzles / "sudoku.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=message):
        evaluate(places)


def test_a_sweep_goes_on_after_a_failure_and_tells_costs_first(places, data_root, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    quick = {"piqa": BenchmarkSettings(samples=1)}
    params = PARAMS.model_copy(update={"limit": 3, "overrides": quick})
    said = []
    model = str(places.out.parents[1] / "models" / "sft")
    here = Places(data_root, places.puzzles, places.out, places.answers)
    names = ["base_humaneval", "piqa", "sudokoo", "sudoku", "base_gpqa"]
    found = sweep(model, names, params, here, tell=said.append)
    assert list(found) == names
    assert [name for name, result in found.items() if "error" in result] == ["base_humaneval", "sudokoo", "base_gpqa"]
    assert "did you mean 'sudoku'" in found["sudokoo"]["error"]
    assert (found["piqa"]["n"], found["piqa"]["subset"]) == (3, "3 of 1838 questions")
    assert said[1].startswith("piqa: 6 answers, at most")
    assert (here.out / "piqa" / f"{safe(model)}.samples.jsonl").exists()
    report = json.loads((here.out / "table.json").read_text())
    assert [row["benchmark"] for row in report["rows"]] == ["piqa", "sudoku"]
    assert len(report["commit"].removesuffix("+changes")) == 40


def test_a_model_is_loaded_once_for_all_benchmarks_of_a_sweep(places, monkeypatch):
    from llada_core.evaluation import answering as arguments

    (places.puzzles / "seats.jsonl").write_text((places.puzzles / "sudoku.jsonl").read_text())
    loaded, real = [], arguments.load_to_answer
    monkeypatch.setattr(arguments, "load_to_answer", lambda *given, **how: (loaded.append(how), real(*given, **how))[1])
    model = str(places.out.parents[1] / "models" / "sft")
    found = sweep(model, ["sudoku", "seats"], PARAMS, places, device="cpu", tell=lambda _: None)
    assert [result["n"] for result in found.values()] == [7, 7]
    assert [how["device"] for how in loaded] == ["cpu"]


def test_of_several_processes_one_tells_and_writes(places, monkeypatch):
    model, said = str(places.out.parents[1] / "models" / "sft"), []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert sweep(model, ["sudokoo", "sudoku"], PARAMS, places, tell=said.append).keys() == {"sudokoo"}
    assert (said, written(places)) == ([], {})
    monkeypatch.setenv("RANK", "0")
    assert sweep(model, ["sudoku"], PARAMS, places, tell=said.append)["sudoku"]["n"] == 7
    [answers] = (places.answers).rglob("answers-00001-of-00002.jsonl")
    assert sum(len(json.loads(line)["keys"]) for line in answers.read_text().splitlines()) == 3


def test_a_cost_without_weights_is_told_for_a_flow(places):
    model, said = places.out.parents[1] / "models" / "sft", []
    (model / "model.safetensors").unlink()
    with answering(model, PARAMS, "meta") as answerer:
        assert tell_costs(answerer, ["sudoku", "sudokoo"], PARAMS, places, said.append, 1000.0).keys() == {"sudokoo"}
    assert said[0].startswith("sudoku: 7 answers, at most 24 forwards")


def test_a_model_without_a_chat_template_is_measured_where_none_is_needed(places, data_root, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    model = places.out.parents[1] / "models" / "sft"
    settings = json.loads((model / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    params = PARAMS.model_copy(update={"limit": 2, "overrides": {"piqa": BenchmarkSettings(samples=1)}})
    here = Places(data_root, places.puzzles, places.out, places.answers)
    found = sweep(str(model), ["sudoku", "piqa"], params, here, tell=lambda _: None)
    assert "no chat template" in found["sudoku"]["error"]
    assert found["piqa"]["n"] == 2


def test_questions_that_the_run_trained_on_are_marked_and_told(places, data_root, tmp_path):
    rows = [json.loads(line) for line in (data_root / "piqa/validation.jsonl").open()][:3]
    np.save(tmp_path / QUESTIONS, np.array([value_of(f" {rows[1]['goal'].upper()}"), value_of("Where?")], np.uint64))
    asked = [{"id": q, "task": "text", "prompt": q, "answer": {"answer": "Ulm"}} for q in ("Who?", " where?", "When?")]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    own = {"piqa": BenchmarkSettings(samples=1), "mine": BenchmarkSettings(questions=str(tmp_path / "mine.jsonl"))}
    params = PARAMS.model_copy(update={"limit": 3, "overrides": own})
    here = Places(data_root, places.puzzles, places.out, places.answers, trained=tmp_path)
    with answering(places.out.parents[1] / "models" / "sft", params) as answerer:
        measure("piqa", "sft", answerer, params, here)
        measure("mine", "sft", answerer, params, here)
    mine = [json.loads(text) for text in (places.out / "mine" / "sft.samples.jsonl").read_text().splitlines()]
    assert [record["in_training"] for record in mine] == [False, True, False]
    result = json.loads((places.out / "piqa.json").read_text())["models"]["sft"]
    assert result["in_training"] == 1
    records = [json.loads(text) for text in (places.out / "piqa" / "sft.samples.jsonl").read_text().splitlines()]
    assert [record["in_training"] for record in records] == [False, True, False]
    assert result["score_unseen"] == pytest.approx((records[0]["score"] + records[2]["score"]) / 2)
    table = write_report(places.out, ["piqa"], ReportParams(), tmp_path / "report")
    assert any("1 questions occur in training by value" in remark for remark in table["remarks"])


@pytest.mark.slow
def test_lm_evals_command_line_on_two_processes(places, tmp_path):
    """The line its users know; each process answers its share, the first writes one result."""
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "sums.jsonl").write_text(
        "".join(f'{{"q": "{i} + {i}?", "a": "{2 * i}"}}\n' for i in range(5))
    )
    task = {
        "task": "sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "tasks" / "sums.jsonl")}},
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{a}}",
        "generation_kwargs": {"until": ["."]},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "tasks" / "sums.yaml").write_text(json.dumps(task))
    model = places.out.parents[1] / "models" / "sft"
    line = [
        *("--tasks", "sums", "--model", "llada", "--apply_chat_template", "--num_fewshot", "2", "--batch_size", "2"),
        *("--include_path", str(tmp_path / "tasks"), "--output_path", str(tmp_path / "out"), "--log_samples"),
        "--model_args",
        f"pretrained={model},max_new_tokens=8,steps=8,block_size=8,cfg_scale=0.0,suppress_tokens=[],"
        "begin_suppress_tokens=[1;5]",
    ]
    launch = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch, "--dynamo_backend", "no"]
    done = subprocess.run(
        [*command, "--main_process_port", "0", "-m", "tests.evaluation.quick_lm_eval", *line],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(HERE), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (results,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(results.read_text())["n-samples"]["sums"]["effective"] == 5
    files = sorted((tmp_path / ".cache" / "answers").rglob("answers-*.jsonl"))
    answered = [sum(len(json.loads(text)["keys"]) for text in file.read_text().splitlines()) for file in files]
    assert answered == [3, 2]


DIES = """
import os, signal, sys
from llada_core.evaluation.answering import Responder
from cli.main import llada
work, done = Responder.generate, []

def dies(self, asked):
    if len(done) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    done.append(asked)
    return work(self, asked)

if os.environ.get("DIES"):
    Responder.generate = dies
llada()
"""


@pytest.mark.faults
def test_llada_eval_killed_with_9_ends_as_an_undisturbed_one(places, tmp_path):
    def llada(name, **environment):
        model = places.out.parents[1] / "models" / "sft"
        out = tmp_path / name / "results"
        (tmp_path / name / "data").mkdir(parents=True, exist_ok=True)
        if not (tmp_path / name / "data" / "eval").exists():
            (tmp_path / name / "data" / "eval").symlink_to(places.puzzles)
        return out, subprocess.run(
            [sys.executable, "-c", DIES, "eval", "sudoku", "-m", model, "--batch-size", "2", "--out", out],
            cwd=tmp_path / name,
            env=os.environ | {"PYTHONPATH": str(HERE), "LLADAFLOW_TRACKING": "off", **environment},
            capture_output=True,
            text=True,
            check=False,
        )

    undisturbed, whole = llada("whole")
    assert whole.returncode == 0, whole.stderr
    out, first = llada("killed", DIES="1")
    assert first.returncode == -9
    assert not out.exists()
    (kept,) = (tmp_path / "killed" / "runs").rglob("answers-*.jsonl")
    assert sum(len(json.loads(line)["keys"]) for line in kept.read_text().splitlines()) == 4
    again, second = llada("killed")
    assert second.returncode == 0, second.stderr
    for name in ("sudoku.json", f"sudoku/{safe(str(places.out.parents[1] / 'models' / 'sft'))}.samples.jsonl"):
        assert (again / name).read_bytes() == (undisturbed / name).read_bytes()
