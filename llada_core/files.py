"""Text and JSON lines of any origin, read as UTF-8; a file written whole, then renamed."""

import bz2
import codecs
import gzip
import io
import json
import lzma
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson

PACKED = (".gz", ".bz2", ".xz")  # what a packed file's name ends in
_UNPACKERS: dict[bytes, Callable[[Any], Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
_OTHERS = {
    b"PK\x03\x04": "a zip archive or an Office file; unpack it, or save the table as CSV (UTF-8)",
    b"\xd0\xcf\x11\xe0": "an old Office file; save the table as CSV (UTF-8)",
    b"\x28\xb5\x2f\xfd": "packed with zstd; unpack it (zstd -d)",
    b"7z\xbc\xaf": "a 7z archive; unpack it",
    b"%PDF": "a PDF; extract its text first",
    b"PAR1": "a Parquet table; let its name end in .parquet",
    b"ARROW1": "an Arrow file; save it as Parquet",
    b"SQLite": "a database; export its table as CSV",
    b"version https://git-lfs": "a pointer of Git LFS and not the file; fetch it (git lfs pull)",
}
# The marks of UTF-32 first: that of UTF-16 is how one of them begins.
_WIDE = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


class FileError(ValueError):
    """A file is not what its place asks for; one line that names the file and, where there is one, the line."""


def lines(path: Path) -> Iterator[bytes]:
    """The lines of a file as UTF-8, each with the \\n that ends it; nothing else ends a line.

    They are decoded only where a wide encoding had to be: `text_of` says what is no UTF-8. Raises `FileError` for what is
    no text file, and for one that is packed and cut off.
    """
    with path.open("rb") as file:
        wide = None
        try:
            stream = _unpacked(file, path)
            head = stream.peek(8)
            wide = next((name for mark, name in _WIDE.items() if head.startswith(mark)), None)
            if wide is not None:
                yield from (line.encode() for line in io.TextIOWrapper(stream, wide, newline="\n"))
                return
            first = stream.readline()
            if text := first.removeprefix(codecs.BOM_UTF8):
                yield text
            yield from stream
        except UnicodeDecodeError as error:
            raise FileError(f"{path}: begins as {wide} but is not ({error.reason}); save it as UTF-8 text") from None
        except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise FileError(f"{path}: cannot be unpacked ({error}); is the file cut off?") from None


def whole(path: Path) -> str:
    """All text of a file; raises `FileError` with the first line that is no UTF-8."""
    return text_of(b"".join(lines(path)), str(path))


def text_of(data: bytes, where: str) -> str:
    """Bytes as text; raises `FileError` that says where they are no UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = "" if ", line" in where else f", line {data[: error.start].count(10) + 1}"
        raise FileError(f"{where}{line}: byte {error.start} is not UTF-8; save the file as UTF-8 text") from None


def stem(path: str | Path) -> str:
    """A file's name without what says how it is packed and written: train of train.jsonl.gz."""
    name = Path(path)
    return Path(name.stem).stem if name.suffix in PACKED else name.stem


def suffix(path: str | Path) -> str:
    """What says how a file is written, packed or not: .jsonl of train.jsonl.gz."""
    name = Path(path)
    return (Path(name.stem).suffix if name.suffix.lower() in PACKED else name.suffix).lower()


def _unpacked(file: io.BufferedReader, path: Path) -> "io.BufferedReader[Any]":
    head = file.peek(32)
    for magic, remedy in _OTHERS.items():
        if head.startswith(magic):
            raise FileError(f"{path}: {remedy}")
    for magic, unpacked in _UNPACKERS.items():
        if head.startswith(magic):
            return io.BufferedReader(unpacked(file))
    return file


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


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """An empty folder to write into, which becomes `folder` if all went well; what was there stays until then."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield staging
        staging.chmod(0o755)
        _replace(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _replace(staging: Path, folder: Path) -> None:
    if not folder.exists():
        staging.rename(folder)
        return
    old = staging.with_name(staging.name + ".old")
    folder.rename(old)
    staging.rename(folder)
    shutil.rmtree(old)
