"""Files as people bring them: read as meant, or told in one line with the file, the row and what helps.

A case is a line: a name, the bytes, and what is read. To add one from a bug report see CONTRIBUTING.md.
"""

import bz2
import gzip
import json
import lzma
import re

import pyarrow
import pyarrow.parquet
import pytest

from llada_core.data.params import SourceParams
from llada_core.data.sources import DataError, UnusableRow, find, read, rows_of, split_file

A, B = {"text": "é one"}, {"text": "two 🙂"}
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in (A, B))
LIST = json.dumps([A, B], ensure_ascii=False)
CELLS = "text\né one\ntwo 🙂\n"
MARK = "\ufeff"

MEANT = {
    "plain.jsonl": LINES.encode(),
    "bom.jsonl": (MARK + LINES).encode(),
    "crlf.jsonl": LINES.replace("\n", "\r\n").encode(),
    "bom-crlf.jsonl": (MARK + LINES.replace("\n", "\r\n")).encode(),
    "blank-lines.jsonl": f"\n{LINES}\n \n\r\n".encode(),
    "no-last-newline.jsonl": LINES.rstrip("\n").encode(),
    "two-marks.jsonl": "".join(MARK + line + "\n" for line in LINES.splitlines()).encode(),  # joined with cat
    "windows-terminal.jsonl": LINES.encode("utf-16"),  # what PowerShell's > writes
    "big-endian.jsonl": b"\xfe\xff" + LINES.encode("utf-16-be"),
    "wide.jsonl": LINES.encode("utf-32"),
    "list.jsonl": LIST.encode(),
    "pretty.jsonl": "".join(json.dumps(row, indent=1) + "\n" for row in (A, B)).encode(),
    "other.ndjson": LINES.encode(),
    "upper.JSONL": LINES.encode(),
    "packed.jsonl.gz": gzip.compress(LINES.encode()),
    "packed-bom.jsonl.gz": gzip.compress((MARK + LINES).encode()),
    "packed.jsonl.bz2": bz2.compress(LINES.encode()),
    "packed.jsonl.xz": lzma.compress(LINES.encode()),
    "packed-unsaid.jsonl": gzip.compress(LINES.encode()),
    "unpacked-by-a-browser.jsonl.gz": LINES.encode(),
    "list.json": LIST.encode(),
    "bom.json": (MARK + LIST).encode(),
    "wide.json": LIST.encode("utf-16"),
    "pretty.json": json.dumps([A, B], indent=2).encode(),
    "lines.json": LINES.encode(),
    "lines-crlf.json": LINES.replace("\n", "\r\n").encode(),
    "packed.json.gz": gzip.compress(LIST.encode()),
    "one-after-another.json": "".join(json.dumps(row, indent=1) for row in (A, B)).encode(),
    "wrapped.json": json.dumps({"version": 1, "data": [A, B]}).encode(),
    "table.csv": CELLS.encode(),
    "bom.csv": (MARK + CELLS).encode(),
    "crlf.csv": CELLS.replace("\n", "\r\n").encode(),
    "blank-lines.csv": f"\n{CELLS}\n\n".encode(),
    "packed.csv.gz": gzip.compress(CELLS.encode()),
    "tab.tsv": CELLS.encode(),
    "excel.csv": CELLS.encode("utf-16"),
    "said-separator.csv": f"sep=;\r\n{CELLS}".encode(),
}  # fmt: skip


@pytest.mark.parametrize("name", MEANT)
def test_a_file_is_read_as_meant(tmp_path, name):
    (tmp_path / name).write_bytes(MEANT[name])
    assert [row for _, row in rows_of(tmp_path / name)] == [A, B]


TEXTS = {
    "plain.txt": b"one\ntwo\n",
    "bom.txt": b"\xef\xbb\xbfone\ntwo\n",
    "crlf.txt": b"one\r\ntwo\r\n",
    "old-mac.txt": b"one\rtwo\r",
    "wide.txt": "one\r\ntwo\r\n".encode("utf-16"),
    "packed.txt.gz": gzip.compress(b"one\ntwo\n"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_text_is_the_same_from_every_system(tmp_path, name):
    (tmp_path / name).write_bytes(TEXTS[name])
    assert [row["text"] for _, row in rows_of(tmp_path / name)] == ["one\ntwo\n"]
    assert [row["text"] for _, row in rows_of(tmp_path / name, "line")] == ["one", "two"]


@pytest.mark.parametrize(
    "character", ["\u2028", "\u2029", "\x85", "\x0b", "\x1c", "\x00", "\u200b", "\ufeff", "\u00ad"]
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
def test_characters_inside_a_text_stay_there_and_end_nothing(tmp_path, name, character):
    text = f"a{character}b"
    line = json.dumps({"text": text}, ensure_ascii=False)
    content = {
        "jsonl": f"{line}\n{line}",
        "csv": f'text\n"{text}"\n"{text}"',
        "txt": text,
        "json": f"[{line},\n{line}]",
    }
    (tmp_path / name).write_text(content[name[2:]] + "\n", encoding="utf-8")
    assert [row["text"].rstrip("\n") for _, row in rows_of(tmp_path / name)] == [text] * (1 if name == "a.txt" else 2)


# One row in the middle that cannot be used: what stands in its place, and nothing else is lost.
ONE_BAD = {
    "half.jsonl": (b'{"text": "a \\ud83d b"}', "half of a character in a text", r"line 2: a text holds \\ud83d, half"),
    "cut.jsonl": (b'{"text": "a', "not valid JSON", r"line 2: not valid JSON \(Unterminated.*is the file cut off\?"),
    "latin.jsonl": (b'{"text": "\xe9"}', "not UTF-8 text", "line 2: byte 10 is not UTF-8; save the file as UTF-8"),
    "list.jsonl": (b'["a"]', "no JSON object", "line 2: expected a JSON object, got list"),
    "null.jsonl": (b"null", "no JSON object", "line 2: expected a JSON object, got NoneType"),
    "comma.jsonl": (b'{"text": "a"},', "not valid JSON", "line 2: .*without a comma between them"),
    "two.jsonl": (b'{"text": "a"}{"text": "b"}', "not valid JSON", "line 2: .*one value a line"),
    "python.jsonl": (b"{'text': 'a'}", "not valid JSON", "line 2: .*as Python prints it"),
    "half.json": (b'{"text": "a \\ud83d b"}', "half of a character in a text", "line 2: "),
    "more.csv": (b"a,b", "more cells than columns", "row 2: 2 cells under 1 columns; quote a cell that holds a ','"),
    "quote.csv": (b'"a" b', "not a row of a CSV table", "row 2: "),
}


@pytest.mark.parametrize("name", ONE_BAD)
def test_one_bad_row_is_kept_apart_and_the_others_are_read(tmp_path, name):
    bad, reason, told = ONE_BAD[name]
    around = ("text\né one\n", "two 🙂\n") if name.endswith("csv") else LINES.splitlines(keepends=True)
    (tmp_path / name).write_bytes(around[0].encode() + bad + b"\n" + around[1].encode())
    (_, first), (_, middle), (_, last) = rows_of(tmp_path / name)
    assert (first, last) == (A, B)
    assert isinstance(middle, UnusableRow)
    assert middle.reason == reason
    assert re.match(told, middle.told), middle.told
    assert "\n" not in middle.told


# Files that cannot be read at all: one line that says which, and what helps.
REFUSED = {
    "cut.json": (LIST.encode()[:-9], r"not valid JSON \(.*is the file cut off\?"),
    "comma.json": (LIST.encode()[:-1] + b",]", r"not valid JSON \((Illegal trailing|Expecting value).*mend it there"),
    "text.json": (b'"a"', "expected a JSON list of objects, got str"),
    "cut.jsonl.gz": (gzip.compress(LINES.encode() * 999)[:-12], "cannot be unpacked .*is the file cut off"),
    "damaged.jsonl.gz": (b"\x1f\x8b\x08\x00" + b"x" * 99, "cannot be unpacked"),
    "zip.jsonl": (b"PK\x03\x04" + b"\0" * 30, "a zip archive or an Office file; unpack it"),
    "packed.jsonl.zst": (b"\x28\xb5\x2f\xfd" + b"\0" * 9, r"packed with zstd; unpack it \(zstd -d\)"),
    "table.csv": (b"PK\x03\x04" + b"\0" * 30, "a zip archive .*save the table as CSV"),
    "pointer.jsonl": (b"version https://git-lfs.github.com/spec/v1\n", r"a pointer of Git LFS .*git lfs pull"),
    "odd.jsonl": (b"\xff\xfe{", "begins as utf-16 but is not .*; save it as UTF-8 text"),
    "latin.txt": ("é".encode("latin-1"), r"line 1: byte 0 is not UTF-8; save the file as UTF-8 text"),
    "latin.csv": (b"text\n\xe9\n", r"line 2: byte 0 is not UTF-8; save the file as UTF-8 text"),
    "open.csv": (b'text\na\n"b\nc\n', r"row 2: a quote is opened there and never closed"),
    "twice.csv": (b"text,text\na,b\n", "two columns are named 'text'; name them apart"),
    "mac.csv": (b"text\ra\rb\r", r"its lines end with \\r alone, as on old Macs; save it as CSV"),
    "cut.parquet": (b"PAR1xxxx", "not a whole Parquet file"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_cannot_be_read_is_one_line_with_a_remedy(tmp_path, name):
    content, told = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}(,|:) {told}") as caught:
        list(rows_of(tmp_path / name))
    assert "\n" not in str(caught.value)


TABLES = {
    "zeros": (b"Puzzle,Solution\n0043,0012\n", {"Puzzle": "0043", "Solution": "0012"}),
    "european": (b"instruction;output\nPi?;3,14\n", {"instruction": "Pi?", "output": "3,14"}),
    "line break in a cell": (b'q,a\n"one\ntwo",x\n', {"q": "one\ntwo", "a": "x"}),
    "comma and quotes": (b'q,a\n"a, ""b""",x\n', {"q": 'a, "b"', "a": "x"}),
    "spaces around names": (b"q , a\nx,y\n", {"q": "x", "a": "y"}),
    "no last cells": (b"q,a,b\nx\n", {"q": "x", "a": "", "b": ""}),
    "empty columns": (b"q,a,,\nx,y,,\n", {"q": "x", "a": "y"}),
    "what looks like nothing": (b"q,a\nNA,null\n", {"q": "NA", "a": "null"}),
    "what looks like a number": (b"q,a\n1e3,007\n", {"q": "1e3", "a": "007"}),
    "a cell as long as a book": (b"q,a\n" + b"x" * 300_000 + b",y\n", {"q": "x" * 300_000, "a": "y"}),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_cell_is_the_text_that_stands_there(tmp_path, name):
    content, row = TABLES[name]
    (tmp_path / "a.csv").write_bytes(content)
    assert [row for _, row in rows_of(tmp_path / "a.csv")] == [row]


def test_parquet_columns_keep_their_kind(tmp_path):
    rows = [
        {"Puzzle": "0043", "n": 7, "turns": [{"role": "user", "content": "a"}]},
        {"Puzzle": None, "n": None, "turns": []},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert list(rows_of(tmp_path / "a.parquet")) == [(1, rows[0]), (2, rows[1])]


@pytest.mark.parametrize("name", ["train.jsonl.gz", "train.csv", "train.json.xz", "train.ndjson"])
def test_a_folder_may_hold_any_of_them(tmp_path, name):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_bytes(b"")
    assert split_file(tmp_path / "mine", "train").name == name
    test = name.replace("train", "test")
    (tmp_path / "mine" / test).write_bytes(MEANT["plain.jsonl"])
    with pytest.raises(DataError, match="is a test set"):
        find(SourceParams(name=f"mine/{test}"), "sft", [tmp_path])


def test_a_file_without_rows_says_so(tmp_path):
    for name, content in {"a.jsonl": b"\n\n", "b.json": b"[]", "c.csv": b"a,b\n", "d.txt": b"", "e.csv": b""}.items():
        (tmp_path / name).write_bytes(content)
        source = SourceParams(name=name)
        with pytest.raises(DataError, match=rf"{name}: no rows; expected at least one"):
            list(read(source, find(source, "sft", [tmp_path])))
