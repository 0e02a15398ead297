"""From the rows of a chunk as they were published to rows in the shape that their stage needs.

Knows map functions and shapes; knows no sides and no ids.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from llada_core.data.encode import asking, has_ids, text_of
from llada_core.data.params import PartParams, PretrainData, SourceParams
from llada_core.data.shapes import Shaped, shaped
from llada_core.data.sources import DataError, Numbered, Row, RowError, Unusable
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
