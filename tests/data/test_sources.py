"""Sources: found by name or path, read with line numbers; a mistake is told with file, line and what was expected."""

import json
import re
from pathlib import Path

import datasets
import pytest

from llada_core.data import maps, sources
from llada_core.data.params import PuzzlesParams, SourceParams, SudokuParams
from llada_core.data.puzzle_rows import benchmarks
from llada_core.data.sources import DataError, UnusableRow, find, read
from llada_core.training.rewards.published import gsm8k

# What dllm@ca17675 and d1@837888f make of these rows, by their own code.
PROMPTS = json.loads((Path(__file__).parents[1] / "golden/grpo_prompts.json").read_text(encoding="utf-8"))


def rows_of(path, **changes):
    source = SourceParams(name=str(path), **changes)
    return list(read(source, find(source, "evaluate", [path.parent])))


def test_text_and_json_files(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    (tmp_path / "b.jsonl").write_text('{"text": "é"}\n\n{"text": "x"}\n')
    (tmp_path / "c.json").write_text('[{"text": "y"}]')
    (tmp_path / "d.csv").write_text("text\nz\n")
    assert rows_of(tmp_path / "a.txt") == [(1, {"text": "one\n\ntwo\n"})]
    assert rows_of(tmp_path / "a.txt", unit="line") == [(1, {"text": "one"}), (3, {"text": "two"})]
    assert rows_of(tmp_path / "b.jsonl") == [(1, {"text": "é"}), (3, {"text": "x"})]
    assert rows_of(tmp_path / "b.jsonl", limit=1) == [(1, {"text": "é"})]
    assert rows_of(tmp_path / "b.jsonl", contains={"text": "x"}) == [(3, {"text": "x"})]
    assert rows_of(tmp_path / "c.json") == [(1, {"text": "y"})]
    assert rows_of(tmp_path / "d.csv") == [(1, {"text": "z"})]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "data.jsonl: no rows; expected at least one"),
        (b'{"text": "a"}\n{"text": "b', "data.jsonl, line 2: not valid JSON .*cut off"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', "data.jsonl, line 2: byte 10 is not UTF-8"),
        (b'{"text": "a"}\n["b"]\n', "data.jsonl, line 2: expected a JSON object, got list"),
    ],
)
def test_damaged_jsonl_is_told_with_its_line(tmp_path, content, message):
    (tmp_path / "data.jsonl").write_bytes(content)
    if not content:
        with pytest.raises(DataError, match=message):
            rows_of(tmp_path / "data.jsonl")
        return
    (first, good), (second, bad) = rows_of(tmp_path / "data.jsonl")
    assert (first, good, second) == (1, {"text": "a"}, 2)
    assert isinstance(bad, UnusableRow)
    assert re.match(message, f"data.jsonl, {bad.told}")


def test_damaged_text_is_told_with_its_line(tmp_path):
    (tmp_path / "data.txt").write_bytes(b"fine\nfine\n\xe9\n")
    with pytest.raises(DataError, match=r"data\.txt, line 3: byte 10 is not UTF-8"):
        rows_of(tmp_path / "data.txt")
    with pytest.raises(DataError, match=r"data\.txt, line 3: byte 0 is not UTF-8"):
        rows_of(tmp_path / "data.txt", unit="line")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match=r"empty\.txt: no rows"):
        rows_of(tmp_path / "empty.txt")


def test_a_source_that_is_nowhere_names_where_it_was_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"'alpacca'.*below {tmp_path}; did you mean 'alpaca'"):
        find(SourceParams(name="alpacca"), "sft", [tmp_path])
    with pytest.raises(FileNotFoundError, match="'gutenberg': no file"):
        find(SourceParams(name="gutenberg"), "pretrain", [tmp_path])


def test_short_names_are_files_of_the_root_first_then_the_hub(tmp_path):
    assert find(SourceParams(name="alpaca"), "sft", [tmp_path]).place == "tatsu-lab/alpaca"
    folder = tmp_path / "alpaca"
    folder.mkdir()
    (folder / "train.jsonl").write_text("{}\n")
    origin = find(SourceParams(name="alpaca"), "sft", [tmp_path])
    assert (origin.kind, origin.place, origin.map) == (
        "file",
        str(folder / "train.jsonl"),
        "llada_core.data.maps.alpaca",
    )
    assert find(SourceParams(name="tatsu-lab/alpaca", map="my.f"), "sft", [tmp_path]).map == "my.f"
    assert find(SourceParams(name="gsm8k"), "grpo", [tmp_path]).map == "llada_core.data.maps.gsm8k"
    digest = find(SourceParams(name="dclm"), "pretrain", [tmp_path]).digest
    assert digest != find(SourceParams(name="dclm", revision="v2"), "pretrain", [tmp_path]).digest


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_data_sets_are_asked_for_as_the_source_says(monkeypatch, tmp_path, streaming):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        table = datasets.Dataset.from_list([{"messages": [{"role": "user", "content": str(i)}]} for i in range(5)])
        return table.to_iterable_dataset() if kwargs["streaming"] else table

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = SourceParams(name="smoltalk", streaming=streaming, limit=3, revision="main")
    rows = list(read(source, find(source, "sft", [tmp_path])))
    assert [number for number, _ in rows] == [1, 2, 3]
    assert rows[2][1]["messages"][0]["content"] == "2"
    expected = {"split": "train", "revision": "main", "streaming": streaming}
    assert asked == [(("HuggingFaceTB/smoltalk", "all"), expected)]


def test_a_hub_that_does_not_answer_is_one_line(monkeypatch, tmp_path):
    def load_dataset(*_, **__):
        raise ConnectionError("Couldn't reach it\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = SourceParams(name="owner/name")
    with pytest.raises(DataError, match=r"'owner/name' cannot be had from the Hub: Couldn't reach it$"):
        list(read(source, find(source, "sft", [tmp_path])))


def test_folders_saved_by_datasets(tmp_path):
    table = datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])
    datasets.DatasetDict({"train": table, "test": table.select([1])}).save_to_disk(str(tmp_path / "saved"))
    assert rows_of(tmp_path / "saved", split="test") == [(1, {"text": "b"})]
    with pytest.raises(DataError, match="no split 'dev'; it has train, test"):
        rows_of(tmp_path / "saved", split="dev")


def test_rows_that_are_test_rows_too_are_counted(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "a", "n": 1}\n{"text": "b", "n": 1}\n{"n": 1, "text": "a"}\n')
    (tmp_path / "test.jsonl").write_text('{"n": 1, "text": "a"}\n')
    source = SourceParams(name=str(tmp_path / "train.jsonl"))
    assert sources.shared_with_test(source, find(source, "pretrain", [tmp_path])) == 2
    itself = SourceParams(name=str(tmp_path / "test.jsonl"), train_on_test=True)
    assert sources.shared_with_test(itself, find(itself, "pretrain", [tmp_path])) is None


@pytest.mark.parametrize(
    "asked",
    [
        {"name": "math500", "split": "test"},
        {"name": "owner/data", "split": "test_sft"},
        {"name": "openai/gsm8k", "split": "test[:50%]"},
        {"name": "HuggingFaceH4/MATH-500", "split": "test"},
        {"name": "google/IFEval"},
        {"name": "Rowan/hellaswag", "split": "validation"},
        {"name": "piqa", "split": "validation"},
        {"name": "gsm8k", "split": "test"},
        {"name": "gsm8k/test.jsonl"},
        {"name": "gsm8k/my_test.jsonl"},
        {"name": "saved", "split": "test"},
    ],
)
@pytest.mark.parametrize("stage", ["pretrain", "sft", "grpo", "preference"])
def test_a_test_set_is_refused_for_training_unless_one_insists(tmp_path, asked, stage):
    for name in ("gsm8k/test", "gsm8k/my_test", "piqa/validation"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.jsonl").write_text("{}\n")
    table = datasets.Dataset.from_list([{"text": "a"}])
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(DataError, match=rf"of {stage}: .* is a test set; .*insist with train_on_test: true$"):
        find(SourceParams(**asked), stage, [tmp_path])
    assert find(SourceParams(**asked, train_on_test=True), stage, [tmp_path]).is_test_set
    assert find(SourceParams(**asked), "evaluate", [tmp_path]).is_test_set


def test_training_splits_are_no_test_sets(tmp_path):
    assert find(SourceParams(name="math500"), "grpo", [tmp_path]).split == "train"
    for known in set(sources.DATASETS) - {"gutenberg", "sudoku4x4"}:
        assert not find(SourceParams(name=known), "sft", [tmp_path]).is_test_set
    for name in ("latest.jsonl", "attested.txt", "contest/train.jsonl", "train.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}\n")
        assert not find(SourceParams(name=name), "sft", [tmp_path]).is_test_set


def test_a_stream_needs_an_end():
    with pytest.raises(ValueError, match="dclm is streamed: limit must say"):
        SourceParams(name="dclm", streaming=True)


def test_every_known_data_set_has_its_map_function():
    for known in sources.DATASETS.values():
        assert all(callable(getattr(maps, name)) for name in known.maps.values())


@pytest.mark.parametrize("task", PROMPTS)
def test_published_prompts_are_those_of_d1_and_dllm_character_by_character(task):
    for case in PROMPTS[task]:
        row = vars(maps)[task](case["row"])
        assert (None if row is None else row["prompt"]) == case["prompt"]
        if row is not None:
            assert row["task"] == task
            assert vars(maps)[f"{task}_terse"](case["row"])["prompt"] != row["prompt"]
            assert vars(maps)[f"{task}_terse"](case["row"])["answer"] == row["answer"]
    assert (
        sources.DATASETS[{"sudoku": "sudoku4x4", "code": "kodcode", "math": "math500"}.get(task, task)].maps["grpo"]
        == task
    )


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "number.jsonl", "parquet"])
def test_a_sudoku_keeps_its_leading_zeros_however_it_is_stored(tmp_path, suffix):
    cases = PROMPTS["sudoku"]
    rows, path = [case["row"] for case in cases], tmp_path / f"puzzles.{suffix}"
    if suffix == "csv":
        path.write_text("Puzzle,Solution\n" + "".join(f"{row['Puzzle']},{row['Solution']}\n" for row in rows))
    elif suffix == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    else:
        kind = int if suffix == "number.jsonl" else str
        path.write_text("".join(json.dumps({k: kind(v) for k, v in row.items()}) + "\n" for row in rows))
    found = [maps.sudoku(row) for _, row in rows_of(path)]
    assert [row["prompt"] for row in found] == [case["prompt"] for case in cases]
    assert [row["answer"]["puzzle"] for row in found] == [row["Puzzle"] for row in rows]
    assert [row["answer"]["solution"] for row in found] == [row["Solution"] for row in rows]


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_published_test_sets_are_measured_in_either_format(tmp_path, suffix):
    row = PROMPTS["sudoku"][0]["row"]
    (tmp_path / "sudoku4x4").mkdir()
    text = json.dumps(row) if suffix == "jsonl" else f"Puzzle,Solution\n{row['Puzzle']},{row['Solution']}"
    (tmp_path / "sudoku4x4" / f"test.{suffix}").write_text(text + "\n")
    params = PuzzlesParams(sudoku=SudokuParams(evaluate=1))
    found = {benchmark.name: benchmark for benchmark in benchmarks(params, 0, [tmp_path])}
    assert found["sudoku_published"].keys == [f"sudoku:{row['Puzzle']}"]


def test_a_csv_holds_text_and_nothing_else(tmp_path):
    (tmp_path / "a.csv").write_text("\ufeffinstruction,output\n6 x 7?,42\nNothing?,\nName?,NA\n", encoding="utf-8")
    asked = [maps.alpaca(row)["messages"] for _, row in rows_of(tmp_path / "a.csv")]
    assert [(one["content"], two["content"]) for one, two in asked] == [
        ("6 x 7?", "42"),
        ("Nothing?", ""),
        ("Name?", "NA"),
    ]
    (tmp_path / "b.csv").write_text("a,b\n1,2\n1,2,3\n")
    first, second = (row for _, row in rows_of(tmp_path / "b.csv"))
    assert first == {"a": "1", "b": "2"}
    assert second == UnusableRow(
        "more cells than columns", "row 2: 3 cells under 2 columns; quote a cell that holds a ','"
    )
    (tmp_path / "c.csv").write_text("")
    with pytest.raises(DataError, match=r"c\.csv: no rows"):
        rows_of(tmp_path / "c.csv")
    with pytest.raises(ValueError, match="Puzzle 'x2' is not 16 digits"):
        maps.sudoku({"Puzzle": "x2", "Solution": "1"})


def test_reasoning_replies_earn_every_published_reward():
    row = {"question": "2 and 1,001?", "answer": "2 + 1001 = <<2+1001=1003>>1003\n#### 1,003"}
    asked, reply = (message["content"] for message in maps.gsm8k_reasoning(row)["messages"])
    goal = maps.gsm8k(row)
    assert asked == goal["prompt"]
    assert gsm8k(reply.strip(), goal["answer"]) == {
        "xmlcount": 0.5, "soft_format": 0.5, "strict_format": 0.0, "int": 0.5, "correctness": 2.0,
    }  # fmt: skip
    assert gsm8k(reply, goal["answer"])["strict_format"] == 0.5


def test_maps_of_the_data_root(data_root):
    expected = {
        ("alpaca", "sft"): lambda row: row["messages"][1]["role"] == "assistant",
        ("dolly", "sft"): lambda row: all(m["content"] for m in row["messages"]),
        ("gsm8k", "sft"): lambda row: "<<" not in row["messages"][1]["content"],
        ("gsm8k", "grpo"): lambda row: row["answer"]["answer"][-1].isdigit() and row["task"] == "gsm8k",
    }
    for (name, stage), check in expected.items():
        source = SourceParams(name=name, limit=50)
        origin = find(source, stage, [data_root])
        mapped = [vars(maps)[origin.map.rpartition(".")[2]](row) for _, row in read(source, origin)]
        assert len(mapped) == 50
        assert all(map(check, mapped))
    for name, function in (("sudoku4x4", maps.sudoku), ("countdown", maps.countdown), ("math500", maps.math)):
        source = SourceParams(name=name, split="test", limit=20)
        assert all(json.dumps(function(row)) for _, row in read(source, find(source, "evaluate", [data_root])))
