"""Rows whose token ids were made elsewhere: `input_ids` and `labels`, as dllm's preprocessing and map functions leave them.

A position whose label is -100 is never masked nor scored; at every other one the label is the token itself. Knows no
files and no text.
"""

from array import array
from collections import Counter
from collections.abc import Sequence
from typing import Any

from llada_core.data.params import PartParams, PretrainData, SFTData
from llada_core.data.sources import DataError, Row, RowError
from llada_core.data.tokenise import Encoded
from llada_core.tokenizer import Tokenizer

_IGNORED = -100


def has_ids(row: Row) -> bool:
    """Whether a row holds ids, which then go before its text."""
    return row.get("input_ids") is not None


def encode(rows: Sequence[Row], tokenizer: Tokenizer, params: PartParams) -> Encoded:
    """The columns of a pretraining or fine-tuning stage; rows beyond its length are cut or dropped as its block says.

    Raises `DataError` for ids that the tokenizer does not have, and for labels that are not the ids.
    """
    if isinstance(params, PretrainData):
        if params.documents:
            raise DataError("ids that were packed before do not tell where documents end; set documents: false")
        return Encoded({"input_ids": [_ids(row, tokenizer) for row in rows]})  # an EOS, if wanted, is among them
    if not isinstance(params, SFTData):
        raise DataError(
            "this stage needs prompts as text, for they are judged; ids are for pretraining and fine-tuning"
        )
    encoded = Encoded({"input_ids": [], "maskable": []}, Counter())
    for row in rows:
        ids, maskable = _ids(row, tokenizer), _maskable(row)
        if not params.mask_prompt:
            maskable = b"\1" * len(ids)
        if len(ids) > params.length and params.truncation == "filter":
            encoded.counts["too long"] += 1
        elif not any(maskable[: params.length]):
            encoded.counts["prompt too long" if any(maskable) else "no answer"] += 1
        else:
            encoded.counts["answer cut"] += len(ids) > params.length
            encoded.columns["input_ids"].append(ids[: params.length])
            encoded.columns["maskable"].append(maskable[: params.length])
    encoded.counts = +encoded.counts
    return encoded


def _ids(row: Row, tokenizer: Tokenizer) -> "array[int]":
    ids = [int(i) for i in row["input_ids"]]
    if wrong := [i for i in ids if not 0 <= i < tokenizer.vocab_size]:
        raise DataError(
            f"id {wrong[0]} is none of the tokenizer's {tokenizer.vocab_size}: these ids were made with another one;"
            " name it (data.tokenizer.name)"
        )
    return array("I", ids)


def _maskable(row: Row) -> bytes:
    ids, labels = row["input_ids"], row.get("labels")
    if labels is None:
        return b"\1" * len(ids)
    if len(labels) != len(ids):
        raise RowError(f"{len(labels)} labels for {len(ids)} input_ids; one for each, -100 where nothing is trained")
    for place, (token, label) in enumerate(zip(ids, labels, strict=True)):
        if label not in (_IGNORED, token):
            raise RowError(f"label {label} at position {place} is neither -100 nor the token {token} itself")
    return bytes(label != _IGNORED for label in labels)


def asking(parameters: Any, tokenizer: Tokenizer, params: PartParams) -> dict[str, Any]:
    """What a map function of dllm's kind asks for besides the row, by name: `tokenizer`, `mask_prompt_loss`."""
    given: dict[str, Any] = {"tokenizer": tokenizer.fast}
    if isinstance(params, SFTData):
        given["mask_prompt_loss"] = params.mask_prompt
    return {name: value for name, value in given.items() if name in parameters}
