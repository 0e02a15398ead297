"""The table, what it says by itself, and two runs compared question by question."""

import json
import random
import re

import pytest

from llada_core.evaluation.params import ReportParams
from llada_core.evaluation.report import references
from llada_core.evaluation.statistics import estimate
from llada_core.settings import ConfigError
from tasks.folders import read_json, write_json, write_text
from tasks.project import Project
from tasks.work.measure import Measurement, compare, diff, side, told
from tasks.work.report import Beside, write_report


def result(scores, *, recipe="sudoku", chance=0.0, **more):
    found = estimate(scores)
    values = {"score": found.value, "n": found.n, "stderr": found.stderr, "low": found.low, "high": found.high}
    fixed = {"recipe": recipe, "variant": "official", "metric": "acc,none", "chance": chance, "subset": "", "shots": 0}
    return {
        **values,
        **fixed,
        "chat": True,
        "settings": {},
        "as_pinned": True,
        "versions": {"lm-eval": "0.4.13"},
        "also": {},
        **more,
    }


def write(folder, name, by_model, **more):
    for model, scores in by_model.items():
        records = [
            {"id": f"{name}/{i}", "score": s, "prompt": str(i), "target": "", "reply": str(s)}
            for i, s in enumerate(scores)
        ]
        write_text(folder / name / f"{model}.samples.jsonl", "".join(json.dumps(r) + "\n" for r in records))
    models = {model: result(scores, **more) for model, scores in by_model.items()}
    write_json(folder / f"{name}.json", {"benchmark": name, "models": models})


def test_tokens_a_forward_are_a_column_where_some_model_writes_several(tmp_path):
    """Beside them what is published for the row's figures."""
    folder, cost = tmp_path / "eval", {"tokens_per_answer": 30.0, "forwards_per_answer": 12.0}
    write(folder, "instruct_gsm8k", {"a": [1.0, 0.0]}, recipe="instruct_gsm8k", variant="internal")
    write_report(folder, ["instruct_gsm8k"], ReportParams(), tmp_path)
    assert "tokens a forward" not in (tmp_path / "table.md").read_text()
    write(folder, "llada2_gpqa", {"a": [1.0, 0.0]}, recipe="llada2_gpqa", variant="speed", **cost)
    write_report(folder, ["instruct_gsm8k", "llada2_gpqa"], ReportParams(), tmp_path)
    text = (tmp_path / "table.md").read_text()
    head, _, *rows = (line.split(" | ") for line in text.splitlines() if line.startswith("|"))
    assert head[4] == "tokens a forward"
    assert [row[4] for row in rows] == ["–", "2.50 (quality 2.12, speed 3.62)"]
    assert len({len(row) for row in [head, *rows]}) == 1


def draws(chance, n=400, seed=0):
    rng = random.Random(f"{chance}{seed}")
    return [float(rng.random() < chance) for _ in range(n)]


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "eval"
    write(folder, "countdown", {"sft": draws(0.3), "sft_control": draws(0.32), "grpo": draws(0.6)})
    write(folder, "sudoku", {"sft": draws(0.9), "sft_control": draws(0.9), "grpo": draws(0.9)})
    guess = {m: draws(0.5, seed=m) for m in ("sft", "sft_control", "grpo")}
    write(folder, "piqa", guess, recipe="base_piqa", chance=0.5, subset="400 of 1838 questions")
    absent = {"absent": "no data root holds it", "recipe": "sudoku_published"}
    write_json(folder / "sudoku_published.json", {"benchmark": "sudoku_published", "models": {"sft": absent}})
    write_json(tmp_path / "training" / "grpo.json", {"groups_differ": 0.41, "weight_change": 1.25})
    return folder


NAMES = ["countdown", "sudoku", "piqa", "sudoku_published"]


def reported(results, out="out"):
    place = results.parent / out
    order = ["sft", "sft_control", "grpo"]
    beside = Beside(results.parent / "training", tuple(order), "a" * 40)
    report = write_report(results, NAMES, ReportParams(), place, beside)
    return report, place


def test_the_report_says_what_its_numbers_do_not_carry(results):
    report, place = reported(results)
    text = (place / "table.md").read_text()
    assert any(r.startswith("countdown: grpo gains") and "against sft (95 % interval +" in r for r in report["remarks"])
    assert "- piqa: sft, sft_control, grpo not above chance (chance is 50 %; the interval reaches it)." in text
    assert "piqa: a subset (400 of 1838 questions)" in text
    assert "sudoku_published: not measured (no data root holds it)." in text
    assert "GRPO: rewards differed in 41 % of groups, the weights moved by 1.25 (norm)." in text
    assert not any(r.startswith("sudoku: grpo") for r in report["remarks"])
    assert "![grpo](training/grpo.png)" in text
    assert report == read_json(place / "table.json")


def test_questions_that_occur_in_training_are_counted(tmp_path):
    write(tmp_path / "eval", "sudoku_published", {"sft": draws(0.9)}, in_training=12, score_unseen=0.875)
    report = write_report(tmp_path / "eval", ["sudoku_published"], ReportParams(), tmp_path / "out")
    assert "sudoku_published: 12 questions occur in training by value; without them sft 87.5 %." in report["remarks"]


def test_differences_are_paired_and_bold_when_real(results):
    report, place = reported(results)
    rows = {row["benchmark"]: row for row in report["rows"]}
    gain, against_control = rows["countdown"]["differences"]
    assert (gain["baseline"], against_control["baseline"]) == ("sft", "sft_control")
    assert gain["low"] > 0
    assert gain["value"] == pytest.approx(
        rows["countdown"]["scores"]["grpo"]["score"] - rows["countdown"]["scores"]["sft"]["score"]
    )
    line = next(line for line in (place / "table.md").read_text().splitlines() if line.startswith("| countdown"))
    assert line.count("**") == 4


def test_published_figures_stand_beside_and_a_subset_does_not_compare(results):
    report, _ = reported(results)
    (row,) = [row for row in report["rows"] if row["benchmark"] == "piqa"]
    official = row["references"][0]
    assert (official["source"], official["value"]) == ("official", pytest.approx(0.736))
    assert not official["same_settings"]
    assert official["models"]["sft"]["within_noise"] is False
    text = (results.parent / "out" / "table.md").read_text()
    assert re.search(r"\| piqa † \|.*\| 73\.6 \(\*\*-\d+\.\d\*\*, \*\*-\d+\.\d\*\*, \*\*-\d+\.\d\*\*\) \|", text)
    assert "- countdown, sudoku, piqa: shots 0, chat True\n- lm-eval 0.4.13, commit " + "a" * 12 + "\n" in text


def test_same_settings_only_where_nothing_of_the_measurement_differs():
    def of(recipe, variant, **more):
        row = result([1.0, 0.0], recipe=recipe, variant=variant, drift=[], **more)
        return {r["source"]: r for r in references(row, {"m": row})}

    asked = of("instruct_gsm8k", "opencompass")
    assert asked["opencompass"]["same_settings"]
    assert asked["opencompass"]["differs"] == {}
    assert asked["internal"]["differs"].keys() == {"prompt", "shots", "filter"}
    assert not of("instruct_gsm8k", "internal")["internal"]["same_settings"]
    assert not of("instruct_gsm8k", "opencompass", subset="4 of 8")["opencompass"]["same_settings"]
    base = of("base_gsm8k", "official")
    assert base["official"]["same_settings"]
    assert base["length_512"]["differs"].keys() == {"settings"}
    assert base["confidence"]["differs"].keys() == {"prompt", "shots", "settings", "filter"}
    assert base["dream"]["differs"] == {"settings": "no recipe repeats its own"}
    changed = {**result([1.0], recipe="base_mmlu"), "drift": ["mmlu_law: version 2.0 for 1.0 of lm-eval 0.4.8"]}
    (official, *_) = references(changed, {"m": changed})
    assert (official["same_settings"], set(official["differs"])) == (False, {"version"})
    # A version that is known to score alike is a line, and no other measurement.
    alike = {**result([1.0], recipe="base_truthfulqa"), "drift": ["truthfulqa_mc2: version 3.0 for 2.0"]}
    assert references(alike, {"m": alike})[0]["same_settings"]


def test_the_report_says_what_differs_and_how_likelihoods_were_estimated(tmp_path):
    settings = {"samples": 128, "cfg_scale": 0.0, "estimator": "stock"}
    drift = ["bbh_cot_fewshot_snarks: version 4.0 for 3.0 of lm-eval 0.4.8"]
    write(tmp_path / "eval", "instruct_mmlu", {"m": draws(0.6)}, recipe="instruct_mmlu", variant="internal")
    write(tmp_path / "eval", "base_piqa", {"m": draws(0.6)}, recipe="base_piqa", settings=settings, estimator_error=1.5)
    write(tmp_path / "eval", "base_bbh", {"m": draws(0.6)}, recipe="base_bbh", drift=drift)
    surest = {"cfg_scale": 0.0, "estimator": "confidence"}
    write(
        tmp_path / "eval", "base_arc_c", {"m": draws(0.6)}, recipe="base_arc_c", variant="confidence", settings=surest
    )
    names = ["instruct_mmlu", "base_piqa", "base_bbh", "base_arc_c"]
    report = write_report(tmp_path / "eval", names, ReportParams(comparisons=()), tmp_path / "out")
    text = (tmp_path / "out" / "table.md").read_text()
    assert "- instruct_mmlu not measured as internal was: prompt (the internal toolkit is not published); " in text
    assert "base_piqa: log-likelihoods by stock, 128 samples; one is off by 1.50 nats" in text
    assert f"base_bbh: {drift[0]}." in report["remarks"]
    assert "base_arc_c: answers scored by confidence, token by token, surest first; that is no likelihood." in text
    assert "that of lm-eval 0.4.10 was not compared with the installed one" in text


def test_the_same_results_give_the_same_files(results):
    _, first = reported(results)
    _, second = reported(results, "again")
    for name in ("table.json", "table.md", "table.png"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_a_missing_result_says_how_to_get_it(results):
    with pytest.raises(ConfigError, match=r"python -m tasks\.evaluate nowhere"):
        write_report(results, ["nowhere"], ReportParams(), results.parent / "out")


def test_no_gain_is_said_too(tmp_path):
    same = draws(0.5)
    write(tmp_path / "eval", "countdown", {"sft": same, "grpo": same})
    report = write_report(tmp_path / "eval", ["countdown"], ReportParams(), tmp_path / "out")
    assert "grpo and sft differ on no benchmark by more than noise." in report["remarks"]


def test_two_models_question_by_question(results, monkeypatch):
    monkeypatch.setattr("tasks.work.measure.RESULTS", results)
    found = diff("sft", f"{results}:grpo", Project.at(results.parent))
    assert set(found) == {"countdown", "sudoku", "piqa"}
    c = found["countdown"]
    assert c["difference"]["value"] > 0
    assert len(c["gained"]) - len(c["lost"]) == round(400 * c["difference"]["value"])
    text = told(found)
    assert "countdown: 400 questions in common" in text
    assert "a difference" in text
    with pytest.raises(ConfigError, match="has no results of 'grp'; did you mean 'grpo'"):
        side("grp")


def test_a_comparison_tells_settings_and_questions_apart():
    def record(score, prompt="p"):
        return {"id": "1", "score": score, "prompt": prompt, "target": "t", "reply": str(score)}

    first = Measurement(
        {"score": 1.0, "settings": {"steps": 8}, "shots": 5}, {"a": record(1.0), "b": record(0.0), "c": record(1.0)}
    )
    second = Measurement(
        {"score": 0.0, "settings": {"steps": 4}, "shots": 5}, {"a": record(0.0), "b": record(0.0, "q")}
    )
    found = compare(first, second)
    assert found["settings"] == {"settings.steps": (8, 4)}
    assert found["questions"] == {"common": 2, "only_first": 1, "only_second": 0, "asked_differently": 1}
    assert (found["gained"], found["lost"], found["other_answers"]) == ([], ["a"], 1)
