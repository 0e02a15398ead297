"""Rows of one part on their way to disk: how those of each source were read, and the files that they are written into.

The folders are those that `datasets.load_from_disk` reads.
"""

import json
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llada_core.data.params import PartParams, PretrainData
from llada_core.data.sources import DataError, UnusableRow
from llada_core.files import file_hash

PLAIN = ""  # the shape of a row that is as its stage needs it
ALWAYS_BEARABLE = 10  # rows of a source: in a small one they would be a large share


@dataclass
class SourceStats:
    """How the rows of one source were read: as which shapes, and how many cannot be used, or were dropped or cut, and why."""

    rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    shapes: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    first: dict[str, tuple[int, str]] = field(default_factory=dict)  # reason -> number and place of the first such row
    _refused: set[int] = field(default_factory=set)

    def refuse(self, number: int, row: UnusableRow) -> None:
        """Counts the row of this number, once, however often its weight repeats it."""
        if number in self._refused:
            return
        self._refused.add(number)
        self.reasons[row.reason] += 1
        if row.reason not in self.first or number < self.first[row.reason][0]:
            self.first[row.reason] = number, row.told

    def add(self, later: "SourceStats") -> None:
        """Counts rows of the same source that stand behind those that were counted."""
        self.rows += later.rows
        self.dropped += later.dropped
        self.shapes += later.shapes
        self.reasons += later.reasons
        for reason, place in sorted(later.first.items(), key=lambda found: found[1]):
            self.first.setdefault(reason, place)


def card_of(stats: Mapping[str, SourceStats]) -> dict[str, Any]:
    """Source -> rows, `as` (rows by shape), `unusable` (by reason); without sources whose rows are all plain."""
    found = {}
    for name, source in stats.items():
        shapes = {shape: count for shape, count in sorted(source.shapes.items()) if shape != PLAIN}
        reasons = {
            reason: {"rows": count, "first": source.first[reason][1]}
            for reason, count in sorted(source.reasons.items())
        }
        if shapes or reasons:
            found[name] = {"rows": source.rows, "as": shapes, "unusable": reasons}
    return found


def lines_of(card: Mapping[str, Any]) -> Iterator[str]:
    """What a card's `read` says, in a line for each source and matter."""
    for name, read in card.items():
        if read["as"]:
            shapes = "; ".join(f"{shape}: {count:,}" for shape, count in read["as"].items())
            yield f"{name}: {read['rows']:,} rows, recognised as {shapes}"
        if read["unusable"]:
            yield f"{name}: {_unusable(read)}, left out: {_told(read['unusable'])}"


def require_usable(stage: str, card: Mapping[str, Any], share: float, *, strict: bool) -> None:
    """Raises `DataError` where a source has more unusable rows than `share` of all (and than ten), or, strict, any."""
    for name, read in card.items():
        count, rows = sum(each["rows"] for each in read["unusable"].values()), read["rows"]
        if not count or (not strict and count < rows and count <= max(ALWAYS_BEARABLE, share * rows)):
            continue
        if strict:
            way = "strict: true refuses any; to go on without them, give the same command -S data.strict=false"
        elif count == rows:
            way = "none is left of this source; mend it, or take it out of the sources"
        else:
            needed = min(1.0, -(-count * 1000 // rows) / 1000)
            allowed = f"max_unusable allows {share:g} of a source"
            way = f"{allowed}; to go on without them, give the same command -S data.max_unusable={needed:g}"
        raise DataError(f"data.{stage}: {name}: {_unusable(read)} ({_told(read['unusable'])}); {way}")


def _unusable(read: Mapping[str, Any]) -> str:
    count = sum(each["rows"] for each in read["unusable"].values())
    return f"{count:,} of {read['rows']:,} rows cannot be used"


def _told(reasons: Mapping[str, Any]) -> str:
    most = sorted(reasons.items(), key=lambda item: -item[1]["rows"])
    named = [f"{each['rows']:,} {reason}, first {each['first']}" for reason, each in most[:5]]
    return "; ".join(named) + (f"; and {len(most) - 5} other reasons" if len(most) > 5 else "")


def table_of(columns: Mapping[str, Sequence[Any]], schema: pa.Schema) -> pa.Table:
    """Columns as an Arrow table; lists of ids are joined by numpy, since Arrow would look at each number's type."""
    arrays = [
        _lists(columns[field.name], field.type.value_type) if pa.types.is_list(field.type) else columns[field.name]
        for field in schema
    ]
    return pa.table(dict(zip(schema.names, arrays, strict=True)), schema)


def _lists(rows: Sequence[Sequence[int]], kind: pa.DataType) -> pa.ListArray:
    offsets = np.zeros(len(rows) + 1, np.int32)
    np.cumsum(np.fromiter(map(len, rows), np.int64, len(rows)), out=offsets[1:])
    if rows and isinstance(rows[0], np.ndarray):
        flat = np.concatenate(rows).astype(kind.to_pandas_dtype())
    elif rows and isinstance(rows[0], bytes | array):
        whole = np.frombuffer(b"".join(rows), np.uint8 if isinstance(rows[0], bytes) else np.uintc)  # type: ignore[arg-type]
        flat = whole.astype(kind.to_pandas_dtype(), copy=False)
    else:
        flat = np.fromiter(chain.from_iterable(rows), kind.to_pandas_dtype(), int(offsets[-1]))
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat))


class Packer:
    """Joins documents into rows of `length` tokens; what is left over starts the next row, however it was cut up.

    `document_ids`, if asked for, number the documents of a row from 0.
    """

    def __init__(self, params: PretrainData) -> None:
        self.params = params
        self._ids = np.zeros(0, np.uint8)
        self._documents = np.zeros(0, np.int64)
        self._seen = 0

    def add(self, ids: np.ndarray, lengths: np.ndarray) -> dict[str, list[np.ndarray]]:
        """The rows completed by documents of these lengths whose ids stand one after another in `ids`."""
        self._ids = np.concatenate([self._ids, ids])
        if self.params.documents:
            numbers = np.repeat(np.arange(self._seen, self._seen + len(lengths)), lengths)
            self._documents = np.concatenate([self._documents, numbers])
        self._seen += len(lengths)
        return self._take(len(self._ids) // self.params.length * self.params.length)

    def rest(self) -> dict[str, list[np.ndarray]]:
        """The last row, shorter than the others; none if it is to be dropped."""
        return self._take(0 if self.params.drop_tail else len(self._ids))

    def _take(self, tokens: int) -> dict[str, list[np.ndarray]]:
        width = self.params.length
        ids, self._ids = self._ids[:tokens], self._ids[tokens:]
        documents, self._documents = self._documents[:tokens], self._documents[tokens:]
        starts = range(0, tokens, width)
        columns: dict[str, list[np.ndarray]] = {"input_ids": [ids[i : i + width] for i in starts]}
        if self.params.documents:
            columns["document_ids"] = [documents[i : i + width] - documents[i] for i in starts]
        return columns


class RowFile:
    """The rows of one split on their way to a folder that `datasets.load_from_disk` reads."""

    def __init__(self, folder: Path, params: PartParams, schema: pa.Schema) -> None:
        self._folder, self._schema = folder, schema
        self._packer = Packer(params) if isinstance(params, PretrainData) else None
        self._path = folder.with_suffix(".arrow")
        self._sink = pa.OSFile(str(self._path), "wb")
        self._writer = pa.ipc.new_stream(self._sink, schema)
        self._rows = self._tokens = self._maskable = self._longest = 0
        self._lengths: Counter[int] = Counter()

    def add(self, table: pa.Table) -> None:
        """Writes rows; documents are packed first."""
        if self._packer is not None:
            ids = table["input_ids"].combine_chunks()
            lengths = np.diff(ids.offsets.to_numpy()) if len(ids) else np.zeros(0, np.int64)
            table = table_of(self._packer.add(ids.flatten().to_numpy(), lengths), self._schema)
        self._write(table)

    def _write(self, table: pa.Table) -> None:
        first = table.column(0)
        lengths = np.asarray(pc.list_value_length(first))
        self._rows += len(lengths)
        self._tokens += int(lengths.sum())
        self._longest = max(self._longest, int(lengths.max(initial=0)))
        self._lengths.update((1 << np.ceil(np.log2(np.maximum(lengths, 1))).astype(int)).tolist())
        if "maskable" in table.column_names:
            self._maskable += pc.sum(pc.list_flatten(table["maskable"])).as_py() or 0
        if table.num_rows:
            self._writer.write_table(table)

    def close(self) -> dict[str, Any]:
        """Moves the rows into place; returns their counts, lengths (rows up to each power of two) and hash."""
        if self._packer is not None:
            self._write(table_of(self._packer.rest(), self._schema))
        self._writer.close()
        self._sink.close()
        digest = file_hash(self._path)
        self._folder.mkdir()
        whole = self._path.rename(self._folder / "data-00000-of-00001.arrow")
        features = datasets.Features.from_arrow_schema(self._schema)
        datasets.DatasetInfo(features=features).write_to_directory(str(self._folder))
        # The library would write every row once more, and invent a fingerprint, so that nothing downstream is cached.
        state: dict[str, Any] = {"_data_files": [{"filename": whole.name}], "_fingerprint": digest[:16], "_split": None}
        state |= {"_format_columns": None, "_format_kwargs": {}, "_format_type": None, "_output_all_columns": False}
        (self._folder / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")
        card: dict[str, Any] = {"rows": self._rows, "tokens": self._tokens, "longest": self._longest, "hash": digest}
        card["lengths"] = {str(bound): count for bound, count in sorted(self._lengths.items())}
        return {**card, "maskable": self._maskable} if "maskable" in self._schema.names else card
