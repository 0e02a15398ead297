"""Messages as people write them, made the messages of a chat template: roles, contents, what is trained on.

OpenAI's `role` and `content` (null, in parts, with tool calls, `name`, `weight`), ShareGPT's `from` and `value`, and what
lies between. Knows no row and no template.
"""

import math
from typing import Any

from llada_core.data.sources import RowError

Message = dict[str, Any]
ROLES = ("system", "user", "assistant", "tool")
_ALIASES = {
    "human": "user", "prompter": "user",
    "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant", "ai": "assistant",
    "bing": "assistant", "bard": "assistant", "claude": "assistant", "llm": "assistant", "chatbot": "assistant",
    "function_call": "assistant", "tool_call": "assistant", "developer": "system",
    "function": "tool", "observation": "tool", "function_response": "tool", "tool_response": "tool", "ipython": "tool",
}  # fmt: skip
_WHO, _WHAT = ("role", "from", "speaker", "author"), ("content", "value", "text", "message")
_TRAINED = ("weight", "train", "loss")  # OpenAI's, axolotl's and ms-swift's word for whether a message is trained on
_FLAGS = {"0": False, "1": True, "false": False, "true": True, "0.0": False, "1.0": True}


def text_from(value: Any, name: str) -> str:
    """What a field says: a number is its text, nothing (also a table's NaN) is empty; raises `RowError` for others."""
    if isinstance(value, str):
        return value
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return str(value)
    if type(value).__name__ == "Decimal":
        return str(value)
    raise RowError(f"no text in {name!r}", f"expected text in {name!r}, got {type(value).__name__} {str(value)[:60]!r}")


def is_plain(message: Any) -> bool:
    """Whether nothing needs to be done to a message."""
    return (
        type(message) is dict
        and len(message) == 2
        and message.get("role") in ROLES
        and type(message.get("content")) is str
    )


def messages_of(entries: Any) -> list[Message]:
    """A list of messages with `role`, `content` and what else was said; raises `RowError` for what is none.

    `train` false marks a message that is not trained on.
    """
    if isinstance(entries, dict):  # {"role": [...], "content": [...]}, as `datasets` writes lists of objects
        columns = {name: value for name, value in entries.items() if isinstance(value, list)}
        if columns and len({len(value) for value in columns.values()}) == 1:
            entries = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        else:
            entries = [entries]
    if not isinstance(entries, list):
        raise RowError(
            "no messages", f"expected a list of messages, got {type(entries).__name__} {str(entries)[:60]!r}"
        )
    return [entry if is_plain(entry) else _message(entry) for entry in entries]


def trains(message: Message) -> bool:
    """Whether a message is a reply that is trained on: an empty one and one marked so are not."""
    return bool(message["role"] == "assistant" and message.get("train", True) and message["content"].strip())


def odd(entries: Any) -> str | None:
    """What is not OpenAI's plainest form in messages, in a word for people; None for nothing."""
    if isinstance(entries, dict) or not isinstance(entries, list):
        return "columns"
    if all(map(is_plain, entries)):
        return None
    keys = {key for entry in entries if isinstance(entry, dict) for key, value in entry.items() if value is not None}
    who, what = (next((name for name in names if name in keys), "?") for names in (_WHO, _WHAT))
    words = "" if (who, what) == ("role", "content") else f"{who} and {what}"
    if any(isinstance(entry.get("content"), list) for entry in entries if isinstance(entry, dict)):
        words += f"{', ' * bool(words)}contents in parts"
    if keys & {"tool_calls", "function_call", "tool_call_id"}:
        words += f"{', ' * bool(words)}tool calls, which the template writes if it knows them and none trains"
    if keys & set(_TRAINED):
        words += f"{', ' * bool(words)}{'/'.join(name for name in _TRAINED if name in keys)} obeyed"
    return words or None


def _message(entry: Any) -> Message:
    if not isinstance(entry, dict):
        raise RowError("no message", f"expected messages with the texts 'role' and 'content', got {str(entry)[:80]!r}")
    who = next((name for name in _WHO if entry.get(name) is not None), None)
    what = next((name for name in _WHAT if name in entry), None)
    calls = any(entry.get(name) for name in ("tool_calls", "function_call"))
    if who is None or (what is None and not calls):
        raise RowError("no message", f"expected messages with the texts 'role' and 'content', got {str(entry)[:80]!r}")
    message: Message = {"role": _role(entry[who]), "content": _content(entry.get(what) if what else None)}
    if not _is_trained(entry):
        message["train"] = False
    handled = {who, what, *_TRAINED}
    return message | {key: value for key, value in entry.items() if key not in handled and value is not None}


def _role(value: Any) -> str:
    name = str(value).strip().lower()
    if name in ROLES:
        return name
    if name not in _ALIASES:
        allowed = ", ".join((*ROLES, "human", "gpt", "model", "bot"))
        raise RowError(
            f"unknown role {str(value)[:40]!r}", f"unknown role {str(value)[:40]!r}; known: {allowed} and others"
        )
    return _ALIASES[name]


def _content(value: Any) -> str:
    if not isinstance(value, list):
        if isinstance(value, dict):
            value = value.get("text", value.get("content", value))
        return text_from(value, "content")
    texts = []
    for part in value:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            kind = part.get("type", "?") if isinstance(part, dict) else type(part).__name__
            raise RowError(f"content with a part that is no text ({kind})")
    return "\n".join(texts)


def _is_trained(entry: dict[str, Any]) -> bool:
    for name in _TRAINED:
        if (value := entry.get(name)) is None:
            continue
        flag = _FLAGS.get(str(value).strip().lower())
        if flag is None:
            raise RowError(f"{name} {value!r} of a message: 0 or 1, false or true")
        if not flag:
            return False
    return True
