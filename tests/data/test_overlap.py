"""Questions that are trained on and measured: found by value through every wording, counted, told."""

import json

import numpy as np
import pytest

from llada_core.data import maps
from llada_core.data.contamination import QUESTIONS, question_in, saved_values, value_of, values_in
from llada_core.data.params import DataParams
from tasks.work.prepare import Measured, prepare, summary

GSM8K = {"question": "Tom has 2 pens.\nHe buys 3. How many?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"}


def test_the_question_is_what_the_prompt_asks():
    for function in (maps.gsm8k, maps.gsm8k_terse):
        assert question_in(GSM8K, function(GSM8K)["prompt"]) == GSM8K["question"]
    worked = {"question": "Short?", "answer": "A long answer that nobody was asked."}
    assert question_in(worked, "Question: Short?\nAnswer:") == "Short?"
    assert question_in(worked, None) == worked["answer"]  # a task whose prompt is no text
    assert question_in({"label": 3, "choices": ["a"]}, "x") is None
    assert value_of("Tom has  2 pens.\n") == value_of("tom HAS 2\npens.") != value_of("Tom has 3 pens.")
    value_of("half an emoji \ud83d")


@pytest.mark.parametrize("name", ["gsm8k", "gsm8k_terse", "gsm8k_reasoning", "gsm8k_dialogue"])
def test_a_training_row_has_the_value_of_its_question_in_any_wording(name):
    assert value_of(GSM8K["question"]) in set(values_in(GSM8K, vars(maps)[name](GSM8K)))


def test_puzzles_have_the_value_that_the_generated_ones_have():
    sudoku = {"Puzzle": 230301201034320, "Solution": "1234341221434321"}
    assert value_of("sudoku:0230301201034320") in set(values_in(sudoku, maps.sudoku(sudoku)))
    countdown = {"nums": [7, 3, 5], "target": 15}
    assert value_of("countdown:3,5,7=15") in set(values_in(countdown, maps.countdown(countdown)))


@pytest.fixture(scope="module")
def made(tmp_path_factory, data_root):
    """A run that measures gsm8k and trains on 30 of its training questions, and on three of its test questions."""
    home = tmp_path_factory.mktemp("overlap")
    test = [json.loads(line) for line in (data_root / "gsm8k/test.jsonl").open()][:6]
    (home / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in test[:2]))
    said = [{"role": "user", "content": f" {test[2]['question'].upper()}"}, {"role": "assistant", "content": "No."}]
    (home / "chat.jsonl").write_text(json.dumps({"messages": said}) + "\n" + json.dumps({"messages": said[:1]}) + "\n")
    (home / "sudoku.csv").write_text("Puzzle,Solution\n0230301201034320,1234341221434321\n")
    common = {"validation": 0.0}
    values = {
        "root": str(data_root),
        "workers": 1,
        "tokenizer": {"vocab_size": 300, "documents": 20},
        "puzzles": {"sudoku": {"evaluate": 20}},
        "sft": {"sources": [{"name": "chat.jsonl"}], **common},
        "grpo": {
            "length": 600,
            "sources": [
                {"name": "gsm8k", "limit": 30},
                {"name": "mine.jsonl", "map": "llada_core.data.maps.gsm8k", "weight": 2},
                {"name": "sudoku.csv", "map": "llada_core.data.maps.sudoku"},
            ],
            **common,
        },
    }
    answer = {"answer": "No."}
    rows = [{"prompt": row["question"], "task": "text", "answer": answer} for row in (test[2], test[4])]
    rows += [{"prompt": "Any words", "task": "sudoku", "answer": {"puzzle": "0230301201034320"}}]
    (home / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    measured = Measured(("sudoku", "instruct_gsm8k", "base_gpqa", "own"), data_root, {"own": home / "own.jsonl"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        params = DataParams.parse(values, "data")
        card = prepare(params, seed=0, out=home / "data", home=home, measured=measured)
    return home / "data", card, test


def test_prepare_counts_and_tells_what_each_benchmark_shares_with_training(made):
    _, card, _ = made
    assert card["overlap"]["instruct_gsm8k"] == {"sft": 1, "grpo": 2}
    assert "gpqa" in card["overlap"]["base_gpqa"]["not counted"]
    assert card["overlap"]["sudoku"] == {"sft": 0, "grpo": 0}
    assert card["overlap"]["own"] == {"sft": 1, "grpo": 1}  # the question itself, and the puzzle in other words
    assert "instruct_gsm8k: in training by value: {'sft': 1, 'grpo': 2}" in set(summary(card))
    assert any(line.startswith("base_gpqa: in training by value: not counted (") for line in summary(card))


def test_the_values_of_training_questions_go_to_the_evaluation(made):
    data, _, test = made
    trained = saved_values(data / "eval")
    assert [value_of(row["question"]) in trained for row in test] == [True, True, True, False, False, False]
    assert trained == saved_values(data / "sft") | saved_values(data / "grpo")
    assert value_of("sudoku:0230301201034320") in saved_values(data / "grpo")
    assert np.load(data / "grpo" / QUESTIONS).dtype == np.uint64


def test_generated_puzzles_write_no_values(tmp_path):
    params = DataParams.parse({"workers": 1, "puzzles": {"seats": {"sft": 20, "evaluate": 5}}, "sft": {}}, "data")
    prepare(params, seed=0, out=tmp_path / "data", home=tmp_path, measured=Measured(("seats",), None))
    assert not list((tmp_path / "data").rglob(QUESTIONS))


def test_a_published_sudoku_in_training_is_found_whatever_its_wording(tmp_path):
    row = {"Puzzle": "0230301201034320", "Solution": "1234341221434321"}
    (tmp_path / "sudoku4x4").mkdir()
    (tmp_path / "sudoku4x4/test.csv").write_text("Puzzle,Solution\n0230301201034320,1\n3102200002100320,1\n")
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    source = {"name": "train.jsonl", "map": "llada_core.data.maps.sudoku"}
    values = {"workers": 1, "root": ".", "puzzles": {"sudoku": {"evaluate": 5}}, "tokenizer": {"vocab_size": 300}}
    values["grpo"] = {"sources": [source], "validation": 0.0, "length": 2000}
    card = prepare(DataParams.parse(values, "data"), seed=0, out=tmp_path / "data", home=tmp_path)
    assert card["overlap"]["sudoku_published"] == {"grpo": 1}
    lines = [json.loads(line) for line in (tmp_path / "data/eval/sudoku_published.jsonl").open()]
    assert [line["in_training"] for line in lines] == [True, False]
