"""JSON lines: one value a line. The one way in which this project reads and writes them.

Lines end at \\n alone. `str.splitlines` would cut at U+2028, U+2029 and U+0085 too, which JSON allows inside a string: one
such character in a reply, and the file could not be read again. Knows no file's meaning.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from llada_core.text_files import FileError, lines, text_of, whole

# What others take for the end of a line, and halves of a character, which have no UTF-8; JSON has an escape for each.
_RISKY = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def line_of(value: Any) -> str:
    """A value as its line, keys in order; whatever its texts hold, it is one line for every reader, and encodes."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return _RISKY.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n"


def read(path: Path) -> Iterator[Any]:
    """The values of a file, oldest first; blank lines are none.

    Raises `FileError` with file and line for one that is no JSON, FileNotFoundError without a file.
    """
    for _, value in numbered(path):
        yield value


def numbered(path: Path) -> Iterator[tuple[int, Any]]:
    """`read`, with the number of each value's line, from 1."""
    for number, line in enumerate(lines(path), 1):
        if line.strip():
            yield number, parsed(line, f"{path}, line {number}")


def complete(data: bytes) -> list[bytes]:
    """The lines of a file that is being written: those that have their \\n, without it."""
    return data.split(b"\n")[:-1]


def parsed(line: bytes, where: str) -> Any:
    """The value of one line; raises `FileError` that says what is wrong with it and what helps."""
    try:
        return orjson.loads(line)
    except ValueError:  # the standard library reads NaN and halves of characters, and says what is wrong
        text = text_of(line, where).removeprefix("\ufeff").strip()
    return value_of(text, where)


def document(path: Path) -> Any:
    """The value of a file that is one JSON text; raises `FileError` that names it."""
    try:
        return orjson.loads(path.read_bytes())
    except ValueError:
        return value_of(whole(path), str(path))


def value_of(text: str, where: str) -> Any:
    """The value of a JSON text; raises `FileError` that says what is wrong with it and what helps."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise FileError(f"{where}: not valid JSON ({_place(error)}); {_remedy(text, error)}") from None
    except RecursionError:
        raise FileError(f"{where}: not valid JSON (nested too deep); is it data at all?") from None


def _place(error: json.JSONDecodeError) -> str:
    return f"{error.msg}, {f'line {error.lineno}, ' if error.lineno > 1 else ''}column {error.colno}"


def _remedy(text: str, error: json.JSONDecodeError) -> str:
    if error.msg.startswith("Extra data"):
        rest = text[error.pos :].lstrip()
        if rest.startswith(","):
            return "lines of JSON stand without a comma between them; take it away"
        return "one value a line: end each with a newline (\\n)" if rest[:1] in ("{", "[") else "mend this line"
    if error.msg.startswith("Unterminated string") or error.pos >= len(text.rstrip()):
        return "is the file cut off?"
    if text[error.pos : error.pos + 1] == "'" or re.match(r"(None|True|False)\b", text[error.pos :]):
        return "it is written as Python prints it; write it with json.dumps"
    if "Invalid control character" in error.msg:
        return "a line break or tab inside a string is written \\n or \\t"
    return "mend it there"
