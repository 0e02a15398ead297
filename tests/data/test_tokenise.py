"""Rows of ids: what is trained on, what is cut, what is dropped, and that special strings in data stay text."""

from collections import Counter

import numpy as np
import pytest

from llada_core.data import encode
from llada_core.data.params import GRPOData, PreferenceData, PretrainData, SFTData
from llada_core.data.rows import Packer
from llada_core.data.sources import DataError
from tests.tiny import tiny_tokenizer

USER = {"role": "user", "content": "What is 7 + 5?"}
REPLY = {"role": "assistant", "content": "12"}
THREE = {"messages": [USER, REPLY, {"role": "user", "content": "and 12?"}, {"role": "assistant", "content": "34 56"}]}


def sft(rows, counts=None, **changes):
    return encode.dialogues(rows, tiny_tokenizer(), SFTData(**changes), Counter() if counts is None else counts)


def trained_text(columns, row=0):
    tokenizer = tiny_tokenizer()
    ids, maskable = columns["input_ids"][row], columns["maskable"][row]
    return tokenizer.decode([i for i, m in zip(ids, maskable, strict=True) if m], skip_special=False)


def test_rows_equal_the_chat_template_and_prompts_its_beginning():
    tokenizer = tiny_tokenizer()
    encoded = sft([THREE])
    ids = encoded["input_ids"][0].tolist()
    assert ids == tokenizer.fast.apply_chat_template(THREE["messages"], return_dict=False)
    start = encoded["maskable"][0].index(1)
    assert ids[:start] == tokenizer.chat_ids(THREE["messages"][:3])
    grpo = encode.prompts(
        [{"prompt": THREE["messages"][:3], "task": "x", "answer": {"b": 1, "a": 2}}], tokenizer, GRPOData(), Counter()
    )
    assert grpo["prompt_ids"] == [tokenizer.chat_ids(THREE["messages"][:3])]
    assert grpo["answer"] == ['{"a":2,"b":1}']


@pytest.mark.parametrize(
    ("turns", "texts"),
    [
        ("last", ["34 56<|eot_id|>"]),
        ("all", ["12<|eot_id|>34 56<|eot_id|>"]),
        ("each", ["12<|eot_id|>", "34 56<|eot_id|>"]),
    ],
)
def test_the_chosen_turns_train(turns, texts):
    encoded = sft([THREE], turns=turns)
    assert [trained_text(encoded, i) for i in range(len(encoded["input_ids"]))] == texts


def test_sampled_turns_train_one_reply_of_each_dialogue():
    rows = [{"messages": [*THREE["messages"], {"role": "user", "content": f"{i}"}, REPLY]} for i in range(200)]
    encoded = sft(rows, turns="sampled")
    assert len(encoded["input_ids"]) == 200
    assert min(Counter(len(ids) // 32 for ids in encoded["input_ids"]).values()) > 40
    assert encoded == sft(rows, turns="sampled")


def test_what_follows_the_last_reply_is_left_out():
    encoded = sft([{"messages": [USER, REPLY, USER]}])
    assert encoded == sft([{"messages": [USER, REPLY]}])


def test_special_strings_in_data_stay_text():
    tokenizer = tiny_tokenizer()
    nasty = {"role": "user", "content": "a<|eot_id|><|mdm_mask|>"}
    ids = sft([{"messages": [nasty, REPLY]}])["input_ids"][0]
    assert ids.count(tokenizer.special.eot_id) == 2
    assert tokenizer.special.mask_id not in ids
    document = encode.documents([{"text": "a<|mdm_mask|>"}], tokenizer, PretrainData(), Counter())["input_ids"][0]
    assert tokenizer.special.mask_id not in document


def test_truncation_never_leaves_an_empty_answer_and_is_counted():
    whole = sft([{"messages": [USER, REPLY]}], length=512)
    length, prompt = len(whole["input_ids"][0]), whole["maskable"][0].index(1)
    for width in range(8, length + 2):
        counts = Counter()
        encoded = sft([{"messages": [USER, REPLY]}], counts, length=width)
        if width >= length:
            assert encoded == whole
            assert not counts
        elif width > prompt:
            assert counts == {"answer cut": 1}
            assert len(encoded["input_ids"][0]) == width
            assert any(encoded["maskable"][0])
        else:
            assert counts == {"prompt too long": 1}
            assert not encoded["input_ids"]
    counts = Counter()
    assert not sft([{"messages": [USER, REPLY]}], counts, length=prompt + 1, truncation="filter")["input_ids"]
    assert counts == {"too long": 1}


def test_rows_without_an_answer_are_dropped_and_counted():
    rows = [
        {"messages": [USER]},
        {"messages": [USER, {"role": "assistant", "content": " "}]},
        {"messages": [USER, REPLY]},
    ]
    counts = Counter()
    encoded = sft(rows, counts)
    assert len(encoded["input_ids"]) == 1
    assert counts == {"no answer": 2}
    assert not any(sft(rows[2:], mask_prompt=True)["maskable"][0][:5])
    assert all(sft(rows[2:], mask_prompt=False)["maskable"][0])


def test_pairs_share_their_prompt():
    tokenizer = tiny_tokenizer()
    row = {"prompt": "What?", "chosen": "12", "rejected": "34 and 56"}
    rows, counts = [row, {**row, "chosen": ""}, {**row, "prompt": "x" * 500}], Counter()
    encoded = encode.pairs(rows, tokenizer, PreferenceData(), counts)
    assert [p.tolist() for p in encoded["prompt_ids"]] == [tokenizer.chat_ids([{"role": "user", "content": "What?"}])]
    assert tokenizer.answer_text(encoded["chosen_ids"][0]) == "12"
    assert tokenizer.answer_text(encoded["rejected_ids"][0]) == "34 and 56"
    assert sum(counts.values()) == 3  # an empty reply; and a prompt that is too long in both halves


def test_prompts_that_are_too_long_are_dropped():
    rows = [{"prompt": "x" * n, "task": "t", "answer": {}} for n in (5, 400)]
    counts = Counter()
    encoded = encode.prompts(rows, tiny_tokenizer(), GRPOData(length=100), counts)
    assert encoded["prompt"] == ["xxxxx"]
    assert counts == {"prompt too long": 1}


@pytest.mark.parametrize("cuts", [[7], [1, 2, 4], [3, 4]])
def test_packing_does_not_depend_on_how_documents_arrive(cuts):
    lengths = [5, 1, 9, 4, 2, 7, 3]
    ids, whole = np.arange(sum(lengths)), []
    packer = Packer(PretrainData(length=6, documents=True, drop_tail=False))
    start = 0
    for count in cuts:
        part = lengths[start : start + count]
        first = sum(lengths[:start])
        columns = packer.add(ids[first : first + sum(part)], np.array(part))
        whole += zip(columns["input_ids"], columns["document_ids"], strict=True)
        start += count
    rest = packer.rest()
    whole += zip(rest["input_ids"], rest["document_ids"], strict=True)
    assert [row.tolist() for row, _ in whole] == [list(range(i, min(i + 6, 31))) for i in range(0, 31, 6)]
    assert whole[0][1].tolist() == [0, 0, 0, 0, 0, 1]
    assert whole[2][1].tolist() == [0, 0, 0, 1, 1, 1]


def test_missing_fields_are_named():
    with pytest.raises(DataError, match="expected text in the field 'text'; the row has the fields body"):
        encode.documents([{"body": "x"}], tiny_tokenizer(), PretrainData(), Counter())
    with pytest.raises(DataError, match=r"list of messages in the field 'messages'.*name a map function"):
        sft([{"instruction": "x"}])
    with pytest.raises(DataError, match="messages with the texts 'role' and 'content'"):
        sft([{"messages": [{"from": "human", "value": "x"}]}])
