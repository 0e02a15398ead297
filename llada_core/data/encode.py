"""Rows to columns of ids, many at once; what cannot be used is dropped and counted."""

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import Any

from llada_core.data.params import GRPOData, PartParams, PreferenceData, PretrainData, SFTData
from llada_core.data.shapes import text_from, trains
from llada_core.data.sources import DataError, Row, RowError
from llada_core.tokenizer import Message, Tokenizer

Columns = dict[str, list[Any]]
_JSON = json.JSONEncoder(sort_keys=True, ensure_ascii=False, separators=(",", ":"))


@dataclass
class Encoded:
    """Columns of equal length, ready to be written, and how many rows were dropped or cut for which reason."""

    columns: Columns
    counts: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))


def documents(rows: Sequence[Row], tokenizer: Tokenizer, params: PretrainData) -> Encoded:
    """`input_ids` of each `text`, with an EOS behind it if asked; not yet packed."""
    texts = [text_of(row, "text") for row in rows]
    kept = [text for text in texts if text.strip()]
    documents = []
    for ids in tokenizer.encode_batch(kept):
        if params.insert_eos:
            ids.append(tokenizer.special.eos_id)
        documents.append(array("I", ids))
    return Encoded({"input_ids": documents}, +Counter({"empty": len(texts) - len(kept)}))


def dialogues(rows: Sequence[Row], tokenizer: Tokenizer, params: SFTData) -> Encoded:
    """`input_ids` and `maskable` (1 where a reply stands, its end token included) of each `messages`."""
    counts: Counter[str] = Counter()
    asked: list[tuple[list[Message], bool]] = []
    for row in rows:
        messages = _messages(row)
        ends = [i + 1 for i, message in enumerate(messages) if i and trains(message)]
        if not ends:
            counts["no answer"] += 1
        elif params.turns == "each":
            asked += [(messages[:end], False) for end in ends]
        elif params.turns == "sampled":
            asked.append((messages[: ends[content_hash(row) % len(ends)]], False))
        else:
            asked.append((messages[: ends[-1]], params.turns == "all"))
    encoded = Encoded({"input_ids": [], "maskable": []}, counts)
    add_ids, add_maskable = (column.append for column in encoded.columns.values())
    for (messages, every), dialogue in zip(
        asked, tokenizer.dialogues([_said(m) for m, _ in asked], answered=True), strict=True
    ):
        replies = [message for message in messages[1:] if message["role"] == "assistant"]
        silent = [] if all(map(trains, replies)) else [not trains(message) for message in replies]
        if (every or silent) and len(dialogue.replies) < len(replies):
            raise RowError("the chat template does not tell where each reply starts and ends; turns: each trains them")
        trained = dialogue.replies if every else dialogue.replies[-1:]
        ids, maskable = array("I", dialogue.ids), _flags(len(dialogue.ids), trained if params.mask_prompt else None)
        if any(silent):
            maskable = _without(maskable, list(compress(dialogue.replies, silent)))
        if len(ids) > params.length:
            fitted = _fit(ids, maskable, params.length, params.truncation, counts)
            if fitted is None:
                continue
            ids, maskable = fitted
        add_ids(ids)
        add_maskable(maskable)
    return encoded


def prompts(rows: Sequence[Row], tokenizer: Tokenizer, params: GRPOData) -> Encoded:
    """`prompt_ids` with the generation prompt, and `prompt`, `task`, `answer` (canonical JSON) as given."""
    encoded = Encoded({"prompt_ids": [], "prompt": [], "task": [], "answer": []})
    asked = [_as_messages(row["prompt"]) for row in rows]
    for row, messages, dialogue in zip(rows, asked, tokenizer.dialogues(asked), strict=True):
        ids = dialogue.ids
        if len(ids) > params.length:
            encoded.counts["prompt too long"] += 1
            continue
        values = (ids, messages[-1]["content"], row["task"], canonical(row["answer"]))
        for column, value in zip(encoded.columns.values(), values, strict=True):
            column.append(value)
    return encoded


def pairs(rows: Sequence[Row], tokenizer: Tokenizer, params: PreferenceData) -> Encoded:
    """`prompt_ids`, `chosen_ids`, `rejected_ids` (replies with their end token) of `prompt`, `chosen`, `rejected`."""
    encoded = Encoded({"prompt_ids": [], "chosen_ids": [], "rejected_ids": []})
    kept = [row for row in rows if text_of(row, "chosen").strip() and text_of(row, "rejected").strip()]
    encoded.counts["no answer"] += len(rows) - len(kept)
    asked = []
    for row in kept:
        for name in ("chosen", "rejected"):
            asked.append([*_as_messages(row["prompt"]), {"role": "assistant", "content": row[name]}])
    both = tokenizer.dialogues(asked, answered=True)
    for pair in zip(both, both, strict=True):
        ids = [array("I", dialogue.ids) for dialogue in pair]
        start = pair[0].replies[-1][0]
        fitted = [
            _fit(row, _flags(len(row), [(start, len(row))]), params.length, params.truncation, encoded.counts)
            for row in ids
        ]
        if fitted[0] is None or fitted[1] is None:
            continue
        values = (ids[0][:start], fitted[0][0][start:], fitted[1][0][start:])
        for column, value in zip(encoded.columns.values(), values, strict=True):
            column.append(value)
    return encoded


def _flags(count: int, trained: Sequence[tuple[int, int]] | None) -> bytes:
    """One byte per id: 1 where replies are trained on, or (None) everywhere."""
    if trained is None:
        return b"\1" * count
    flags = bytearray(count)
    for start, end in trained:
        flags[start:end] = b"\1" * (end - start)
    return bytes(flags)


def _without(maskable: bytes, silent: Sequence[tuple[int, int]]) -> bytes:
    """Flags with 0 where replies stand that are not trained on."""
    flags = bytearray(maskable)
    for start, end in silent:
        flags[start:end] = bytes(end - start)
    return bytes(flags)


def _said(messages: list[Message]) -> list[Message]:
    """The messages as a template takes them: whether one is trained on is no matter of what is said."""
    if not any("train" in message for message in messages):
        return messages
    return [{key: value for key, value in message.items() if key != "train"} for message in messages]


def _fit(
    ids: "array[int]", maskable: bytes, length: int, truncation: str, counts: Counter[str]
) -> tuple["array[int]", bytes] | None:
    if len(ids) <= length:
        return ids, maskable
    if truncation == "filter":
        counts["too long"] += 1
        return None
    if not any(maskable[:length]):
        counts["prompt too long"] += 1
        return None
    counts["answer cut"] += 1
    return ids[:length], maskable[:length]


def text_of(row: Row, name: str) -> str:
    """The text in a field of a row, of a number its digits; raises `RowError` naming the fields that there are."""
    if name not in row:
        fields = ", ".join(sorted(map(str, row))) or "none"
        raise RowError(f"no field {name!r}", f"expected text in the field {name!r}; the row has the fields {fields}")
    return text_from(row[name], name)


def text_in(row: Row) -> str:
    """All text of a row in one: a document, or what is said in a dialogue, each message behind its role's name."""
    if "text" in row:
        return text_of(row, "text")
    messages = _messages(row) if "messages" in row else _as_messages(row.get("prompt", ""))
    replies = [text_of(row, name) for name in ("chosen", "rejected") if name in row]
    return "\n\n".join([f"{m['role']}\n\n{m['content']}" for m in messages] + [f"assistant\n\n{r}" for r in replies])


def _messages(row: Row) -> list[Message]:
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RowError(
            f"expected a list of messages in the field 'messages'; the row has the fields {', '.join(sorted(row))}"
            "; name a map function for the source"
        )
    return _as_messages(messages)


def _as_messages(prompt: Any) -> list[Message]:
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    for message in prompt:
        try:
            told = type(message["role"]) is type(message["content"]) is str
        except (KeyError, TypeError):
            told = False
        if not told:
            raise RowError(f"expected messages with the texts 'role' and 'content', got {str(message)[:80]!r}")
    return list(prompt)


def canonical(value: Any) -> str:
    """JSON that is equal for equal values."""
    return _JSON.encode(value)


def content_hash(row: Row) -> int:
    """A number from 0 to 2^64 that depends on the row's content alone: on what is said, where it is a dialogue."""
    try:
        text = "\0".join([m["content"] for m in row["messages"]]) if "messages" in row else row["text"]
        data = text.encode()
    except (KeyError, TypeError, AttributeError):  # another kind of row, or one that will be refused
        data = canonical(row).encode()
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")


Encoder = Callable[[Sequence[Row], Tokenizer, Any], Encoded]
ENCODERS: dict[str, Encoder] = {"pretrain": documents, "sft": dialogues, "grpo": prompts, "preference": pairs}


_IGNORED = -100


def has_ids(row: Row) -> bool:
    """Whether a row holds ids, which then go before its text."""
    return row.get("input_ids") is not None


def encode_ids(rows: Sequence[Row], tokenizer: Tokenizer, params: PartParams) -> Encoded:
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
