"""Text to columns of token ids, many rows at once, because the tokenizer is several times faster so.

What does not fit is cut or dropped as its block says, never silently: every encoder counts its drops by reason. Rows
whose ids were made elsewhere (`input_ids` and `labels`, as dllm leaves them) are checked and kept as they are.
"""

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Sequence
from typing import Any

from llada_core.data.params import GRPOData, PartParams, PreferenceData, PretrainData, SFTData
from llada_core.data.shapes import text_from, trains
from llada_core.data.sources import DataError, Row, RowError
from llada_core.tokenizer import Dialogue, Message, Tokenizer

Columns = dict[str, list[Any]]  # columns of equal length: ids as arrays ("I"), flags as bytes, text as str
_JSON = json.JSONEncoder(sort_keys=True, ensure_ascii=False, separators=(",", ":"))
# A table holds dates and bytes beside what a stage needs: they tell rows apart, and need no text to be read again.
_ANY = json.JSONEncoder(sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)


def documents(rows: Sequence[Row], tokenizer: Tokenizer, params: PretrainData, counts: Counter[str]) -> Columns:
    """`input_ids` of each `text`, with an EOS behind it if asked; not yet packed."""
    texts = [text_of(row, "text") for row in rows]
    # Of an empty document nothing would be left but its EOS: a lesson to end at once.
    kept = [text for text in texts if text.strip()]
    counts += Counter({"empty": len(texts) - len(kept)})
    documents = []
    for ids in tokenizer.encode_batch(kept):
        if params.insert_eos:
            ids.append(tokenizer.special.eos_id)
        # Four bytes an id; in a list each is a Python object of its own.
        documents.append(array("I", ids))
    return {"input_ids": documents}


def dialogues(rows: Sequence[Row], tokenizer: Tokenizer, params: SFTData, counts: Counter[str]) -> Columns:
    """`input_ids` and `maskable` (1 where a reply stands, its end token included) of each `messages`."""
    asked: list[list[Message]] = []
    for row in rows:
        messages = _messages(row)
        # A reply that opens a dialogue answers nothing.
        ends = [i + 1 for i, message in enumerate(messages) if i and trains(message)]
        if not ends:
            counts["no answer"] += 1
        elif params.turns == "each":
            asked += [messages[:end] for end in ends]
        elif params.turns == "sampled":
            # Drawn by content: the same reply whenever and wherever the data is made (LLaDA draws one a dialogue as well).
            asked.append(messages[: ends[row_hash(row) % len(ends)]])
        else:
            # Attention looks both ways: what stands behind the last reply would be read by it, and never stands there later.
            asked.append(messages[: ends[-1]])
    columns: Columns = {"input_ids": [], "maskable": []}
    encoded = tokenizer.dialogues([_unmarked(messages) for messages in asked], answered=True)
    for messages, dialogue in zip(asked, encoded, strict=True):
        ids, maskable = array("I", dialogue.ids), _trained(messages, dialogue, params)
        if len(ids) > params.length:
            fitted = _fit(ids, maskable, params.length, params.truncation, counts)
            if fitted is None:
                continue
            ids, maskable = fitted
        columns["input_ids"].append(ids)
        columns["maskable"].append(maskable)
    return columns


def _trained(messages: Sequence[Message], dialogue: Dialogue, params: SFTData) -> bytes:
    """One byte per id of a dialogue: 1 where it is trained on.

    Raises `RowError` where an earlier reply counts and the template does not tell where each one stands.
    """
    replies = [trains(message) for message in messages[1:] if message["role"] == "assistant"]
    if (params.turns == "all" or not all(replies)) and len(dialogue.replies) < len(replies):
        raise RowError("the chat template does not tell where each reply starts and ends; turns: each trains them")
    if params.mask_prompt and params.turns != "all":
        replies[:-1] = [False] * (len(replies) - 1)
    flags = bytearray(len(dialogue.ids)) if params.mask_prompt else bytearray(b"\1") * len(dialogue.ids)
    # From the last one backwards: a template that tells only one place tells that of the last reply.
    for (start, end), trained in zip(reversed(dialogue.replies), reversed(replies), strict=False):
        flags[start:end] = (b"\1" if trained else b"\0") * (end - start)
    return bytes(flags)


def _unmarked(messages: list[Message]) -> list[Message]:
    """The messages as a template takes them: whether one is trained on is no matter of what is said."""
    if not any("train" in message for message in messages):
        return messages
    return [{key: value for key, value in message.items() if key != "train"} for message in messages]


def prompts(rows: Sequence[Row], tokenizer: Tokenizer, params: GRPOData, counts: Counter[str]) -> Columns:
    """`prompt_ids` with the generation prompt, and `prompt`, `task`, `answer` (canonical JSON) as given."""
    columns: Columns = {"prompt_ids": [], "prompt": [], "task": [], "answer": []}
    asked = [_as_messages(row["prompt"]) for row in rows]
    for row, messages, dialogue in zip(rows, asked, tokenizer.dialogues(asked), strict=True):
        # Dropped and never cut: a question without its beginning has another answer.
        if len(dialogue.ids) > params.length:
            counts["prompt too long"] += 1
            continue
        values = (dialogue.ids, messages[-1]["content"], row["task"], canonical(row["answer"]))
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)
    return columns


def pairs(rows: Sequence[Row], tokenizer: Tokenizer, params: PreferenceData, counts: Counter[str]) -> Columns:
    """`prompt_ids`, `chosen_ids`, `rejected_ids` (replies with their end token) of `prompt`, `chosen`, `rejected`."""
    columns: Columns = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": []}
    kept = [row for row in rows if text_of(row, "chosen").strip() and text_of(row, "rejected").strip()]
    counts += Counter({"no answer": len(rows) - len(kept)})
    asked = []
    for row in kept:
        for name in ("chosen", "rejected"):
            asked.append([*_as_messages(row["prompt"]), {"role": "assistant", "content": row[name]}])
    both = tokenizer.dialogues(asked, answered=True)
    # One iterator twice: two dialogues in a row are a pair. Ids are cut where a reply starts, so both start at one place.
    for pair in zip(both, both, strict=True):
        start = pair[0].replies[-1][0]
        fitted = []
        for dialogue in pair:
            ids, maskable = array("I", dialogue.ids), bytes(start) + b"\1" * (len(dialogue.ids) - start)
            fitted.append(_fit(ids, maskable, params.length, params.truncation, counts))
        # One reply alone prefers nothing.
        if fitted[0] is None or fitted[1] is None:
            continue
        columns["prompt_ids"].append(fitted[0][0][:start])
        columns["chosen_ids"].append(fitted[0][0][start:])
        columns["rejected_ids"].append(fitted[1][0][start:])
    return columns


def _fit(
    ids: "array[int]", maskable: bytes, length: int, truncation: str, counts: Counter[str]
) -> tuple["array[int]", bytes] | None:
    if len(ids) <= length:
        return ids, maskable
    if truncation == "filter":
        counts["too long"] += 1
        return None
    # Cut on the right, a long prompt leaves nothing of its reply: a row that costs a forward and teaches nothing.
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


def row_hash(row: Row) -> int:
    """A number from 0 to 2^64 that depends on the row's content alone: on what is said, where it is a dialogue."""
    try:
        # Not what else the row has (an id, a source), so that an edit of it moves no row to the other split.
        text = "\0".join([m["content"] for m in row["messages"]]) if "messages" in row else row["text"]
        data = text.encode()
    except (KeyError, TypeError, AttributeError):  # another kind of row, or one that will be refused
        data = _ANY.encode(row).encode()
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")


_IGNORED = -100  # the label of a position that is never masked nor scored


def has_ids(row: Row) -> bool:
    """Whether a row holds ids, which then go before its text."""
    return row.get("input_ids") is not None


def encode_ids(rows: Sequence[Row], tokenizer: Tokenizer, params: PartParams, counts: Counter[str]) -> Columns:
    """The columns of a pretraining or fine-tuning stage; rows beyond its length are cut or dropped as its block says.

    Raises `DataError` for ids that the tokenizer does not have, and for labels that are not the ids.
    """
    if isinstance(params, PretrainData):
        if params.documents:
            raise DataError("ids that were packed before do not tell where documents end; set documents: false")
        return {"input_ids": [_ids(row, tokenizer) for row in rows]}  # an EOS, if wanted, is among them
    if not isinstance(params, SFTData):
        raise DataError(
            "this stage needs prompts as text, for they are judged; ids are for pretraining and fine-tuning"
        )
    columns: Columns = {"input_ids": [], "maskable": []}
    for row in rows:
        ids, maskable = _ids(row, tokenizer), _maskable(row)
        if not params.mask_prompt:
            maskable = b"\1" * len(ids)
        if len(ids) > params.length and params.truncation == "filter":
            counts["too long"] += 1
        elif not any(maskable[: params.length]):
            counts["prompt too long" if any(maskable) else "no answer"] += 1
        else:
            if len(ids) > params.length:
                counts["answer cut"] += 1
            columns["input_ids"].append(ids[: params.length])
            columns["maskable"].append(maskable[: params.length])
    return columns


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
        # Labels shifted by one, as some autoregressive trainers store them, would teach each position its neighbour.
        if label not in (_IGNORED, token):
            raise RowError(f"label {label} at position {place} is neither -100 nor the token {token} itself")
    return bytes(label != _IGNORED for label in labels)


def asking(parameters: Any, tokenizer: Tokenizer, params: PartParams) -> dict[str, Any]:
    """What a map function of dllm's kind asks for besides the row, by name: `tokenizer`, `mask_prompt_loss`."""
    given: dict[str, Any] = {"tokenizer": tokenizer.fast}
    if isinstance(params, SFTData):
        given["mask_prompt_loss"] = params.mask_prompt
    return {name: value for name, value in given.items() if name in parameters}
