"""Ids made elsewhere: folders that dllm's tools saved, and map functions that return ids and labels."""

import json
from collections import Counter

import datasets
import pytest

from llada_core.data.encode import encode_ids
from llada_core.data.params import DataParams, PretrainData, SFTData
from llada_core.data.sources import DataError
from tasks.work.prepare import prepare
from tests.tiny import tiny_tokenizer

TURNS = [[{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"It is {i}."}] for i in range(30)]


def sft_map_fn(row, *, tokenizer, mask_prompt_loss=True):
    """A map function with dllm's signature (dllm/utils/data.py), for any dialogue: ids, labels, the prompt's length."""
    whole = tokenizer.apply_chat_template(row["messages"], tokenize=False)
    prompt = tokenizer.apply_chat_template(row["messages"][:-1], tokenize=False, add_generation_prompt=True)
    ids, start = (
        tokenizer.encode(whole, add_special_tokens=False),
        len(tokenizer.encode(prompt, add_special_tokens=False)),
    )
    return {
        "input_ids": ids,
        "labels": [-100] * start * mask_prompt_loss + ids[start * mask_prompt_loss :],
        "prompt_len": start,
    }


def made(home, data):
    tiny_tokenizer().save(home / "tokenizer")
    values = {"workers": 1, "tokenizer": {"name": str(home / "tokenizer")}, **data}
    return prepare(DataParams.parse(values, "data"), seed=0, out=home / "data", home=home)


def rows(home, part, side="train"):
    return datasets.load_from_disk(str(home / "data" / part / side))


@pytest.fixture
def saved(tmp_path):
    """What dllm/tools/preprocess_sft_dataset.py leaves: a DatasetDict with all columns of the source."""
    fast = tiny_tokenizer().fast
    table = datasets.Dataset.from_list([{"messages": m, **sft_map_fn({"messages": m}, tokenizer=fast)} for m in TURNS])
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(str(tmp_path / "sft"))
    return tmp_path, table


def test_a_preprocessed_folder_is_trained_on_as_it_is(saved):
    home, table = saved
    card = made(home, {"sft": {"sources": [{"name": "sft"}], "validation": 0.2, "length": 200}})
    assert card["parts"]["sft"]["train"]["rows"] + card["parts"]["sft"]["validation"]["rows"] == len(TURNS)
    expected = {tuple(row["input_ids"]): [int(label != -100) for label in row["labels"]] for row in table}
    for side in ("train", "validation"):
        for row in rows(home, "sft", side):
            assert row["maskable"] == expected[tuple(row["input_ids"])]


def test_a_map_function_may_return_ids_and_labels(tmp_path):
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps({"messages": m}) + "\n" for m in TURNS))
    source = {"name": "chat.jsonl", "map": "tests.data.test_preprocessed.sft_map_fn"}
    made(tmp_path, {"sft": {"sources": [source], "validation": 0.0, "length": 200}})
    wanted = [sft_map_fn({"messages": m}, tokenizer=tiny_tokenizer().fast) for m in TURNS]
    assert [row["input_ids"] for row in rows(tmp_path, "sft")] == [row["input_ids"] for row in wanted]
    made(tmp_path, {"sft": {"sources": [source], "validation": 0.0, "length": 200, "mask_prompt": False}})
    assert all(all(row["maskable"]) for row in rows(tmp_path, "sft"))
    with pytest.raises(DataError, match=r"asks for the tokenizer.*data\.tokenizer\.name"):
        made(tmp_path, {"tokenizer": {"vocab_size": 300}, "sft": {"sources": [source]}})


def test_packed_rows_keep_their_borders(tmp_path):
    packed = [[(i + j) % 200 + 6 for j in range(16)] for i in range(40)]
    table = datasets.Dataset.from_list([{"input_ids": ids, "labels": ids} for ids in packed])
    datasets.DatasetDict({"train": table}).save_to_disk(str(tmp_path / "pt"))
    made(tmp_path, {"pretrain": {"sources": [{"name": "pt"}], "validation": 0.0, "length": 16}})
    assert [row["input_ids"] for row in rows(tmp_path, "pretrain")] == packed
    with pytest.raises(DataError, match=r"row 1: .*do not tell where documents end"):
        made(tmp_path, {"pretrain": {"sources": [{"name": "pt"}], "documents": True}})
    with pytest.raises(DataError, match=r"row 1: ids were made with a tokenizer.*data\.tokenizer\.name"):
        made(tmp_path, {"tokenizer": {"vocab_size": 300}, "pretrain": {"sources": [{"name": "pt"}]}})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": [6, 126_348], "labels": [6, 7]}, "id 126348 is none of the tokenizer's 300"),
        ({"input_ids": [6, -1]}, "id -1 is none of"),
        ({"input_ids": [6, 7, 8], "labels": [-100, 7]}, "2 labels for 3 input_ids"),
        ({"input_ids": [6, 7, 8], "labels": [-100, 8, 8]}, "label 8 at position 1 is neither -100 nor the token 7"),
    ],
)
def test_ids_that_cannot_be_trained_on_are_told(row, message):
    with pytest.raises(DataError, match=message):
        encode_ids([row], tiny_tokenizer(), SFTData(), Counter())
    with pytest.raises(DataError, match="prompts as text"):
        encode_ids([row], tiny_tokenizer(), DataParams(puzzles={"seats": {"grpo": 1}}, grpo={}).grpo, Counter())


def encoded(row, params):
    counts = Counter()
    return encode_ids([row], tiny_tokenizer(), params, counts), counts


def test_long_rows_are_cut_or_dropped_as_dllm_does():
    row = {"input_ids": list(range(6, 26)), "labels": [-100] * 10 + list(range(16, 26))}
    cut, counts = encoded(row, SFTData(length=12))
    assert [list(ids) for ids in cut["input_ids"]] == [list(range(6, 18))]
    assert counts == {"answer cut": 1}
    assert encoded(row, SFTData(length=10))[1] == {"prompt too long": 1}
    assert encoded(row, SFTData(length=12, truncation="filter"))[1] == {"too long": 1}
    assert len(encoded(row, PretrainData(length=12))[0]["input_ids"]) == 1
    nothing = {"input_ids": [6, 7], "labels": [-100, -100]}
    assert encoded(nothing, SFTData())[1] == {"no answer": 1}
