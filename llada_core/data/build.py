"""Builds the data of one training stage: rows from sources and puzzles, tokenised in several processes, written once.

What is written depends on the sources' content and the block alone, not on the number of processes. A row's side
(train or validation) is decided by its content, so equal rows never stand on both.
"""

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

from llada_core.config.data import PartParams, PretrainData, SourceParams
from llada_core.config.dotted import function_at
from llada_core.data.overlap import QUESTIONS, joined, values_in
from llada_core.data.preprocessed import asking, has_ids
from llada_core.data.preprocessed import encode as encode_ids
from llada_core.data.rows import RowFile, schema_of, table_of
from llada_core.data.sources import DataError, Origin, Row, read
from llada_core.data.tokenise import ENCODERS, Encoded, content_hash, text_in, text_of
from llada_core.tokenizer import Tokenizer

Side = Literal["train", "validation"]
SIDES: tuple[Side, ...] = ("train", "validation")
_CHUNK = 1000
_INLINE = 8  # chunks tokenised before a pool of processes is worth starting


@dataclass(frozen=True)
class Chunk:
    """Some rows of one source, numbered; `source` None: generated rows, which stay on the side `side`."""

    rows: tuple[tuple[int, Row], ...]
    place: str
    source: SourceParams | None = None
    map: str | None = None
    side: Side = "train"


@dataclass(frozen=True)
class Coded:
    """One side's rows of a chunk as an Arrow table, its drops, and the values (uint64) of the questions in it."""

    side: Side
    table: pa.Table
    counts: Counter[str]
    questions: np.ndarray


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

    `folder/questions.npy` has the values of the questions in training rows of sources, if there are any.
    Raises `DataError` when nothing is left to train on.
    """
    tokenizer = _tokenizer(str(tokenizer_folder))
    schema = schema_of(stage, params, tokenizer.vocab_size)
    function = functools.partial(encode, stage, params, str(tokenizer_folder))
    folder.mkdir(parents=True)
    dropped: Counter[str] = Counter()
    files = {side: RowFile(folder / side, params, schema) for side in SIDES}
    questions = [joined([])]
    for coded in itertools.chain.from_iterable(workers.each(function, chunks)):
        files[coded.side].add(coded.table)
        dropped += coded.counts
        if coded.side == "train":
            questions.append(coded.questions)
    if len(asked := joined(questions)):
        np.save(folder / QUESTIONS, asked)
    card: dict[str, Any] = {"dropped": dict(sorted(dropped.items()))}
    for side, file in files.items():
        card[side] = file.close()
    if not card["train"]["rows"]:
        raise DataError(f"data.{stage}: no row is left to train on; dropped: {card['dropped'] or 'none'}")
    return card


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
    if chunk.source is None:
        sides[chunk.side] += chunk.rows
    tokenizer = _tokenizer(tokenizer_folder)
    for number, raw, row in _mapped(chunk, params, tokenizer) if chunk.source is not None else ():
        if row is None:
            counts["map function"] += 1
            continue
        assert chunk.source is not None
        share = content_hash(row) / 2**64
        if share < params.validation:
            sides["validation"].append((number, row))
        else:
            spread = (share - params.validation) / (1 - params.validation)
            weight = chunk.source.weight
            copies = int(weight) + (spread < weight % 1)
            sides["train"] += [(number, row)] * copies
            if copies and stage != "pretrain":  # documents ask nothing
                asked += _questions(raw, row)
    results = []
    for side, rows in sides.items():
        encoded = _encoded(stage, params, tokenizer, chunk.place, rows)
        table = table_of(encoded.columns, schema_of(stage, params, tokenizer.vocab_size, packed=False))
        results.append(Coded(side, table, counts + encoded.counts, np.array(asked, np.uint64)))
        counts = Counter()
    return results


def texts_in(params: PartParams, chunk: Chunk) -> Iterator[str]:
    """The text of each row of a chunk, with the names of its speakers, as a tokenizer is trained on it."""
    if chunk.source is None:
        yield from (text_in(row) for _, row in chunk.rows)
        return
    for number, _, row in _mapped(chunk, params, None):
        if row is not None and has_ids(row):
            made = "ids were made with a tokenizer, so none can be trained on them; name it (data.tokenizer.name)"
            raise DataError(f"{chunk.place}, row {number}: {made}")
        if row is not None:
            yield text_in(row)


def _questions(raw: Row, row: Row) -> list[int]:
    """The values of a row's questions; none of a row that its encoder will refuse in a moment, with its number."""
    try:
        return list(values_in(raw, row))
    except (KeyError, TypeError, AttributeError, ValueError):
        return []


def _mapped(chunk: Chunk, params: PartParams, tokenizer: Tokenizer | None) -> Iterator[tuple[int, Row, Row | None]]:
    """Each row's number, the row as published, and what the map function made of it."""
    function = _as_it_is if chunk.map is None else function_at(chunk.map, "map function")
    if chunk.map is None and chunk.source is not None and isinstance(params, PretrainData):
        function = functools.partial(_text_alone, chunk.source.text_field)
    parameters = inspect.signature(function).parameters
    if "tokenizer" in parameters:
        if tokenizer is None:
            needs = "asks for the tokenizer, so none can be trained on its rows; name one (data.tokenizer.name)"
            raise DataError(f"{chunk.place}: the map function {chunk.map} {needs}")
        function = functools.partial(function, **asking(parameters, tokenizer, params))
    for number, raw in chunk.rows:
        try:
            yield number, raw, function(raw)
        except DataError as error:
            raise DataError(f"{chunk.place}, row {number}: {error}") from None
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise DataError(
                f"{chunk.place}, row {number}: the map function {chunk.map} raised {type(error).__name__}: {error};"
                f" the row has the fields {', '.join(sorted(raw))}"
            ) from None


def _as_it_is(row: Row) -> Row:
    return row


def _text_alone(name: str, row: Row) -> Row:
    return {"input_ids": row["input_ids"]} if has_ids(row) else {"text": text_of(row, name)}


def _encoded(stage: str, params: PartParams, tokenizer: Tokenizer, place: str, rows: list[tuple[int, Row]]) -> Encoded:
    if any(has_ids(row) for _, row in rows):
        return _given_ids(params, tokenizer, place, rows)
    try:
        return ENCODERS[stage]([row for _, row in rows], tokenizer, params)
    except (ValueError, KeyError):
        for number, row in rows:  # again one by one, to say which row it was
            try:
                ENCODERS[stage]([row], tokenizer, params)
            except KeyError as error:
                raise DataError(f"{place}, row {number}: the field {error} is missing") from None
            except ValueError as error:
                raise DataError(f"{place}, row {number}: {error}") from None
        raise


def _given_ids(params: PartParams, tokenizer: Tokenizer, place: str, rows: list[tuple[int, Row]]) -> Encoded:
    parts = []
    for number, row in rows:
        try:
            parts.append(encode_ids([row], tokenizer, params))
        except (DataError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{place}, row {number}: {error}") from None
    columns = {name: [value for part in parts for value in part.columns[name]] for name in parts[0].columns}
    return Encoded(columns, sum((part.counts for part in parts), Counter()))


@functools.cache
def _tokenizer(folder: str) -> Tokenizer:
    return Tokenizer.load(folder)
