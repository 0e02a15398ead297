"""The formats of training rows: of each its columns, and how a row or a puzzle comes to stand in them."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

from llada_core.data import encode, puzzle_rows, shapes
from llada_core.data.encode import Columns
from llada_core.data.params import PartParams, PretrainData
from llada_core.data.puzzles import Puzzle, PuzzleSplit
from llada_core.data.sources import Row
from llada_core.tokenizer import Tokenizer

Column = Literal["ids", "flags", "text"]


@dataclass(frozen=True)
class RowFormat:
    """What the rows of one part of the data are.

    columns: as they are stored. shaped: a row of whatever shape as `encoder` reads it, and what was recognised in it.
    encoder: rows to columns, many at once, with its drops counted by reason. drawn: puzzles as rows that need no shaping;
    split: of which puzzles. asks: a row has a question, which must not be one of a benchmark. new_text: what a tokenizer
    is trained on; prompts hold no kind of text that others do not.
    """

    columns: Mapping[str, Column]
    shaped: Callable[[Row], tuple[Row, str | None]]
    encoder: Callable[[Sequence[Row], Tokenizer, Any, Counter[str]], Columns]
    drawn: Callable[[list[Puzzle], Sequence[float]], Iterator[Row]]
    split: PuzzleSplit
    asks: bool = True
    new_text: bool = False


# By the name of the part: its block in `data` of params.yaml, its folder in data/, its counts of puzzles.
FORMATS: dict[str, RowFormat] = {
    "pretrain": RowFormat(
        {"input_ids": "ids"},
        shapes.document,
        encode.documents,
        puzzle_rows.documents,
        "train",
        asks=False,
        new_text=True,
    ),
    "sft": RowFormat(
        {"input_ids": "ids", "maskable": "flags"},
        shapes.dialogue,
        encode.dialogues,
        puzzle_rows.dialogues,
        "train",
        new_text=True,
    ),
    "grpo": RowFormat(
        {"prompt_ids": "ids", "prompt": "text", "task": "text", "answer": "text"},
        shapes.prompt,
        encode.prompts,
        puzzle_rows.prompts,
        "grpo",
    ),
    "preference": RowFormat(
        {"prompt_ids": "ids", "chosen_ids": "ids", "rejected_ids": "ids"},
        shapes.pair,
        encode.pairs,
        puzzle_rows.pairs,
        "grpo",
    ),
}


def schema_of(part: str, params: PartParams, vocab_size: int, *, packed: bool = True) -> pa.Schema:
    """The columns of a part's rows; not `packed`: of pretraining documents on their way to being packed."""
    kinds = {
        "ids": pa.list_(pa.uint16() if vocab_size <= 1 << 16 else pa.int32()),
        "flags": pa.list_(pa.uint8()),
        "text": pa.string(),
    }
    fields = {name: kinds[kind] for name, kind in FORMATS[part].columns.items()}
    if packed and isinstance(params, PretrainData) and params.documents:
        fields["document_ids"] = pa.list_(pa.int32())
    return pa.schema(fields)
