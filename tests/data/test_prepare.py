"""The folder that `prepare` writes: complete, the same every time, disjoint, shared, and never half-written."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest

from llada_core.data.params import DataParams
from llada_core.data.sources import DataError
from llada_core.settings import ConfigError
from llada_core.tokenizer import Tokenizer
from llada_core.verifiers.answers import verify
from tasks.folders import content_hash
from tasks.work.prepare import prepare, summary

COUNTS = {"pretrain": 60, "sft": 40, "grpo": 20, "preference": 10, "validation": 10, "evaluate": 12}
PUZZLES = {
    "workers": 1,
    "tokenizer": {"vocab_size": 400},
    "puzzles": {"sudoku": {**COUNTS, "new_grids": 8}, "countdown": COUNTS, "seats": COUNTS},
    "pretrain": {"length": 32, "documents": True},
    "sft": {"length": 80},
    "grpo": {},
    "preference": {},
}


def made(home: Path, values: dict, seed: int = 3) -> dict:
    return prepare(DataParams.parse(values, "data"), seed=seed, out=home / "data", home=home)


def rows(home: Path, part: str, side: str = "train") -> datasets.Dataset:
    return datasets.load_from_disk(str(home / "data" / part / side))


@pytest.fixture(scope="module")
def puzzle_home(tmp_path_factory):
    home = tmp_path_factory.mktemp("puzzles")
    made(home, PUZZLES)
    return home


def test_puzzle_rows_are_what_training_reads(puzzle_home):
    tokenizer = Tokenizer.load(puzzle_home / "data/tokenizer")
    pretrain, sft = rows(puzzle_home, "pretrain"), rows(puzzle_home, "sft")
    assert {len(row) for row in pretrain["input_ids"]} == {32}
    assert {len(row) for row in pretrain["document_ids"]} == {32}
    assert len(sft) == 120
    assert max(map(len, sft["input_ids"])) <= 64
    for ids, maskable in zip(sft["input_ids"], sft["maskable"], strict=True):
        answer = [i for i, m in zip(ids, maskable, strict=True) if m]
        assert answer == ids[-len(answer) :]
        assert answer[-1] == tokenizer.special.eot_id
        assert tokenizer.answer_text(answer)
    grpo = rows(puzzle_home, "grpo")
    assert set(grpo["task"]) == {"sudoku", "countdown", "seats"}
    assert max(map(len, grpo["prompt_ids"])) <= 48
    assert all(not verify(t, "1", json.loads(a)) for t, a in zip(grpo["task"], grpo["answer"], strict=True))
    assert len(rows(puzzle_home, "preference")) == 30
    assert len(rows(puzzle_home, "grpo", "validation")) == 30


def test_evaluation_files_hold_right_solutions_and_nothing_from_training(puzzle_home):
    data, card = puzzle_home / "data", json.loads((puzzle_home / "data/card.json").read_text())
    shown = {line for part in ("pretrain", "sft", "grpo") for line in (data / part / "puzzle_values.txt").open()}
    assert len(shown) > 300
    for name in ("sudoku", "sudoku_new_grids", "countdown", "seats"):
        lines = [json.loads(line) for line in (data / "eval" / f"{name}.jsonl").open()]
        assert len(lines) == card["evaluate"][name]["rows"] == (8 if name == "sudoku_new_grids" else 12)
        assert all(verify(row["task"], row["solution"], row["answer"]) for row in lines)
        assert not any(row["in_training"] for row in lines)
        assert set(card["overlap"][name].values()) == {0}
    assert card["parts"]["sft"]["train"]["rows"] == 120
    assert sum(card["parts"]["sft"]["train"]["lengths"].values()) == 120
    assert card["parts"]["sft"]["train"]["maskable"] < card["parts"]["sft"]["train"]["tokens"]


def test_overlap_with_published_puzzles_is_counted_and_changes_nothing_else(tmp_path, puzzle_home, monkeypatch):
    monkeypatch.delenv("LLADAFLOW_DATA_ROOT", raising=False)
    published = tmp_path / "root" / "sudoku4x4"
    published.mkdir(parents=True)
    shown = [
        line.split(":")[1].strip() for line in (puzzle_home / "data/sft/puzzle_values.txt").open() if "sudoku" in line
    ]
    puzzles = [*shown[:2], "3102200002100320"]
    text = "".join(json.dumps({"Puzzle": p, "Solution": "3142243142131324"}) + "\n" for p in puzzles)
    (published / "test.jsonl").write_text(text)
    card = made(tmp_path, {**PUZZLES, "root": "root"})
    assert card["overlap"]["sudoku_published"] == {"pretrain": 0, "sft": 2, "grpo": 0, "preference": 0}
    lines = [json.loads(line) for line in (tmp_path / "data/eval/sudoku_published.jsonl").open()]
    assert [row["in_training"] for row in lines] == [True, True, False]
    for part in ("tokenizer", "pretrain", "sft", "grpo", "preference"):
        assert content_hash(tmp_path / "data" / part) == content_hash(puzzle_home / "data" / part)


def test_what_a_run_before_built_is_used_again(tmp_path, monkeypatch):
    few = {"workers": 1, "puzzles": {"seats": {"sft": 20, "grpo": 10}}, "sft": {}, "grpo": {}}
    made(tmp_path, few)
    before = content_hash(tmp_path / "data")
    monkeypatch.setattr("tasks.work.prepare.build", None)
    made(tmp_path, few)
    assert content_hash(tmp_path / "data") == before
    with pytest.raises(TypeError):
        made(tmp_path, few, seed=4)
    assert content_hash(tmp_path / "data") == before
    assert not list((tmp_path / ".cache/prepared").glob(".new-*"))


def test_more_prompts_leave_the_data_of_other_stages_as_they_are(tmp_path):
    few = {"workers": 1, "puzzles": {"seats": {"sft": 20, "grpo": 10}}, "sft": {}, "grpo": {}}
    made(tmp_path, few)
    before = {part: content_hash(tmp_path / "data" / part) for part in ("tokenizer", "sft", "grpo")}
    made(tmp_path, few | {"puzzles": {"seats": {"sft": 20, "grpo": 15}}})
    after = {part: content_hash(tmp_path / "data" / part) for part in before}
    assert {part for part in before if before[part] != after[part]} == {"grpo"}


@pytest.fixture
def texts(tmp_path):
    lines = [
        json.dumps({"text": f"Sentence number {i} of a text that was made for a test. " * 3}) for i in range(12_000)
    ]
    (tmp_path / "text.jsonl").write_text("\n".join([*lines, "", *lines[1000:2000]]) + "\n")
    return tmp_path


def test_the_number_of_processes_changes_nothing(texts):
    source = {"name": "text.jsonl", "weight": 1.5}
    one = {"tokenizer": {"vocab_size": 300, "documents": 100}, "pretrain": {"sources": [source], "validation": 0.1}}
    made(texts, {**one, "workers": 1})
    first = content_hash(texts / "data")
    (texts / ".cache").rename(texts / "before")
    card = made(texts, {**one, "workers": 2})
    assert content_hash(texts / "data") == first
    part = card["parts"]["pretrain"]
    assert part["train"]["tokens"] / part["validation"]["tokens"] == pytest.approx(0.9 * 1.5 / 0.1, rel=0.15)
    tokenizer = Tokenizer.load(texts / "data/tokenizer")

    def numbers(side):
        text = tokenizer.decode([i for row in rows(texts, "pretrain", side)["input_ids"] for i in row])
        return {word for word in text.split() if word.isdigit() and len(word) == 4}

    assert len(numbers("validation")) > 500
    # A row's number is cut where two packed rows meet; those pieces are not whole numbers.
    assert len(numbers("train") & numbers("validation")) < 30


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_killed_while_building_the_same_command_ends_as_if_undisturbed(texts, number):
    (texts / "whole").mkdir()
    values = {"workers": 2, "tokenizer": {"vocab_size": 300, "documents": 100}}
    values["pretrain"] = {"sources": [{"name": str(texts / "text.jsonl")}]}
    made(texts / "whole", values)
    program = f"""
from pathlib import Path
from llada_core.data.params import DataParams
from tasks.work.prepare import prepare, summary
home = Path({str(texts)!r})
if __name__ == "__main__":
    prepare(DataParams.parse({values!r}, "data"), seed=3, out=home / "data", home=home)
"""
    (texts / "program.py").write_text(program)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, str(texts / "program.py")]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, start_new_session=True)
    while process.poll() is None and not list((texts / ".cache").glob("prepared/.new-*/pretrain/train.arrow")):
        time.sleep(0.01)
    os.killpg(process.pid, number)
    assert process.wait() != 0
    assert not (texts / "data").exists()
    subprocess.run(command, env=environment, check=True)
    assert content_hash(texts / "data") == content_hash(texts / "whole/data")


def test_real_dialogues_and_prompts(tmp_path, data_root):
    values = {
        "root": str(data_root),
        "workers": 1,
        "tokenizer": {"vocab_size": 1000},
        "pretrain": {"sources": [{"name": "gutenberg", "limit": 20}], "validation": 0.2},
        "sft": {"sources": [{"name": "alpaca", "limit": 100}, {"name": "dolly", "limit": 50}], "length": 256},
        "grpo": {"sources": [{"name": "gsm8k", "limit": 30}], "length": 400},
    }
    card = made(tmp_path, values)
    sft = card["parts"]["sft"]
    assert sft["train"]["rows"] + sft["validation"]["rows"] + sft["dropped"].get("prompt too long", 0) == 150
    assert [source["name"] for source in sft["sources"]] == ["alpaca", "dolly"]
    assert sft["train"]["longest"] == 256
    assert card["parts"]["grpo"]["train"]["rows"] > 20
    tests = {"gutenberg test": {"pretrain": 0}, "alpaca test": {"sft": 0}, "dolly test": {"sft": 0}}
    assert card["overlap"] == {**tests, "gsm8k test": {"grpo": 0}}
    assert "gsm8k test: in training by value: {'grpo': 0}" in set(summary(card))
    assert (tmp_path / "data/eval/benchmarks.json").read_text().strip() == "{}"


def test_mistakes_name_file_and_row_and_leave_the_old_data(tmp_path):
    good = {"workers": 1, "puzzles": {"seats": {"sft": 20}}, "sft": {}}
    made(tmp_path, good)
    before = content_hash(tmp_path / "data")
    (tmp_path / "bad.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n{"instruction": "a"}\n')

    def error(**source):
        with pytest.raises(ValueError) as caught:  # noqa: PT011 - the caller checks the text
            made(tmp_path, {"workers": 1, "tokenizer": {"vocab_size": 300}, "sft": {"sources": [source]}})
        assert content_hash(tmp_path / "data") == before
        assert "\n" not in str(caught.value)
        return caught.type, str(caught.value)

    kind, text = error(name="bad.jsonl")
    assert kind is DataError
    assert "bad.jsonl, row 2: expected a list of messages in the field 'messages'" in text
    kind, text = error(name="bad.jsonl", map="llada_core.data.maps.alpaca")
    assert "bad.jsonl, row 1: the map function llada_core.data.maps.alpaca raised KeyError: 'instruction'" in text
    kind, text = error(name="bad.jsonl", map="llada_core.data.maps.alpacca")
    assert kind is ConfigError
    assert "did you mean 'alpaca'" in text
    with pytest.raises(DataError, match=r"bad\.jsonl, row 1: expected text in the field 'body'; .* fields messages"):
        made(tmp_path, {"workers": 1, "pretrain": {"sources": [{"name": "bad.jsonl", "text_field": "body"}]}})
    kind, text = error(name="bad.jsonl", limit=1)
    assert "data.sft: no row is left to train on; dropped: {'no answer': 1}" in text


def test_a_tokenizer_that_was_named_is_taken_over(tmp_path, puzzle_home):
    named = {"workers": 1, "tokenizer": {"name": str(puzzle_home / "data/tokenizer")}}
    card = made(tmp_path, {**named, "puzzles": {"seats": {"sft": 20}}, "sft": {}})
    assert card["tokenizer"]["vocab_size"] == Tokenizer.load(puzzle_home / "data/tokenizer").vocab_size


def test_only_evaluation_needs_no_tokenizer(tmp_path):
    card = made(tmp_path, {"puzzles": {"sudoku": {"evaluate": 5}}})
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["card.json", "eval"] or not card["parts"]
    assert not (tmp_path / "data/tokenizer").exists()
