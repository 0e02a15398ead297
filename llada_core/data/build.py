"""The data of one training stage: rows of sources and puzzles, mapped, split, encoded in several processes, written once.

What is written depends on the content of the sources and the block alone, not on the number of processes. A row's split
is decided by its content, so equal rows never stand on both sides.
"""

import functools
import gc
import inspect
import itertools
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from llada_core.data.contamination import QUESTIONS, joined, values_in
from llada_core.data.encode import Columns, asking, encode_ids, has_ids, row_hash, text_in, text_of
from llada_core.data.formats import FORMATS, schema_of
from llada_core.data.params import PartParams, PretrainData, SourceParams
from llada_core.data.rows import PLAIN, RowFile, SourceStats, card_of, table_of
from llada_core.data.sources import DataError, Numbered, ResolvedSource, Row, RowError, UnusableRow, read
from llada_core.settings import function_at
from llada_core.tokenizer import Tokenizer

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")
_CHUNK = 1000  # rows
EXAMPLES, SHORT = 6, 300  # questions kept as examples, and their characters at most
_INLINE = 8  # chunks encoded before a pool of processes is worth starting


@dataclass(frozen=True)
class Chunk:
    """Some rows of one source, numbered; `source` None: generated rows, which need no map and whose split is known."""

    rows: tuple[Numbered, ...]
    place: str
    source: SourceParams | None = None
    map: str | None = None
    split: Split = "train"


@dataclass(frozen=True)
class EncodedChunk:
    """The rows of a chunk as tables of their stage's columns, and what is to be told of them.

    source: whose rows they are. questions: the values (uint64) of what its training rows ask. examples: some of these
    questions as they stand, for whoever wants to ask the model that is trained on them.
    """

    source: str
    tables: dict[Split, pa.Table]
    questions: np.ndarray
    stats: SourceStats
    examples: tuple[str, ...] = ()


def chunks_of(source: SourceParams, found: ResolvedSource) -> Iterator[Chunk]:
    """The rows of a source in chunks of fixed size."""
    rows = read(source, found)
    while chunk := tuple(itertools.islice(rows, _CHUNK)):
        yield Chunk(chunk, found.place, source, found.map)


def generated(rows: Iterable[Row], name: str, split: Split) -> Iterator[Chunk]:
    """Rows that need no map function and whose split is known, in chunks of fixed size."""
    numbered = enumerate(rows, 1)
    while chunk := tuple(itertools.islice(numbered, _CHUNK)):
        yield Chunk(chunk, name, split=split)


class Workers:
    """Runs a function over many chunks in order, in several processes once there are enough of them."""

    def __init__(self, processes: int) -> None:
        self._processes = processes or len(os.sched_getaffinity(0))
        self._pool: Executor | None = None

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def each(self, function: Callable[[Chunk], EncodedChunk], chunks: Iterator[Chunk]) -> Iterator[EncodedChunk]:
        """The results in the order of the chunks, few of which are in memory at a time."""
        yield from map(function, itertools.islice(chunks, _INLINE if self._processes > 1 else None))
        waiting: deque[Future[EncodedChunk]] = deque()
        for chunk in chunks:
            waiting.append(self._started().submit(function, chunk))
            if len(waiting) > 2 * self._processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _started(self) -> Executor:
        if self._pool is None:
            # Not fork: the tokenizer's and torch's threads do not survive it.
            context = get_context("forkserver")
            context.set_forkserver_preload(["llada_core.data.build"])
            self._pool = ProcessPoolExecutor(self._processes, mp_context=context, initializer=_one_thread)
        return self._pool


def _one_thread() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def build(
    stage: str, params: PartParams, tokenizer_folder: Path, chunks: Iterator[Chunk], workers: Workers, folder: Path
) -> dict[str, Any]:
    """Writes `folder/{train,validation}` (`datasets.load_from_disk`) and returns the card of what was written.

    `read` of the card says of each source that was not all plain and usable rows what they were read as, and how many
    cannot be used, by reason, with the first of each. `folder/questions.npy` has the values of the questions in training
    rows of sources, if there are any. Raises `DataError` when nothing is left to train on.
    """
    schema = schema_of(stage, params, _tokenizer(str(tokenizer_folder)).vocab_size)
    folder.mkdir(parents=True)
    files = {split: RowFile(folder / split, params, schema) for split in SPLITS}
    questions, stats, examples = [joined([])], dict[str, SourceStats](), list[str]()
    for encoded in workers.each(functools.partial(encode, stage, params, str(tokenizer_folder)), chunks):
        for split, table in encoded.tables.items():
            files[split].add(table)
        questions.append(encoded.questions)
        examples += encoded.examples[: EXAMPLES - len(examples)]
        stats.setdefault(encoded.source, SourceStats()).add(encoded.stats)
    if len(asked := joined(questions)):
        np.save(folder / QUESTIONS, asked)
    dropped = sum((source.dropped for source in stats.values()), Counter[str]())
    card: dict[str, Any] = {"dropped": dict(sorted(dropped.items()))}
    for split, file in files.items():
        card[split] = file.close()
    if not card["train"]["rows"]:
        dropped += sum((source.reasons for source in stats.values()), Counter[str]())
        first = [f"; {name}, {told}" for name, source in stats.items() for _, told in source.first.values()]
        why = f"dropped: {dict(sorted(dropped.items())) or 'none'}{''.join(first[:3])}"
        raise DataError(f"data.{stage}: no row is left to train on; {why}")
    told = card_of(stats)
    return card | ({"read": told} if told else {}) | ({"examples": examples} if examples else {})


@contextmanager
def _no_collection() -> Iterator[None]:
    """Nothing in here refers to itself, so the cycle collector, which would walk over every list of ids, waits."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@_no_collection()
def encode(stage: str, params: PartParams, tokenizer_folder: str, chunk: Chunk) -> EncodedChunk:
    """The rows of one chunk, mapped, put on their splits, repeated by their weight, and tokenised.

    Raises `DataError` for a generated row that cannot be used.
    """
    rows: dict[Split, list[tuple[int, Row]]] = {split: [] for split in SPLITS}
    asked: list[int] = []
    examples: list[str] = []
    tokenizer, stats = _tokenizer(tokenizer_folder), SourceStats()
    if chunk.source is None:
        rows[chunk.split] += [(number, row) for number, row in chunk.rows if isinstance(row, dict)]
    else:
        stats.rows = len(chunk.rows)
        for number, raw, row in mapped(chunk, stage, params, tokenizer, stats):
            split, copies = _split_of(row, params.validation, chunk.source.weight)
            rows[split] += [(number, row)] * copies
            if split == "train" and copies and FORMATS[stage].asks:
                asked += _questions(raw, row)
                examples += _first_question(row) if len(examples) < EXAMPLES else ()
    schema = schema_of(stage, params, tokenizer.vocab_size, packed=False)
    tables = {
        split: table_of(_columns(stage, params, tokenizer, chunk.place, some, stats), schema)
        for split, some in rows.items()
    }
    if chunk.source is None and stats.first:
        raise DataError(f"{chunk.place}, {next(iter(stats.first.values()))[1]}")
    name = chunk.place if chunk.source is None else chunk.source.name
    return EncodedChunk(name, tables, np.array(asked, np.uint64), stats, tuple(dict.fromkeys(examples)))


def mapped(
    chunk: Chunk, stage: str, params: PartParams, tokenizer: Tokenizer | None, stats: SourceStats
) -> Iterator[tuple[int, Row, Row]]:
    """The number of each usable row of a source, the row as published, and as its stage takes it; `stats` counts all.

    tokenizer: for map functions that ask for one, as dllm's do. Raises `DataError` where one is asked for and is None.
    """
    function = _map_function(chunk, params, tokenizer)
    for number, raw in chunk.rows:
        if isinstance(raw, UnusableRow):
            stats.refuse(number, raw)
            continue
        try:
            row = raw if function is None else function(raw)
        except RowError as error:
            stats.refuse(number, unusable(error, number))
            continue
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            reason = f"the map function {chunk.map} raised {type(error).__name__}"
            told = f"row {number}: {reason}: {error}; the row has the fields {', '.join(sorted(map(str, raw)))}"
            stats.refuse(number, UnusableRow(reason, told))
            continue
        if row is None:
            stats.dropped["map function"] += 1
            continue
        try:
            row, shape = (row, None) if has_ids(row) else FORMATS[stage].shaped(row)
            row_hash(row)  # half of a character has neither a hash nor tokens
        except (RowError, UnicodeEncodeError) as error:
            stats.refuse(number, unusable(error, number))
        else:
            # What a map function made is no matter of recognition.
            stats.shapes[shape if shape and chunk.map is None else PLAIN] += 1
            yield number, raw, row


def unusable(error: Exception, number: int) -> UnusableRow:
    """What stands for the row of this number that raised this."""
    if isinstance(error, RowError):
        return UnusableRow(error.reason, f"row {number}: {error}")
    if isinstance(error, UnicodeEncodeError):
        reason = "half of a character in a text"
        return UnusableRow(reason, f"row {number}: {reason} (a lone surrogate); write the whole one or take it away")
    if isinstance(error, KeyError):
        return UnusableRow(f"no field {error}", f"row {number}: the field {error} is missing")
    return UnusableRow(str(error).partition(":")[0][:80], f"row {number}: {error}")


def _map_function(chunk: Chunk, params: PartParams, tokenizer: Tokenizer | None) -> Callable[[Row], Row | None] | None:
    """What is done to each row before its shape is looked at; None: nothing."""
    if chunk.map is None:
        if isinstance(params, PretrainData) and chunk.source is not None:
            return functools.partial(_text_alone, chunk.source.text_field)
        return None
    function = function_at(chunk.map, "map function")
    parameters = inspect.signature(function).parameters
    if "tokenizer" in parameters:
        if tokenizer is None:
            needs = "asks for the tokenizer, so none can be trained on its rows; name one (data.tokenizer.name)"
            raise DataError(f"{chunk.place}: the map function {chunk.map} {needs}")
        return functools.partial(function, **asking(parameters, tokenizer, params))
    return function


def _text_alone(name: str, row: Row) -> Row:
    return {"input_ids": row["input_ids"]} if has_ids(row) else {"text": text_of(row, name)}


def _split_of(row: Row, validation: float, weight: float) -> tuple[Split, int]:
    """The split of a row, which its content decides, and how often it stands there."""
    share = row_hash(row) / 2**64
    if share < validation:
        return "validation", 1
    spread = (share - validation) / (1 - validation)
    return "train", int(weight) + (spread < weight % 1)


def texts_in(stage: str, params: PartParams, chunk: Chunk) -> Iterator[str]:
    """The text of each usable row of a chunk, with the names of its speakers, as a tokenizer is trained on it."""
    if chunk.source is None:
        yield from (text_in(row) for _, row in chunk.rows if isinstance(row, dict))
        return
    for number, _, row in mapped(chunk, stage, params, None, SourceStats()):
        if has_ids(row):
            made = "ids were made with a tokenizer, so none can be trained on them; name it (data.tokenizer.name)"
            raise DataError(f"{chunk.place}, row {number}: {made}")
        yield text_in(row)


def _first_question(row: Row) -> list[str]:
    """What a dialogue opens with, where it is short enough to be shown."""
    said = [message["content"] for message in row.get("messages", ()) if message["role"] == "user"]
    return [text for text in said[:1] if 0 < len(text.strip()) <= SHORT]


def _questions(raw: Row, row: Row) -> list[int]:
    """The values of a row's questions; none of a row that its encoder will refuse in a moment, with its number."""
    try:
        return list(values_in(raw, row))
    except (KeyError, TypeError, AttributeError, ValueError):
        return []


def _columns(
    stage: str, params: PartParams, tokenizer: Tokenizer, place: str, rows: list[tuple[int, Row]], stats: SourceStats
) -> Columns:
    """The columns of rows; those that the encoder refuses, drops or cuts are counted."""
    if any(has_ids(row) for _, row in rows):
        return _given_ids(params, tokenizer, place, rows, stats)
    encoder, dropped = FORMATS[stage].encoder, Counter[str]()
    try:
        columns = encoder([row for _, row in rows], tokenizer, params, dropped)
    except (ValueError, KeyError, TypeError):
        parts, refused, dropped = [encoder([], tokenizer, params, Counter())], False, Counter()
        for number, row in rows:  # again one by one, to leave out those that it is
            try:
                parts.append(encoder([row], tokenizer, params, dropped))
            except (ValueError, KeyError, TypeError) as error:
                stats.refuse(number, unusable(error, number))
                refused = True
        if not refused:
            raise
        columns = _joined(parts)
    stats.dropped += dropped
    return columns


def _given_ids(
    params: PartParams, tokenizer: Tokenizer, place: str, rows: list[tuple[int, Row]], stats: SourceStats
) -> Columns:
    parts = []
    for number, row in rows:
        try:
            parts.append(encode_ids([row], tokenizer, params, stats.dropped))
        except (RowError, KeyError, TypeError, OverflowError) as error:
            stats.refuse(number, unusable(error, number))
        except (DataError, ValueError) as error:  # another tokenizer, another stage: all rows are like this one
            raise DataError(f"{place}, row {number}: {error}") from None
    return _joined(parts or [encode_ids([], tokenizer, params, stats.dropped)])


def _joined(parts: list[Columns]) -> Columns:
    return {name: [value for part in parts for value in part[name]] for name in parts[0]}


@functools.cache
def _tokenizer(folder: str) -> Tokenizer:
    return Tokenizer.load(folder)
