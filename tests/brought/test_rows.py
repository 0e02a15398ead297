"""Rows as people bring them: the shapes that are recognised, what trains, what is left out, counted and told.

A case is a line. To add one from a bug report see CONTRIBUTING.md.
"""

import datetime
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llada_core.data import maps
from llada_core.data.params import DataParams
from llada_core.data.shapes import dialogue, pair, prompt
from llada_core.data.sources import DataError, RowError
from llada_core.tokenizer import Tokenizer
from llada_core.verifiers.answers import verify
from tasks.folders import content_hash
from tasks.work.prepare import prepare, summary
from tests.tiny import tiny_tokenizer

U, A, S = (
    {"role": role, "content": text} for role, text in (("user", "Q?"), ("assistant", "A."), ("system", "Be brief."))
)
HUMAN, GPT = {"from": "human", "value": "Q?"}, {"from": "gpt", "value": "A."}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "{}"}}]}
WRITTEN = {"role": "assistant", "content": "", "tool_calls": CALL["tool_calls"]}
ANSWERED = {"role": "tool", "tool_call_id": "c", "content": "7"}

# name: the row as published, the messages that are meant, what is told of it (None: nothing, it is our own shape)
DIALOGUES = {
    "our own": ({"messages": [U, A]}, [U, A], None),
    "with an id": ({"id": 7, "messages": [U, A]}, [U, A], None),
    "ShareGPT": ({"id": "a", "conversations": [HUMAN, GPT]}, [U, A], "ShareGPT (from and value)"),
    "ShareGPT with a system turn": ({"conversations": [{"from": "system", "value": "Be brief."}, HUMAN, GPT]}, [S, U, A], "ShareGPT"),
    "ShareGPT with a system field": ({"system": "Be brief.", "conversations": [HUMAN, GPT]}, [S, U, A], "a system prompt"),
    "an empty system field": ({"system": "", "conversations": [HUMAN, GPT]}, [U, A], "ShareGPT"),
    "conversations of roles": ({"conversations": [U, A]}, [U, A], "conversations"),
    "conversation": ({"conversation": [U, A]}, [U, A], "conversation"),
    "capitals": ({"messages": [{"role": "User", "content": "Q?"}, {"role": "ASSISTANT ", "content": "A."}]}, [U, A], None),
    "model": ({"messages": [U, {"role": "model", "content": "A."}]}, [U, A], None),
    "bot": ({"messages": [{"role": "human", "content": "Q?"}, {"role": "bot", "content": "A."}]}, [U, A], None),
    "prompter": ({"messages": [{"role": "prompter", "text": "Q?"}, {"role": "assistant", "text": "A."}]}, [U, A], "role"),
    "developer": ({"messages": [{"role": "developer", "content": "Be brief."}, U, A]}, [S, U, A], None),
    "parts": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Q?"}]}, A]}, [U, A], "parts"),
    "tool calls": ({"messages": [U, CALL, ANSWERED, A], "tools": [{}]}, [U, WRITTEN, ANSWERED, A], "none trains, tools left out"),
    "a name": ({"messages": [U | {"name": "Ann"}, A]}, [U | {"name": "Ann"}, A], None),
    "nothing in other columns": ({"messages": [U | {"name": None, "tool_calls": None}, A | {"name": None}]}, [U, A], None),
    "columns": ({"messages": {"role": ["user", "assistant"], "content": ["Q?", "A."]}}, [U, A], "columns"),
    "JSON in a cell": ({"messages": json.dumps([U, A])}, [U, A], None),
    "a number as an answer": ({"messages": [U, {"role": "assistant", "content": 42}]}, [U, A | {"content": "42"}], None),
    "prompt and completion": ({"prompt": "Q?", "completion": "A."}, [U, A], "prompt/completion"),
    "prompt and completion of messages": ({"prompt": [S, U], "completion": [A]}, [S, U, A], "prompt/completion"),
    "prompt and response": ({"prompt": "Q?", "response": "A."}, [U, A], "prompt/response"),
    "question and answer": ({"question": "Q?", "answer": "A."}, [U, A], "question/answer"),
    "a table's capitals": ({"Question": "Q?", "Answer": "A."}, [U, A], "question/answer"),
    "a number is its text": ({"question": "Q?", "answer": 42}, [U, A | {"content": "42"}], "question/answer"),
    "context and question": ({"context": "C", "question": "Q?", "answer": "A."}, [U | {"content": "C\n\nQ?"}, A], "question/context/answer"),
    "instruction, input, output": ({"instruction": "Q?", "input": "I", "output": "A."}, [U | {"content": "Q?\n\nI"}, A], "instruction/input/output"),
    "an empty input": ({"instruction": "Q?", "input": "", "output": "A."}, [U, A], "instruction/input/output"),
    "a missing input": ({"instruction": "Q?", "input": float("nan"), "output": "A."}, [U, A], "instruction/input/output"),
    "instruction and response": ({"instruction": "Q?", "response": "A."}, [U, A], "instruction/response"),
    "a system prompt": ({"system_prompt": "Be brief.", "question": "Q?", "response": "A."}, [S, U, A], "question/response"),
    "query and response": ({"query": "Q?", "response": "A."}, [U, A], "query/response"),
    "problem and solution": ({"problem": "Q?", "solution": "A.", "answer": "7"}, [U, A], "problem/solution"),
    "input and output": ({"input": "Q?", "output": "A."}, [U, A], "input/output"),
}  # fmt: skip


@pytest.mark.parametrize("name", DIALOGUES)
def test_a_dialogue_in_any_usual_shape_is_recognised_told_and_mapped(name):
    row, messages, told = DIALOGUES[name]
    found, shape = dialogue(row)
    assert found == {"messages": messages}
    if told is None:
        assert shape is None
    else:
        assert told in shape


# name: the row, the reason under which it is counted
UNUSABLE = {
    "an unknown role": ({"messages": [{"role": "narrator", "content": "x"}, A]}, "unknown role 'narrator'"),
    "an unknown speaker": ({"conversations": [{"from": "wizard", "value": "x"}, GPT]}, "unknown role 'wizard'"),
    "an empty reply": ({"messages": [U, {"role": "assistant", "content": " \n"}]}, "no answer"),
    "an empty cell": ({"question": "Q?", "answer": ""}, "no answer"),
    "a missing cell": ({"question": "Q?", "answer": None}, "no answer"),
    "not a number": ({"question": "Q?", "answer": float("nan")}, "no answer"),
    "only a question": ({"messages": [U]}, "no answer"),
    "only a greeting": ({"messages": [A]}, "no answer"),
    "only a tool call": ({"messages": [U, CALL]}, "no answer"),
    "nothing that trains": ({"messages": [U, A | {"weight": 0}]}, "no answer"),
    "an image": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, A]}, "content with a part that is no text (image_url)"),
    "an answer in pieces": ({"question": "Q?", "answer": {"text": ["A."]}}, "no text in 'answer'"),
    "half a weight": ({"messages": [U, A | {"weight": 0.5}]}, "weight 0.5 of a message: 0 or 1, false or true"),
    "a text among messages": ({"messages": ["Q?", "A."]}, "no message"),
    "messages that are text": ({"messages": "Q?"}, "no shape that is known: messages"),
    "a document": ({"text": "x"}, "no shape that is known: text"),
    "another shape": ({"foo": 1, "bar": 2}, "no shape that is known: bar, foo"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_row_that_cannot_be_used_has_a_reason(name):
    row, reason = UNUSABLE[name]
    with pytest.raises(RowError) as caught:
        dialogue(row)
    assert caught.value.reason == reason
    assert "\n" not in str(caught.value)


PAIRS = {
    "our own": ({"prompt": "Q?", "chosen": "A.", "rejected": "B."}, "Q?", None),
    "whole dialogues": ({"chosen": [U, A], "rejected": [U, A | {"content": "B."}]}, [U], "dialogues"),
    "prompt and dialogues": ({"prompt": "Q?", "chosen": [U, A], "rejected": [U, A | {"content": "B."}]}, "Q?", None),
    "ShareGPT": ({"conversations": [HUMAN], "chosen": GPT, "rejected": GPT | {"value": "B."}}, [U], "conversations"),
    "question": ({"system": "Be brief.", "question": "Q?", "chosen": "A.", "rejected": "B."}, [S, U], "question"),
    "instruction": ({"instruction": "Q?", "input": "I", "chosen": "A.", "rejected": "B."}, [U | {"content": "Q?\n\nI"}], "instruction"),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_in_any_usual_shape_is_recognised(name):
    row, prompt, told = PAIRS[name]
    found, shape = pair(row)
    assert found == {"prompt": prompt, "chosen": "A.", "rejected": "B."}
    assert (told is None and shape is None) or told in shape


def test_maps_of_our_own_take_numbers_and_empty_cells():
    assert maps.alpaca({"instruction": "6 x 7?", "input": None, "output": 42})["messages"][1]["content"] == "42"
    assert maps.gsm8k({"question": "Q?", "answer": 42})["answer"] == {"answer": "42"}
    grid, solved = "0034" + "3412" * 3, "1234" * 4
    for puzzle in (
        grid,
        int(grid),
        f" {int(grid)}\n",
    ):  # a table that took it for a number has dropped the zeros in front
        assert maps.sudoku({"Puzzle": puzzle, "Solution": int(solved)})["answer"] == {
            "puzzle": grid,
            "solution": solved,
        }


@pytest.fixture
def home(tmp_path):
    tiny_tokenizer().save(tmp_path / "tokenizer")
    return tmp_path


def made(home, rows, sft=None, name="mine.jsonl", **data):
    lines = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
    (home / name).write_text(lines, encoding="utf-8")
    block = {"validation": 0.0, "length": 256, "sources": [{"name": name}], **(sft or {})}
    values = {"workers": 1, "tokenizer": {"name": str(home / "tokenizer")}, "sft": block, **data}
    return prepare(DataParams.parse(values, "data"), seed=0, out=home / "data", home=home)


def trained(home):
    """The text that each row trains."""
    tokenizer = Tokenizer.load(home / "tokenizer")
    rows = datasets.load_from_disk(str(home / "data/sft/train"))
    return [
        tokenizer.decode([i for i, m in zip(row["input_ids"], row["maskable"], strict=True) if m], False)
        for row in rows
    ]


END = "<|eot_id|>"
ONE, TWO = ({"role": "assistant", "content": text} for text in ("one", "two"))
# name: messages, turns, the texts that train
TRAINED = {
    "all": ([U, ONE, U, TWO], "all", [f"one{END}two{END}"]),
    "weight 0": ([U, ONE | {"weight": 0}, U, TWO | {"weight": 1}], "all", [f"two{END}"]),
    "weight 0 of the last": ([U, ONE, U, TWO | {"weight": 0}], "all", [f"one{END}"]),
    "weight 0 of the last, last turn": ([U, ONE, U, TWO | {"weight": 0}], "last", [f"one{END}"]),
    "train: false": ([U, ONE | {"train": False}, U, TWO], "all", [f"two{END}"]),
    "train: false in words": ([U, ONE | {"train": "false"}, U, TWO], "all", [f"two{END}"]),
    "loss: false": ([U, ONE | {"loss": False}, U, TWO], "all", [f"two{END}"]),
    "each": ([U, ONE | {"weight": 0}, U, TWO], "each", [f"two{END}"]),
    "an empty turn": ([U, ONE | {"content": ""}, U, TWO], "all", [f"two{END}"]),
    "a turn of white space": ([U, ONE | {"content": " \n"}, U, TWO], "all", [f"two{END}"]),
    "a greeting": ([ONE, U, TWO], "all", [f"two{END}"]),
    "two questions": ([U, U, TWO], "all", [f"two{END}"]),
    "a system turn between": ([U, ONE, S, U, TWO], "all", [f"one{END}two{END}"]),
    "a tool call": ([U, CALL, ANSWERED, TWO], "all", [f"two{END}"]),
}


def test_only_what_is_to_be_trained_on_trains(home):
    for name, (messages, turns, texts) in TRAINED.items():
        made(home, [{"messages": messages}], {"turns": turns})
        assert trained(home) == texts, name
    made(home, [{"messages": [U, ONE | {"weight": 0}, U, TWO]}], {"mask_prompt": False, "turns": "all"})
    assert f"one{END}" not in trained(home)[0]


def test_rows_left_out_are_counted_with_their_reason_on_the_screen(home):
    rows = [{"messages": [U, A | {"content": f"A{i}."}]} for i in range(40)]
    odd = [{"messages": [U]}, {"messages": [U | {"role": "narrator"}, A]}, {"conversations": [HUMAN, GPT]}]
    lines = "".join(json.dumps(row) + "\n" for row in rows + odd) + '{"messages": "\\ud83d"}\n{"messages": [\n'
    card = made(home, lines)
    assert card["parts"]["sft"]["train"]["rows"] == 41
    told = list(summary(card))
    assert any("nothing held out, so nothing is validated" in line for line in told)
    assert "sft: mine.jsonl: 45 rows, recognised as ShareGPT (from and value): 1" in told
    (left_out,) = (line for line in told if "left out" in line)
    assert left_out.startswith("sft: mine.jsonl: 4 of 45 rows cannot be used, left out: ")
    for part in (
        "1 no answer, first row 41:",
        "1 unknown role 'narrator', first row 42:",
        "first line 44:",
        "first line 45: not valid",
    ):
        assert part in left_out
    assert card == json.loads((home / "data/card.json").read_text())
    made(home, lines, workers=2)
    assert len(trained(home)) == 41


def test_too_many_unusable_rows_are_refused_with_the_way_on_and_the_old_data_stays(home):
    good = [{"messages": [U, A | {"content": f"A{i}."}]} for i in range(30)]
    bad = [{"messages": [U, {"role": "assistant", "content": ""}]}]
    made(home, good + bad * 10)  # ten of a small file are borne
    before = content_hash(home / "data")
    says = r"data\.sft: mine\.jsonl: 11 of 41 rows cannot be used \(11 no answer, first row 31: .*-S data\.max_unusable=0\.269$"
    with pytest.raises(DataError, match=says):
        made(home, good + bad * 11)
    assert content_hash(home / "data") == before
    assert made(home, good + bad * 11, max_unusable=0.269)["parts"]["sft"]["train"]["rows"] == 30
    with pytest.raises(
        DataError, match=r"1 of 31 rows cannot be used .*strict: true refuses any.*-S data\.strict=false"
    ):
        made(home, good + bad, strict=True)
    assert made(home, good, strict=True)["parts"]["sft"]["train"]["rows"] == 30
    with pytest.raises(
        DataError, match=r"no row is left to train on; dropped: \{'no answer': 3\}; mine\.jsonl, row 1: no reply"
    ):
        made(home, bad * 3)


def test_a_source_of_which_nothing_is_left_is_no_source(home):
    (home / "other.jsonl").write_text('{"foo": 1}\n')
    with pytest.raises(
        DataError, match=r"other\.jsonl: 1 of 1 rows cannot be used .*the fields foo.*none is left of this source"
    ):
        made(home, [{"messages": [U, A]}], {"sources": [{"name": "mine.jsonl"}, {"name": "other.jsonl"}]})


def test_what_a_chat_template_refuses_and_a_map_function_raises_is_one_row(home):
    tiny_tokenizer().save(home / "tokenizer")
    strict = Tokenizer.load(home / "tokenizer")
    strict.fast.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        + str(strict.fast.chat_template)
    )
    strict.save(home / "tokenizer")
    card = made(home, [{"messages": [U, A]}, {"messages": [S, U, A]}])
    reasons = card["parts"]["sft"]["read"]["mine.jsonl"]["unusable"]
    assert list(reasons) == ["the chat template refuses the dialogue"]
    assert (
        "row 2: the chat template refuses the dialogue: no system here"
        in reasons["the chat template refuses the dialogue"]["first"]
    )
    rows = [{"instruction": "Q?", "output": "A."}, {"instruction": "Q?"}]
    card = made(home, rows, {"sources": [{"name": "mine.jsonl", "map": "llada_core.data.maps.alpaca"}]})
    (reason,) = card["parts"]["sft"]["read"]["mine.jsonl"]["unusable"].items()
    assert reason[0] == "the map function llada_core.data.maps.alpaca raised KeyError"
    assert "row 2: " in reason[1]["first"]


# What a table holds beside what its stage needs, and JSON does not know.
BESIDE = {
    "made": datetime.datetime(2024, 5, 1),
    "day": datetime.date(2024, 5, 1),
    "image": b"\xff",
    "took": datetime.timedelta(seconds=3),
}
STAGES = {
    "sft": {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
    "pretrain": {"input_ids": [5, 6, 7]},
    "grpo": {"prompt": "Q?", "task": "math", "answer": {"answer": "7"}},
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("column", BESIDE)
def test_a_column_of_no_kind_that_json_knows_disturbs_nobody(home, stage, column):
    table = pa.Table.from_pylist([STAGES[stage] | {column: BESIDE[column]}] * 2)
    pq.write_table(table, home / "mine.parquet")
    block = {"validation": 0.0, "sources": [{"name": "mine.parquet"}]} | (
        {"drop_tail": False} if stage == "pretrain" else {}
    )
    values = {"workers": 1, "tokenizer": {"name": str(home / "tokenizer")}, stage: block}
    card = prepare(DataParams.parse(values, "data"), seed=0, out=home / "data", home=home)
    assert card["parts"][stage]["train"]["rows"] == (1 if stage == "pretrain" else 2)
    assert "read" not in card["parts"][stage]


ASKED = {
    "question and answer": {"question": "Q?", "answer": "A."},
    "a dialogue": {"messages": [U, A]},
    "ShareGPT": {"conversations": [HUMAN, GPT]},
}


@pytest.mark.parametrize("name", ASKED)
def test_a_prompt_without_a_task_is_a_question_whose_answer_is_compared_as_text(name):
    row, shape = prompt(ASKED[name])
    assert [message["content"] for message in row["prompt"]] == ["Q?"]
    assert (row["task"], row["answer"]) == ("text", {"answer": "A."})
    assert "last reply as answer" in shape
    assert verify("text", " A. ", row["answer"])
    assert not verify("text", "A", row["answer"])
    with pytest.raises(RowError, match="no answer to compare with"):
        prompt({"messages": [A, U]})


def test_a_map_function_for_another_shape_is_there_to_be_copied():
    row = {"frage": "Q?", "antwort": "A."}
    with pytest.raises(RowError, match=r"antwort, frage; give the source `map: \./my_maps\.py:turns`") as caught:
        dialogue(row)
    names: dict = {}
    exec(str(caught.value).partition("with my_maps.py: ")[2], names)
    assert dialogue(names["turns"](row))[0]["messages"] == [U, A]
