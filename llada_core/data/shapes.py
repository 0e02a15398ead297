"""Messages and rows as people write them, made what a training stage needs, or why they cannot be.

Fine-tuning needs {messages}, preference {prompt, chosen, rejected}, GRPO {prompt, task, answer}, pretraining {text}. A
row in another usual shape is mapped, and its shape is told, so that a wrong guess is seen.
"""

import math
from collections.abc import Mapping
from typing import Any

import orjson

from llada_core.data.sources import Row, RowError

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


# Each gives a row of whatever shape as rows of one format are, and what was recognised in it (None where nothing had to
# be done); it raises `RowError` for a row that it cannot use.


def document(row: Row) -> tuple[Row, str | None]:
    """A row with `text`, which its encoder looks at."""
    return row, None


def prompt(row: Row) -> tuple[Row, str | None]:
    """A row with `prompt`, `task` and `answer`; a prompt that is a dialogue becomes messages.

    One without a task is a question with its answer, or a dialogue whose last reply is the answer, compared as text.
    """
    if "task" not in row:
        said, shape = _messages_in(row) or _asked_and_answered(row)
        if len(said) < 2 or not trains(said[-1]):
            raise RowError("no answer", "the last message is no reply, so there is no answer to compare with")
        answer = {"answer": said[-1]["content"]}
        return {
            "prompt": said[:-1],
            "task": "text",
            "answer": answer,
        }, f"{shape or 'messages'} with the last reply as answer"
    if isinstance(row.get("prompt"), str | None):
        return row, None
    return row | {"prompt": messages_of(row["prompt"])}, None


def dialogue(row: Row) -> tuple[Row, str | None]:
    """A row with `messages`, one of which is a reply that is trained on."""
    messages, shape = _messages_in(row) or _asked_and_answered(row)
    if not any(map(trains, messages[1:])):
        raise RowError("no answer", "no reply in it is trained on: each is empty, or marked so, or answers nothing")
    return {"messages": messages}, shape


def _messages_in(row: Row) -> tuple[list[Message], str | None] | None:
    """The messages that a row holds as a list, and in which shape; None where it holds none."""
    for name in _DIALOGUES:
        entries = _unpacked(row.get(name))
        if isinstance(entries, list | dict) and entries:
            said, unusual = messages_of(entries), odd(entries)
            whole = _with_system(row, said)
            plain = name == "messages" and unusual is None and whole is said
            tools = ["tools left out"] if row.get("tools") else []
            system = ["a system prompt of its own"] if whole is not said else []
            notes = ", ".join([*filter(None, [unusual]), *system, *tools])
            kind = "ShareGPT" if unusual and unusual.startswith("from and value") else name
            return whole, None if plain and not tools else f"{kind} ({notes})" if notes else kind
    return None


def _asked_and_answered(row: Row) -> tuple[list[Message], str]:
    """A question and its answer in fields of their own as messages, and which fields; raises `RowError` without."""
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
        return _with_system(row, said), "/".join(filter(None, [asked, context, reply]))
    raise RowError(
        f"no shape that is known: {_fields(row)}",
        "expected a list of messages in the field 'messages', or instruction and output, prompt and completion, question"
        f" and answer; the row has the fields {_fields(row)}; {_own_map(row)}"
        + (", or let it be read as documents (data.pretrain)" if "text" in row else ""),
    )


def _own_map(row: Row) -> str:
    """A map function for this row, to be copied."""
    asked, answered = [*row, "QUESTION", "ANSWER"][:2] if len(row) > 1 else ("QUESTION", "ANSWER")
    turns = f'{{"role": "user", "content": r[{asked!r}]}}, {{"role": "assistant", "content": r[{answered!r}]}}'
    return f'give the source `map: ./my_maps.py:turns`, with my_maps.py: def turns(r): return {{"messages": [{turns}]}}'


def pair(row: Row) -> tuple[Row, str | None]:
    """A row with `prompt` and the replies `chosen` and `rejected`."""
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
    return {"prompt": asked, **replies}, shape


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
