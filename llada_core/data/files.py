"""Rows out of files as people bring them: JSON lines and lists, CSV, Parquet, plain text; packed, marked, from any system.

A row that cannot be read is not lost in silence and stops nothing: it is an `Unusable` in its place. Knows no stage.
"""

import csv
import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import orjson

from llada_core import files
from llada_core.files import FileError

Row = dict[str, Any]
SUFFIXES = (".jsonl", ".json", ".txt", ".parquet", ".csv", ".ndjson", ".tsv")
_JSON = (".jsonl", ".json", ".ndjson")
_WRAPPERS = ("data", "rows", "examples", "items", "records", "instances", "train")  # {"data": [row, row]}


class DataError(ValueError):
    """A user's data is not what it should be; the text is one line that says where and what was expected."""


class RowError(DataError):
    """One row cannot be used; `reason`, which rows of its kind share, is how they are counted."""

    def __init__(self, reason: str, text: str = "") -> None:
        super().__init__(text or reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Unusable:
    """What stands in the place of a row that cannot be used: why, in words for its kind, and where, in a line."""

    reason: str
    told: str


Numbered = tuple[int, Row | Unusable]


def rows_of(path: Path, unit: Literal["file", "line"] = "file") -> Iterator[Numbered]:
    """The rows of a file with their numbers from 1 (of lines, where a row is one); raises `DataError` for the file.

    unit: what a document is in a file of plain text.
    """
    kind = files.suffix(path)
    try:
        if kind in _JSON:
            yield from _json(path)
        elif kind == ".parquet":
            yield from _parquet(path)
        elif kind in (".csv", ".tsv"):
            yield from _csv(path)
        else:
            yield from _text(path, unit)
    except FileError as error:
        raise DataError(str(error)) from None


def _json(path: Path) -> Iterator[Numbered]:
    """JSON lines, or one JSON list of objects, whichever it is, whatever its name says."""
    stream = enumerate(files.lines(path), 1)
    first = next(((number, line) for number, line in stream if line.strip()), None)
    if first is None:
        return
    if first[1].lstrip()[:1] == b"[" or first[1].strip() == b"{" or not _is_row(first[1], path):
        yield from _listed(files.whole(path), path)
    else:
        yield from _lined(chain([first], stream), path)


def _is_row(line: bytes, path: Path) -> bool:
    """Whether a first line is a row of JSON lines, rather than the start of something else that is one whole."""
    try:
        value = files.parsed(line, str(path))
    except FileError:
        return files.suffix(path) != ".json"  # a damaged line among others
    if not isinstance(value, dict):
        return files.suffix(path) != ".json"
    return _wrapped(value) is None


def _lined(lines: Iterable[tuple[int, bytes]], path: Path) -> Iterator[Numbered]:
    for number, line in lines:
        try:
            value = orjson.loads(line)
        except ValueError:
            if line.strip():
                yield number, _hard_line(line, path, number)
        else:
            yield number, _object(value, f"line {number}")


def _hard_line(line: bytes, path: Path, number: int) -> Row | Unusable:
    """What orjson does not read: NaN, which the standard library does, and what is damaged."""
    where = f"{path}, line {number}"
    try:
        value = files.parsed(line, where)
    except FileError as error:
        reason = "not UTF-8 text" if "is not UTF-8" in str(error) else "not valid JSON"
        return Unusable(reason, str(error).removeprefix(f"{path}, "))
    return _whole_characters(value, f"line {number}")


def _whole_characters(value: Any, where: str) -> Row | Unusable:
    """The value as a row, unless a text in it holds half of a character, which has no UTF-8 and no tokens."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(str(error.object)[error.start]):04x}"
        says = (
            f"{where}: a text holds {half}, half of a character (a lone surrogate); write the whole one or take it away"
        )
        return Unusable("half of a character in a text", says)
    return _object(value, where)


def _object(value: Any, where: str) -> Row | Unusable:
    if isinstance(value, dict):
        return value
    return Unusable("no JSON object", f"{where}: expected a JSON object, got {type(value).__name__}")


def _listed(text: str, path: Path) -> Iterator[Numbered]:
    """The objects of a JSON text: a list of them, alone or as the one thing an object holds; or one after another."""
    try:
        value = orjson.loads(text)
    except ValueError:
        value, whole = _in_other_words(text, path), False
    else:
        whole = True  # half of a character would not have been read
    if not isinstance(value, list | dict):
        raise DataError(f"{path}: expected a JSON list of objects, got {type(value).__name__}")
    inside = _wrapped(value) if isinstance(value, dict) else value
    for number, entry in enumerate([value] if inside is None else inside, 1):
        yield number, (_object if whole else _whole_characters)(entry, f"entry {number}")


def _in_other_words(text: str, path: Path) -> Any:
    """What orjson does not read: NaN, half characters, objects one after another; raises `FileError` for the rest."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        if not error.msg.startswith("Extra data") or text[error.pos] == ",":
            return files.value_of(text, str(path))
    decoder, at, values = json.JSONDecoder(), 0, []
    while at < len(text):
        try:
            value, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError:
            return files.value_of(text, str(path))
        values.append(value)
        while at < len(text) and text[at].isspace():
            at += 1
    return values


def _wrapped(value: Row) -> list[Any] | None:
    """The rows in an object that holds nothing else by that name; None in one that is a row itself."""
    found = [value[name] for name in _WRAPPERS if isinstance(value.get(name), list)]
    return found[0] if len(found) == 1 and all(isinstance(entry, dict) for entry in found[0]) else None


def _parquet(path: Path) -> Iterator[Numbered]:
    import pyarrow.lib
    import pyarrow.parquet

    try:
        number = 0
        with pyarrow.parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except pyarrow.lib.ArrowException as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: not a whole Parquet file ({reason[:200]}); write or fetch it anew") from None


def _csv(path: Path) -> Iterator[Numbered]:
    """Every cell as the text that stands there: as a number a sudoku would lose the zeros it begins with."""
    csv.field_size_limit(sys.maxsize)  # a cell may be a whole document; the library stops at 128 KiB
    raw = enumerate(files.lines(path), 1)
    text = (files.text_of(line, f"{path}, line {number}") for number, line in raw)
    head = next((line for line in text if line.strip()), "")
    separator = "\t" if files.suffix(path) == ".tsv" else None
    if told := re.fullmatch(r"sep=(.)\s*", head):  # what Excel writes for itself
        separator, head = told[1], next(text, "")
    if "\r" in head.rstrip("\r\n"):
        raise DataError(f"{path}: its lines end with \\r alone, as on old Macs; save it as CSV (UTF-8)")
    separator = separator or next((each for each in (",", ";", "\t") if each in head), ",")
    reader = csv.reader(chain([head], text), delimiter=separator, strict=True)
    try:
        names = [name.strip() for name in next(reader, [])]
    except csv.Error as error:
        raise DataError(f"{path}: no line with the names of columns ({error})") from None
    if twice := sorted({name for name in names if name and names.count(name) > 1}):
        raise DataError(f"{path}: two columns are named {twice[0]!r}; name them apart")
    number = 0
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            number += 1
            if "unexpected end of data" in str(error):
                raise DataError(f"{path}, row {number}: a quote is opened there and never closed") from None
            yield number, Unusable("not a row of a CSV table", f"row {number}: {error}")
            continue
        if cells:
            number += 1
            yield number, _cells(names, cells, number, separator)


def _cells(names: list[str], cells: list[str], number: int, separator: str) -> Row | Unusable:
    """One row by its columns' names; cells that a program left out at the end of a line are empty."""
    if any(cells[len(names) :]):
        says = f"row {number}: {len(cells)} cells under {len(names)} columns; quote a cell that holds a {separator!r}"
        return Unusable("more cells than columns", says)
    cells = cells[: len(names)] + [""] * (len(names) - len(cells))
    return {name: cell for name, cell in zip(names, cells, strict=True) if name or cell}


def _text(path: Path, unit: str) -> Iterator[Numbered]:
    """Documents of plain text; lines end as on any system, since a document has no line ends of one system."""
    if unit == "line":
        for number, line in enumerate(files.lines(path), 1):
            for text in files.text_of(line, f"{path}, line {number}").split("\r"):
                if text := text.strip():
                    yield number, {"text": text}
    elif text := files.whole(path).replace("\r\n", "\n").replace("\r", "\n"):
        yield 1, {"text": text}
