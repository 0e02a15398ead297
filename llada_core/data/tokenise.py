"""Text to rows of token ids: documents, dialogues with the positions that are trained on, prompts, pairs.

Every function takes many texts at once, because the tokenizer is several times faster so. What does not fit is cut or
dropped as its block says, never silently: each result counts its drops by reason. Knows no files and no puzzles.
"""

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from typing import Any

from llada_core.config.data import GRPOData, PreferenceData, PretrainData, SFTData
from llada_core.data.sources import DataError, Row
from llada_core.tokenizer import Message, Tokenizer

Columns = dict[str, list[Any]]
_FLAGS = (b"\0", b"\1")
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
        ends = [i + 1 for i, m in enumerate(messages) if m["role"] == "assistant" and m["content"].strip()]
        if not ends:
            counts["no answer"] += 1
        elif params.turns == "each":
            asked += [(messages[:end], False) for end in ends]
        elif params.turns == "sampled":
            asked.append((messages[: ends[content_hash(row) % len(ends)]], False))
        else:
            asked.append((messages[: ends[-1]], params.turns == "all"))
    chat = _ChatEncoder(tokenizer)
    encoded = Encoded({"input_ids": [], "maskable": []}, counts)
    add_ids, add_maskable = (column.append for column in encoded.columns.values())
    for ids, maskable in chat.encode(asked):
        if not params.mask_prompt:
            maskable = b"\1" * len(ids)
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
    chat = _ChatEncoder(tokenizer)
    asked = [_as_messages(row["prompt"]) for row in rows]
    for row, messages, ids in zip(rows, asked, chat.prompts(asked), strict=True):
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
    chat = _ChatEncoder(tokenizer)
    kept = [row for row in rows if text_of(row, "chosen").strip() and text_of(row, "rejected").strip()]
    encoded.counts["no answer"] += len(rows) - len(kept)
    asked = []
    for row in kept:
        for name in ("chosen", "rejected"):
            asked.append(([*_as_messages(row["prompt"]), {"role": "assistant", "content": row[name]}], False))
    both = chat.encode(asked)
    for chosen in both:
        rejected = next(both)
        fitted = [_fit(*row, params.length, params.truncation, encoded.counts) for row in (chosen, rejected)]
        if fitted[0] is None or fitted[1] is None:
            continue
        start = chosen[1].index(1)
        values = (chosen[0][:start], fitted[0][0][start:], fitted[1][0][start:])
        for column, value in zip(encoded.columns.values(), values, strict=True):
            column.append(value)
    return encoded


class _ChatEncoder:
    """Dialogues to ids: what the template writes around the contents is encoded once for each sequence of roles."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._frames, self._plan = cache(self._encode_frames), cache(self._trained)

    def encode(self, asked: Sequence[tuple[list[Message], bool]]) -> Iterator[tuple["array[int]", bytes]]:
        """Ids and maskable of each dialogue; its last reply is trained on, or with True all of the assistant's."""
        for (messages, every), contents in zip(asked, self._contents([m for m, _ in asked]), strict=True):
            head, plan = self._plan(tuple([m["role"] for m in messages]), every)
            ids, flags = head[:], [bytes(len(head))]
            for content, (flag, frame, behind) in zip(contents, plan, strict=True):
                ids.fromlist(content)
                ids += frame
                flags += flag * len(content), behind
            yield ids, b"".join(flags)

    def _trained(
        self, roles: tuple[str, ...], every: bool
    ) -> tuple["array[int]", list[tuple[bytes, "array[int]", bytes]]]:
        """What stands before the first content; then for each content its flag, the frame behind it, that one's flags."""
        head, *frames = self._frames(roles, False)
        plan = []
        for i, frame in enumerate(frames):
            last = i == len(roles) - 1
            trained = last or (every and roles[i] == "assistant")
            closing = (len(frame) if last else self._closing(frame)) if trained else 0
            plan.append((_FLAGS[trained], array("I", frame), b"\1" * closing + bytes(len(frame) - closing)))
        return array("I", head), plan

    def prompts(self, asked: Sequence[list[Message]]) -> Iterator[list[int]]:
        """Ids of each dialogue with the generation prompt behind it."""
        for messages, contents in zip(asked, self._contents(asked), strict=True):
            frames = self._frames(tuple(m["role"] for m in messages), True)
            ids = list(frames[0])
            for content, frame in zip(contents, frames[1:], strict=True):
                ids += [*content, *frame]
            yield ids

    def _contents(self, asked: Sequence[list[Message]]) -> Iterator[list[list[int]]]:
        flat = self._tokenizer.encode_batch([m["content"].strip() for messages in asked for m in messages])
        for messages in asked:
            yield list(islice(flat, len(messages)))

    def _encode_frames(self, roles: tuple[str, ...], generation_prompt: bool) -> list[list[int]]:
        marks = [f"\ue000{i}\ue001" for i in range(len(roles))]
        messages = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
        rest = self._tokenizer.chat_text(messages, generation_prompt=generation_prompt)
        if not generation_prompt and len(roles) > 1:
            prompt = self._tokenizer.chat_text(messages[:-1], generation_prompt=True)
            if not rest.startswith(prompt + marks[-1]):
                raise DataError("the chat template writes a reply in another way than its generation prompt announces")
        frames = []
        for mark in marks:
            frame, _, rest = rest.partition(mark)
            frames.append(frame)
        return [self._tokenizer.encode(frame, user=False) for frame in [*frames, rest]]

    def _closing(self, frame: list[int]) -> int:
        """How many tokens of a frame still belong to the message before it: those up to its end token."""
        return next((i + 1 for i, token in enumerate(frame) if token in self._tokenizer.end_ids), 0)


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
    """The text in a field of a row; raises `DataError` naming the fields that there are."""
    value = row.get(name)
    if not isinstance(value, str):
        fields = ", ".join(sorted(row)) or "none"
        raise DataError(f"expected text in the field {name!r}; the row has the fields {fields}")
    return value


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
        raise DataError(
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
            raise DataError(f"expected messages with the texts 'role' and 'content', got {str(message)[:80]!r}")
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
