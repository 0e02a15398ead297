"""The data of one part, written once: mapped, split, encoded, packed, with its card."""

import functools
import gc
import inspect
import itertools
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from llada_core.data.encode import ENCODERS, Encoded, asking, content_hash, encode_ids, has_ids, text_in, text_of
from llada_core.data.params import PartParams, PretrainData, SourceParams
from llada_core.data.rows import PLAIN, Reading, Readings, RowFile, schema_of, table_of
from llada_core.data.shapes import Shaped, shaped
from llada_core.data.sources import DataError, Numbered, Origin, Row, RowError, Unusable, read
from llada_core.data.values import QUESTIONS, joined, values_in
from llada_core.settings import function_at
from llada_core.tokenizer import Tokenizer

Side = Literal["train", "validation"]
Mapped = Shaped | Unusable | None  # None: the map function leaves the row out


@dataclass(frozen=True)
class Chunk:
    """Some rows of one source, numbered; `source` None: generated rows, which stay on the side `side`."""

    rows: tuple[Numbered, ...]
    place: str
    source: SourceParams | None = None
    map: str | None = None
    side: Side = "train"


def mapped(
    chunk: Chunk, stage: str, params: PartParams, tokenizer: Tokenizer | None
) -> Iterator[tuple[int, Row, Mapped]]:
    """Each row of a source: its number, as published, and what its stage takes.

    tokenizer: for map functions that ask for one, as dllm's do. Raises `DataError` where one is asked for and is None.
    """
    function = _function(chunk, params, tokenizer)
    for number, raw in chunk.rows:
        if isinstance(raw, Unusable):
            yield number, {}, raw
            continue
        try:
            row = function(raw)
        except RowError as error:
            yield number, raw, unusable(error, number)
            continue
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            reason = f"the map function {chunk.map} raised {type(error).__name__}"
            told = f"row {number}: {reason}: {error}; the row has the fields {', '.join(sorted(map(str, raw)))}"
            yield number, raw, Unusable(reason, told)
            continue
        if row is None or has_ids(row):
            yield number, raw, None if row is None else Shaped(row)
            continue
        try:
            found = shaped(row, stage)
        except RowError as error:
            yield number, raw, unusable(error, number)
        else:
            # What a map function made is no matter of recognition.
            yield number, raw, found if chunk.map is None else Shaped(found.row)


def unusable(error: Exception, number: int) -> Unusable:
    """What stands for the row of this number that raised this."""
    if isinstance(error, RowError):
        return Unusable(error.reason, f"row {number}: {error}")
    if isinstance(error, UnicodeEncodeError):
        reason = "half of a character in a text"
        return Unusable(reason, f"row {number}: {reason} (a lone surrogate); write the whole one or take it away")
    if isinstance(error, KeyError):
        return Unusable(f"no field {error}", f"row {number}: the field {error} is missing")
    return Unusable(str(error).partition(":")[0][:80], f"row {number}: {error}")


def _function(chunk: Chunk, params: PartParams, tokenizer: Tokenizer | None) -> Callable[[Row], Row | None]:
    if chunk.map is None:
        if isinstance(params, PretrainData) and chunk.source is not None:
            return functools.partial(_text_alone, chunk.source.text_field)
        return _as_it_is
    function = function_at(chunk.map, "map function")
    parameters = inspect.signature(function).parameters
    if "tokenizer" in parameters:
        if tokenizer is None:
            needs = "asks for the tokenizer, so none can be trained on its rows; name one (data.tokenizer.name)"
            raise DataError(f"{chunk.place}: the map function {chunk.map} {needs}")
        return functools.partial(function, **asking(parameters, tokenizer, params))
    return function


def _as_it_is(row: Row) -> Row:
    return row


def _text_alone(name: str, row: Row) -> Row:
    return {"input_ids": row["input_ids"]} if has_ids(row) else {"text": text_of(row, name)}


SIDES: tuple[Side, ...] = ("train", "validation")
_CHUNK = 1000
_INLINE = 8  # chunks tokenised before a pool of processes is worth starting


@dataclass(frozen=True)
class Coded:
    """One side's rows of a chunk as an Arrow table, its drops, and the values (uint64) of the questions in it.

    `read` says how the rows of a source were read; None for generated ones.
    """

    side: Side
    table: pa.Table
    counts: Counter[str]
    questions: np.ndarray
    read: Reading | None


def chunks_of(source: SourceParams, origin: Origin) -> Iterator[Chunk]:
    """The rows of a source in chunks of fixed size."""
    rows = read(source, origin)
    while chunk := tuple(itertools.islice(rows, _CHUNK)):
        yield Chunk(chunk, origin.place, source, origin.map)


def generated(rows: Iterable[Row], name: str, side: Side) -> Iterator[Chunk]:
    """Rows that need no map function and whose side is known, in chunks of fixed size."""
    numbered = enumerate(rows, 1)
    while chunk := tuple(itertools.islice(numbered, _CHUNK)):
        yield Chunk(chunk, name, side=side)


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

    def each(self, function: Callable[[Chunk], list[Coded]], chunks: Iterator[Chunk]) -> Iterator[list[Coded]]:
        """The results in the order of the chunks, few of which are in memory at a time."""
        yield from map(function, itertools.islice(chunks, _INLINE if self._processes > 1 else None))
        waiting: deque[Future[list[Coded]]] = deque()
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
    cannot be used, by reason, with the first of each. `folder/questions.npy` has the values of the questions in training rows of sources, if there are any.
    Raises `DataError` when nothing is left to train on.
    """
    tokenizer = _tokenizer(str(tokenizer_folder))
    schema = schema_of(stage, params, tokenizer.vocab_size)
    function = functools.partial(encode, stage, params, str(tokenizer_folder))
    folder.mkdir(parents=True)
    dropped: Counter[str] = Counter()
    files = {side: RowFile(folder / side, params, schema) for side in SIDES}
    questions, readings = [joined([])], Readings()
    for coded in itertools.chain.from_iterable(workers.each(function, chunks)):
        files[coded.side].add(coded.table)
        dropped += coded.counts
        readings.add(coded.read)
        if coded.side == "train":
            questions.append(coded.questions)
    if len(asked := joined(questions)):
        np.save(folder / QUESTIONS, asked)
    card: dict[str, Any] = {"dropped": dict(sorted(dropped.items()))}
    for side, file in files.items():
        card[side] = file.close()
    if not card["train"]["rows"]:
        dropped += readings.reasons()
        why = f"dropped: {dict(sorted(dropped.items())) or 'none'}{readings.first()}"
        raise DataError(f"data.{stage}: no row is left to train on; {why}")
    return card | ({"read": readings.card()} if readings.card() else {})


def encode(stage: str, params: PartParams, tokenizer_folder: str, chunk: Chunk) -> list[Coded]:
    """The rows of one chunk, mapped, put on their sides, repeated by their weight, and tokenised.

    Nothing here refers to itself, so the cycle collector, which would walk over every list of ids, waits.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        return _encode(stage, params, tokenizer_folder, chunk)
    finally:
        if collecting:
            gc.enable()


def _encode(stage: str, params: PartParams, tokenizer_folder: str, chunk: Chunk) -> list[Coded]:
    sides: dict[Side, list[tuple[int, Row]]] = {"train": [], "validation": []}
    counts: Counter[str] = Counter()
    asked: list[int] = []
    tokenizer, reading = _tokenizer(tokenizer_folder), None
    if chunk.source is None:
        sides[chunk.side] += [(number, row) for number, row in chunk.rows if isinstance(row, dict)]
    else:
        reading = Reading(chunk.source.name, len(chunk.rows))
        for number, raw, row in _usable(chunk, stage, params, tokenizer, reading, counts):
            share = content_hash(row) / 2**64
            if share < params.validation:
                sides["validation"].append((number, row))
                continue
            spread = (share - params.validation) / (1 - params.validation)
            weight = chunk.source.weight
            copies = int(weight) + (spread < weight % 1)
            sides["train"] += [(number, row)] * copies
            if copies and stage != "pretrain":  # documents ask nothing
                asked += _questions(raw, row)
    results = []
    for side, rows in sides.items():
        encoded, refused = _encoded(stage, params, tokenizer, chunk.place, rows)
        if reading is not None:
            reading.unusable |= refused
        elif refused:
            raise DataError(f"{chunk.place}, {next(iter(refused.values())).told}")
        table = table_of(encoded.columns, schema_of(stage, params, tokenizer.vocab_size, packed=False))
        told = reading if side == SIDES[-1] else None  # once for both, when both are encoded
        results.append(Coded(side, table, counts + encoded.counts, np.array(asked, np.uint64), told))
        counts = Counter()
    return results


def _usable(
    chunk: Chunk, stage: str, params: PartParams, tokenizer: Tokenizer, reading: Reading, counts: Counter[str]
) -> Iterator[tuple[int, Row, Row]]:
    """The number of each usable row, the row as published, and as its stage takes it; the others are counted."""
    for number, raw, found in mapped(chunk, stage, params, tokenizer):
        if found is None:
            counts["map function"] += 1
        elif isinstance(found, Unusable):
            reading.unusable[number] = found
        else:
            try:
                content_hash(found.row)
            except UnicodeEncodeError as error:
                reading.unusable[number] = unusable(error, number)
            else:
                reading.shapes[found.shape or PLAIN] += 1
                yield number, raw, found.row


def texts_in(stage: str, params: PartParams, chunk: Chunk) -> Iterator[str]:
    """The text of each usable row of a chunk, with the names of its speakers, as a tokenizer is trained on it."""
    if chunk.source is None:
        yield from (text_in(row) for _, row in chunk.rows if isinstance(row, dict))
        return
    for number, _, found in mapped(chunk, stage, params, None):
        if not isinstance(found, Shaped):
            continue
        if has_ids(found.row):
            made = "ids were made with a tokenizer, so none can be trained on them; name it (data.tokenizer.name)"
            raise DataError(f"{chunk.place}, row {number}: {made}")
        yield text_in(found.row)


def _questions(raw: Row, row: Row) -> list[int]:
    """The values of a row's questions; none of a row that its encoder will refuse in a moment, with its number."""
    try:
        return list(values_in(raw, row))
    except (KeyError, TypeError, AttributeError, ValueError):
        return []


def _encoded(
    stage: str, params: PartParams, tokenizer: Tokenizer, place: str, rows: list[tuple[int, Row]]
) -> tuple[Encoded, dict[int, Unusable]]:
    """The columns of rows, and in place of those that the encoder refuses why it does."""
    if any(has_ids(row) for _, row in rows):
        return _given_ids(params, tokenizer, place, rows)
    encoder = ENCODERS[stage]
    try:
        return encoder([row for _, row in rows], tokenizer, params), {}
    except (ValueError, KeyError, TypeError):
        parts, refused = [encoder([], tokenizer, params)], {}
        for number, row in rows:  # again one by one, to leave out those that it is
            try:
                parts.append(encoder([row], tokenizer, params))
            except (ValueError, KeyError, TypeError) as error:
                refused[number] = unusable(error, number)
        if not refused:
            raise
    return _joined(parts), refused


def _given_ids(
    params: PartParams, tokenizer: Tokenizer, place: str, rows: list[tuple[int, Row]]
) -> tuple[Encoded, dict[int, Unusable]]:
    parts, refused = [], {}
    for number, row in rows:
        try:
            parts.append(encode_ids([row], tokenizer, params))
        except (RowError, KeyError, TypeError, OverflowError) as error:
            refused[number] = unusable(error, number)
        except (DataError, ValueError) as error:  # another tokenizer, another stage: all rows are like this one
            raise DataError(f"{place}, row {number}: {error}") from None
    return _joined(parts or [encode_ids([], tokenizer, params)]), refused


def _joined(parts: list[Encoded]) -> Encoded:
    columns = {name: [value for part in parts for value in part.columns[name]] for name in parts[0].columns}
    return Encoded(columns, sum((part.counts for part in parts), Counter()))


@functools.cache
def _tokenizer(folder: str) -> Tokenizer:
    return Tokenizer.load(folder)
