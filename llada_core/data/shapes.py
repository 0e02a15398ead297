"""What shape a published row has, recognised by its fields, and what a training stage needs made of it.

Fine-tuning needs {messages}, preference {prompt, chosen, rejected}, GRPO {prompt, task, answer}, pretraining {text}. A
row in another usual shape is mapped, and the shape is told, so that a wrong guess is seen. Knows no source and no ids.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from llada_core.data.messages import Message, messages_of, odd, text_from, trains
from llada_core.data.sources import Row, RowError

_DIALOGUES = ("messages", "conversations", "conversation", "dialogue", "dialog", "turns")
# What is asked, what it is about, and what is answered, by the names of fields; the first that a row has count.
_PAIRS = (
    ("instruction", ("input", "context"), ("output", "response", "completion", "answer")),
    ("prompt", ("input", "context"), ("completion", "response", "answer", "output", "reply")),
    ("question", ("context",), ("answer", "response", "output", "completion", "solution")),
    ("query", ("context",), ("response", "answer", "output", "completion")),
    ("problem", (), ("solution", "answer", "response", "output")),
    ("input", (), ("output", "response", "answer", "target", "completion")),
    ("user", (), ("assistant", "bot", "model")),
    ("human", (), ("assistant", "gpt", "bot")),
)
_SYSTEM = ("system", "system_prompt")


@dataclass(frozen=True, slots=True)
class Shaped:
    """A row as its stage needs it; `shape`: what was recognised in it, None where nothing had to be done."""

    row: Row
    shape: str | None = None


def shaped(row: Row, stage: str) -> Shaped:
    """A row of whatever shape, as `stage` needs it; raises `RowError` for one that it cannot use."""
    if stage == "sft":
        return _dialogue(row)
    if stage == "preference":
        return _preference(row)
    if stage == "grpo" and not isinstance(row.get("prompt"), str | None):
        return Shaped(row | {"prompt": messages_of(row["prompt"])})
    return Shaped(row)


def _dialogue(row: Row) -> Shaped:
    found = _messages_in(row) or _asked_and_answered(row)
    if found is None:
        raise RowError(
            f"no shape that is known: {_fields(row)}",
            "expected a list of messages in the field 'messages', or instruction and output, prompt and completion, question"
            f" and answer; the row has the fields {_fields(row)}; name a map function for the source"
            + (", or let it be read as documents (data.pretrain)" if "text" in row else ""),
        )
    if not any(map(trains, found.row["messages"][1:])):
        raise RowError("no answer", "no reply in it is trained on: each is empty, or marked so, or answers nothing")
    return found


def _messages_in(row: Row) -> Shaped | None:
    for name in _DIALOGUES:
        entries = _unpacked(row.get(name))
        if isinstance(entries, list | dict) and entries:
            said, unusual = messages_of(entries), odd(entries)
            told = _with_system(row, said)
            plain = name == "messages" and unusual is None and told is said
            tools = ["tools left out"] if row.get("tools") else []
            system = ["a system prompt of its own"] if told is not said else []
            notes = ", ".join([*filter(None, [unusual]), *system, *tools])
            kind = "ShareGPT" if unusual and unusual.startswith("from and value") else name
            shape = None if plain and not tools else f"{kind} ({notes})" if notes else kind
            return Shaped({"messages": told}, shape)
    return None


def _asked_and_answered(row: Row) -> Shaped | None:
    names = {str(name).strip().lower(): name for name in row}
    for asked, about, answered in _PAIRS:
        reply = next((name for name in answered if name in names), None)
        if asked not in names or reply is None:
            continue
        context = next((name for name in about if name in names and name != reply), None)
        prompt, completion = _unpacked(row[names[asked]]), _unpacked(row[names[reply]])
        if _is_dialogue(prompt):
            said = messages_of(prompt)
        else:
            parts = [text_from(prompt, asked)] + ([text_from(row[names[context]], context)] if context else [])
            # As dolly and alpaca are asked: a context stands before the question, an input behind it.
            parts = parts[::-1] if context == "context" else parts
            said = [{"role": "user", "content": "\n\n".join(filter(None, parts))}]
        if _is_dialogue(completion):
            said = [*said, *messages_of(completion)]
        else:
            said = [*said, {"role": "assistant", "content": text_from(completion, reply)}]
        return Shaped({"messages": _with_system(row, said)}, "/".join(filter(None, [asked, context, reply])))
    return None


def _preference(row: Row) -> Shaped:
    if not {"chosen", "rejected"} <= row.keys():
        raise RowError(
            f"no shape that is known: {_fields(row)}",
            f"expected prompt, chosen and rejected; the row has the fields {_fields(row)}; name a map function",
        )
    ends = {name: _unpacked(row[name]) for name in ("chosen", "rejected")}
    told = {name: messages_of(end) for name, end in ends.items() if _is_dialogue(end)}
    replies = {
        name: told[name][-1]["content"] if told.get(name) else text_from(end, name) for name, end in ends.items()
    }
    if not all(reply.strip() for reply in replies.values()):
        raise RowError("no answer", "chosen or rejected is empty")
    asked, shape = _prompt(row)
    if asked is None:
        if len(told.get("chosen", ())) < 2:
            raise RowError(f"no prompt: {_fields(row)}", f"expected a prompt; the row has the fields {_fields(row)}")
        asked, shape = told["chosen"][:-1], "chosen and rejected dialogues"
    return Shaped({"prompt": asked, **replies}, shape)


def _prompt(row: Row) -> tuple[str | list[Message] | None, str | None]:
    """What a pair of replies answers, and by which fields, where they are not the plainest."""
    for name in ("prompt", "question", "instruction", "query", *_DIALOGUES):
        value = _unpacked(row.get(name))
        if value is None:
            continue
        system = any(row.get(each) for each in _SYSTEM)
        if _is_dialogue(value):
            said, unusual = messages_of(value), odd(value)
        elif name == "prompt" and not system:
            return text_from(value, name), None
        else:
            extra = [text_from(row.get("input"), "input")] if name == "instruction" else []
            said = [{"role": "user", "content": "\n\n".join(filter(None, [text_from(value, name), *extra]))}]
            unusual = None
        plain = name == "prompt" and unusual is None and not system
        return _with_system(row, said), None if plain else f"{name}/chosen/rejected{f' ({unusual})' if unusual else ''}"
    return None, None


def _with_system(row: Mapping[str, Any], said: list[Message]) -> list[Message]:
    """The messages behind the system prompt that a row holds beside them, if it does and they have none."""
    own = next((row[name] for name in _SYSTEM if isinstance(row.get(name), str) and row[name].strip()), None)
    if own is None or not said or said[0]["role"] == "system":
        return said
    return [{"role": "system", "content": own}, *said]


def _is_dialogue(value: Any) -> bool:
    """Whether a field holds messages, one or several, rather than a text."""
    return isinstance(value, list) or (isinstance(value, dict) and bool({"role", "from"} & value.keys()))


def _unpacked(value: Any) -> Any:
    """A list of messages that a table holds as JSON text; everything else as it is."""
    if isinstance(value, str) and value.lstrip()[:2] in ("[{", "[\n"):
        try:
            found = orjson.loads(value)
        except ValueError:
            return value
        return found if isinstance(found, list) and all(isinstance(entry, dict) for entry in found) else value
    return value


def _fields(row: Row) -> str:
    return ", ".join(sorted(map(str, row))) or "none"
