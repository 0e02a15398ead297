"""Where rows are (files, folders, the Hub, short names of published sets), and the rows of a file as people bring it.

Every row has its number, so that an error can say which. One that cannot be read is not lost in silence and stops
nothing: an `UnusableRow` stands in its place.
"""

import csv
import hashlib
import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import orjson

from llada_core import files
from llada_core.data.params import SourceParams
from llada_core.files import FileError
from llada_core.settings import nearest

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
class UnusableRow:
    """What stands in the place of a row that cannot be used: why, in words for its kind, and where, in a line."""

    reason: str
    told: str


Numbered = tuple[int, Row | UnusableRow]


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


def _hard_line(line: bytes, path: Path, number: int) -> Row | UnusableRow:
    """What orjson does not read: NaN, which the standard library does, and what is damaged."""
    where = f"{path}, line {number}"
    try:
        value = files.parsed(line, where)
    except FileError as error:
        reason = "not UTF-8 text" if "is not UTF-8" in str(error) else "not valid JSON"
        return UnusableRow(reason, str(error).removeprefix(f"{path}, "))
    return _whole_characters(value, f"line {number}")


def _whole_characters(value: Any, where: str) -> Row | UnusableRow:
    """The value as a row, unless a text in it holds half of a character, which has no UTF-8 and no tokens."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(str(error.object)[error.start]):04x}"
        says = (
            f"{where}: a text holds {half}, half of a character (a lone surrogate); write the whole one or take it away"
        )
        return UnusableRow("half of a character in a text", says)
    return _object(value, where)


def _object(value: Any, where: str) -> Row | UnusableRow:
    if isinstance(value, dict):
        return value
    return UnusableRow("no JSON object", f"{where}: expected a JSON object, got {type(value).__name__}")


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
            yield number, UnusableRow("not a row of a CSV table", f"row {number}: {error}")
            continue
        if cells:
            number += 1
            yield number, _cells(names, cells, number, separator)


def _cells(names: list[str], cells: list[str], number: int, separator: str) -> Row | UnusableRow:
    """One row by its columns' names; cells that a program left out at the end of a line are empty."""
    if any(cells[len(names) :]):
        says = f"row {number}: {len(cells)} cells under {len(names)} columns; quote a cell that holds a {separator!r}"
        return UnusableRow("more cells than columns", says)
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


@dataclass(frozen=True)
class PublishedDataset:
    """A data set with a short name: where the Hub has it, and the function in maps.py that each stage uses."""

    hub: str | None = None
    config: str | None = None
    split: str = "train"
    maps: dict[str, str] = field(default_factory=dict)


DATASETS: dict[str, PublishedDataset] = {
    "alpaca": PublishedDataset("tatsu-lab/alpaca", maps={"sft": "alpaca"}),
    "dolly": PublishedDataset("databricks/databricks-dolly-15k", maps={"sft": "dolly"}),
    "tulu-3-sft-mixture": PublishedDataset("allenai/tulu-3-sft-mixture"),
    "ultrachat": PublishedDataset("HuggingFaceH4/ultrachat_200k", split="train_sft"),
    "smoltalk": PublishedDataset("HuggingFaceTB/smoltalk", config="all"),
    "opc-sft-stage1": PublishedDataset(
        "OpenCoder-LLM/opc-sft-stage1", "filtered_infinity_instruct", maps={"sft": "alpaca"}
    ),
    "opc-sft-stage2": PublishedDataset("OpenCoder-LLM/opc-sft-stage2", "educational_instruct", maps={"sft": "alpaca"}),
    "opc-annealing-corpus": PublishedDataset("OpenCoder-LLM/opc-annealing-corpus", "algorithmic_corpus"),
    "dclm": PublishedDataset("mlfoundations/dclm-baseline-1.0"),
    "gutenberg": PublishedDataset(),
    "gsm8k": PublishedDataset("openai/gsm8k", "main", maps={"sft": "gsm8k_dialogue", "grpo": "gsm8k"}),
    "math500": PublishedDataset("ankner/math-500", maps={"grpo": "math"}),  # its training split: MATH without MATH-500
    "countdown": PublishedDataset("Jiayi-Pan/Countdown-Tasks-3to4", maps={"grpo": "countdown"}),
    "sudoku4x4": PublishedDataset(maps={"grpo": "sudoku"}),
    "kodcode": PublishedDataset("KodCode/KodCode-Light-RL-10K", maps={"grpo": "code"}),
    "ultrafeedback": PublishedDataset(
        "HuggingFaceH4/ultrafeedback_binarized", split="train_prefs", maps={"preference": "preference"}
    ),
}
# What is measured under another name than test: the last part of a data set's name, and that split.
_MEASURED = {
    **dict.fromkeys(("hellaswag", "piqa", "winogrande", "truthful_qa", "truthfulqa"), "validation"),
    **dict.fromkeys(("gpqa", "ifeval", "instruction-following-eval"), "train"),
    "ceval-exam": "val",
}
_TEST = re.compile(r"(?<![a-z])tests?(?![a-z])")
_PACKED = ("", *files.PACKED)


@dataclass(frozen=True)
class ResolvedSource:
    """A source that was found: a file, a folder written by `datasets`, or a name on the Hub; and its map function."""

    place: str
    kind: str  # file, saved, hub
    split: str
    config: str | None
    map: str | None
    revision: str | None  # Hub

    @cached_property
    def digest(self) -> str:
        """Of the content for files, which are read for it; of name, configuration, split and revision on the Hub."""
        if self.kind == "hub":
            asked = json.dumps([self.place, self.config, self.split, self.revision])
            return hashlib.sha256(asked.encode()).hexdigest()
        place = Path(self.place)
        return _digest_folder(place) if self.kind == "saved" else files.file_hash(place)

    @property
    def is_test_set(self) -> bool:
        """Whether its split, or its file's name, says that it is there to be measured on."""
        folder, _, name = self.place.rpartition("/")
        split = files.stem(name).lower() if self.kind == "file" else self.split.lower()
        measured = _MEASURED.get((folder.rpartition("/")[2] if self.kind == "file" else name).lower())
        return _TEST.search(split) is not None or split.partition("[")[0] == measured


def find(source: SourceParams, stage: str, roots: list[Path]) -> ResolvedSource:
    """Where a source's rows are; a short name is looked up below the roots before it is asked of the Hub.

    Raises FileNotFoundError that says where it was looked for, and `DataError` for a test set that a stage would train
    on without `train_on_test`.
    """
    origin = _found(source, stage, roots)
    if stage != "evaluate" and origin.is_test_set and not source.train_on_test:
        what = origin.place if origin.kind == "file" else f"split {origin.split!r} of {origin.place}"
        raise DataError(
            f"data source {source.name!r} of {stage}: {what} is a test set; what was trained on it is measured nowhere."
            " Name another split, or insist with train_on_test: true"
        )
    return origin


def _found(source: SourceParams, stage: str, roots: list[Path]) -> ResolvedSource:
    given = _whole(source.map)
    known = DATASETS.get(source.name) or next(
        (k for k in DATASETS.values() if k.hub == source.name), PublishedDataset()
    )
    own_map = f"llada_core.data.maps.{known.maps[stage]}" if stage in known.maps else None
    split, config = source.split or known.split, source.config or known.config
    for root in roots:
        place = root / Path(source.name).expanduser()
        if place.is_dir() and any((place / name).is_file() for name in ("state.json", "dataset_dict.json")):
            return ResolvedSource(str(place), "saved", split, config, given or own_map, source.revision)
        path = place if place.is_file() else split_file(place, source.split or "train")
        if path is not None:
            return ResolvedSource(str(path), "file", split, config, given or own_map, source.revision)
    hub = known.hub if source.name in DATASETS else source.name if _looks_like_hub(source.name) else None
    if hub is None:
        looked = ", ".join(f"{root}{'' if root.is_dir() else ' (which is not there)'}" for root in roots)
        raise FileNotFoundError(
            f"data source {source.name!r}: no file, and no folder with {split}{'|'.join(SUFFIXES)}, below {looked}"
            f"{'' if source.name in DATASETS else nearest(source.name, list(DATASETS))}"
        )
    return ResolvedSource(hub, "hub", split, config, given or own_map, source.revision)


def _whole(path: str | None) -> str | None:
    """A map function with its file's whole path, where it is of a file: the processes that map lie elsewhere."""
    file, colon, name = (path or "").rpartition(":")
    return f"{Path(file).expanduser().resolve()}:{name}" if colon else path


def read(source: SourceParams, origin: ResolvedSource) -> Iterator[Numbered]:
    """The rows of a source with their numbers (of lines, from 1), those that cannot be read as `UnusableRow`.

    Raises `DataError` for a file that cannot be read as a whole, or holds nothing.
    """
    rows = rows_of(Path(origin.place), source.unit) if origin.kind == "file" else _read_datasets(source, origin)
    if source.contains:
        wanted = source.contains.items()
        rows = (
            (n, row)
            for n, row in rows
            if isinstance(row, UnusableRow) or all(text in str(row.get(name, "")) for name, text in wanted)
        )
    rows = islice(rows, source.limit)
    first = next(rows, None)
    if first is None:
        raise DataError(f"{origin.place}: no rows; expected at least one")
    yield first
    yield from rows


def shared_with_test(source: SourceParams, origin: ResolvedSource) -> int | None:
    """How many rows of a training file occur in the test file beside it as well; None when there is none beside it."""
    beside = split_file(Path(origin.place).parent, "test") if origin.kind == "file" else None
    if beside is None or str(beside) == origin.place:
        return None
    tested = {_value(row) for _, row in rows_of(beside, source.unit) if isinstance(row, dict)}
    return sum(_value(row) in tested for _, row in read(source, origin) if isinstance(row, dict))


def _value(row: Row) -> str:
    return json.dumps(row, sort_keys=True, default=str)


def _read_datasets(source: SourceParams, origin: ResolvedSource) -> Iterator[Numbered]:
    import datasets

    if origin.kind == "saved":
        table = datasets.load_from_disk(origin.place)
        if isinstance(table, datasets.DatasetDict):
            if origin.split not in table:
                raise DataError(f"{origin.place}: no split {origin.split!r}; it has {', '.join(table)}")
            table = table[origin.split]
    else:
        try:
            table = datasets.load_dataset(
                origin.place, origin.config, split=origin.split, revision=source.revision, streaming=source.streaming
            )
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            reason = str(error).splitlines()[0]
            raise DataError(f"data set {origin.place!r} cannot be had from the Hub: {reason}") from None
    yield from enumerate(table, 1)


def split_file(folder: Path, split: str) -> Path | None:
    """The file of a split in a folder, whichever of the known formats it has; None where there is none."""
    names = (f"{split}{suffix}{packed}" for packed in _PACKED for suffix in SUFFIXES)
    return next((path for name in names if (path := folder / name).is_file()), None)


def _looks_like_hub(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and files.suffix(name) not in SUFFIXES


def _digest_folder(folder: Path) -> str:
    digests = [
        f"{path.relative_to(folder)} {files.file_hash(path)}" for path in sorted(folder.rglob("*")) if path.is_file()
    ]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()
