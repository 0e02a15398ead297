"""JSON lines are split at \\n alone, by every reader and writer of the project; a damaged line is told with its file."""

import json
import re
from pathlib import Path

import pytest

from llada_core import files
from llada_core.evaluation.answering import AnswerStore, Shard
from llada_core.evaluation.taskset import read_puzzles
from llada_core.files import FileError
from llada_core.modeling import load_model, save_model
from llada_core.settings import ConfigError
from llada_core.tokenizer import Tokenizer
from llada_core.training.accelerator import Ranks
from llada_core.training.progress import MetricsFile, read_metrics
from tasks.project import Project
from tasks.record.registry import receipts, write_receipt
from tasks.record.tracking import samples
from tasks.work.measure import _records
from tasks.work.report import scores_of
from tests.tiny import tiny_pair, tiny_tokenizer

# What str.splitlines, an editor or another language takes for the end of a line, and what has no UTF-8.
NASTY = (
    "\u2028",
    "\u2029",
    "\x85",
    "\x0b",
    "\x0c",
    "\x1c",
    "\x1d",
    "\x1e",
    "\r",
    "\r\n",
    "\n",
    "\x00",
    "\x7f",
    "\ufeff",
    "\ud83d",
)
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("character", NASTY, ids=lambda text: "-".join(f"{ord(c):04x}" for c in text))
def test_any_character_in_a_reply_comes_back_from_whatever_we_write(tmp_path, character, monkeypatch):
    monkeypatch.setenv("LLADAFLOW_HOME", str(tmp_path))
    reply = f"a{character}b"
    line = files.line_of({"id": 1, "reply": reply})
    assert line.encode().decode().splitlines() == [line.rstrip("\n")]  # one line for every reader, however it splits
    records = [{"id": f"q{i}", "score": 1.0, "reply": reply} for i in range(2)]
    path = tmp_path / "b" / "m.samples.jsonl"
    path.parent.mkdir()
    path.write_text("".join(map(files.line_of, records)), encoding="utf-8")
    assert list(files.read(path)) == records
    assert scores_of(path) == {"q0": 1.0, "q1": 1.0}
    assert samples(path)["reply"] == [reply, reply]
    assert _records(path)["q1"]["reply"] == reply
    MetricsFile(tmp_path / "metrics.jsonl", Ranks()).write(3, {"said": reply})
    assert [step["said"] for step in read_metrics(tmp_path / "metrics.jsonl")] == [reply]
    write_receipt(Project.at(tmp_path), {"event": "version", "said": reply})
    assert [receipt["said"] for receipt in receipts(Project.at(tmp_path))] == [reply]
    AnswerStore(tmp_path / "answers", Shard()).add(["k"], [{"text": reply}], 1.0)
    assert AnswerStore(tmp_path / "answers", Shard()).get("k", {}) == {"text": reply}


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85"])
def test_files_of_earlier_versions_hold_the_characters_themselves(tmp_path, character):
    records = [{"id": f"q{i}", "score": 1.0, "reply": character} for i in range(2)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    assert list(files.read(path)) == records
    assert samples(path)["reply"] == [character] * 2
    assert scores_of(path) == {"q0": 1.0, "q1": 1.0}
    puzzle = {"id": "u", "task": "countdown", "prompt": f"one{character}two", "answer": {"numbers": [1], "target": 1}}
    path.write_text(json.dumps(puzzle, ensure_ascii=False) + "\n\n", encoding="utf-8")
    assert [row["prompt"] for row in read_puzzles(path)] == [puzzle["prompt"]]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"a": 1}\n{"a": "b', r"line 2: not valid JSON \(Unterminated string.*\); is the file cut off\?$"),
        (b'{"a": 1}\n{"a": 1', r"line 2: .*is the file cut off\?$"),
        (b'{"a": 1}{"a": 2}\n', r"line 1: .*one value a line: end each with a newline"),
        (b'{"a": 1}\r{"a": 2}\r', r"line 1: .*one value a line: end each with a newline"),
        (b'{"a": 1},\n{"a": 2}\n', r"line 1: .*without a comma between them"),
        (b"{'a': 1}\n", r"line 1: .*it is written as Python prints it"),
        (b'{"a": None}\n', r"line 1: .*it is written as Python prints it"),
        (b'{"a": "b\tc"}\n', r"line 1: .*a line break or tab inside a string is written"),
        (b'{"a": "\xe9"}\n', r"line 1: byte 7 is not UTF-8; save the file as UTF-8 text$"),
        (b'{"a": nope}\n', r"line 1: .*mend it there$"),
        (b"[" * 200_000, r"line 1: not valid JSON"),
    ],
)
def test_a_damaged_line_is_told_with_its_file_its_line_and_a_remedy(tmp_path, content, says):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(content)
    with pytest.raises(FileError, match=rf"mine\.jsonl, {says}") as caught:
        list(files.read(path))
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=rf"mine\.jsonl, {says}"):
        read_puzzles(path)


def test_a_run_that_is_written_at_this_moment_has_whole_lines_only(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "time": 0}\n{"step": 2, "ti')
    assert [line["step"] for line in read_metrics(path)] == [1]
    assert files.complete(path.read_bytes()) == [b'{"step": 1, "time": 0}']


def test_nobody_splits_json_lines_in_another_way():
    for room in ("llada_core", "tasks", "flows", "cli", "app", "benchmarks"):
        for path in sorted((ROOT / room).rglob("*.py")):
            if path.name == "json_lines.py":
                continue
            source = path.read_text(encoding="utf-8")
            found = re.findall(r".*(?<!or)json\.loads\(line\).*|.*jsonl.*splitlines.*|.*map\(json\.loads.*", source)
            assert not found, f"{path}: {found}; llada_core.files reads and writes JSON lines"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"", b'{"model": {"ty', b"\xff\xff", b"PK\x03\x04"])
def test_a_damaged_tokenizer_is_told_by_its_file(tmp_path, name, content):
    tiny_tokenizer().save(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{tmp_path}/{name}(:|, line)") as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "adapter_config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("content", [b"", b'{"architectures": ["LL', b"\xff\xff"])
def test_a_damaged_model_is_told_by_its_file(tmp_path, name, content):
    model, tokenizer = tiny_pair()
    save_model(model, tmp_path, tokenizer)
    (tmp_path / name).write_bytes(content)
    if name.startswith("model"):
        (tmp_path / "model.safetensors").unlink()
    with pytest.raises((ValueError, OSError), match=name.replace(".", r"\.")) as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)
