"""Files as people bring them, read as UTF-8 text and as JSON, written whole or not at all; the hash of what they hold.

What a file is, its first bytes say, not its name. Lines end at \\n alone: `str.splitlines` would cut at U+2028, U+2029 and
U+0085 too, which JSON allows inside a string.
"""

import bz2
import codecs
import contextlib
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import shutil
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson

IGNORED = frozenset({"__pycache__", ".DS_Store"})
REMEMBERED = 1 << 23  # bytes from which on a hash is kept: a smaller file is read as fast as a note on it
SETTLED = 3_000_000_000  # ns since its last change, so that another one gets another time on any file system
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
    return Path(name.stem).stem if name.suffix.lower() in PACKED else name.stem


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


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content, as 64 hex digits."""
    with path.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


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


def home(root: Path) -> Path:
    """The folder that holds runs/, store/ and mlflow.db: the checkout, also for its workspaces (`LLADAFLOW_HOME`).

    A workspace's is the one above it, wherever both were moved or copied to; the note inside is believed only where it
    leads back to the workspace, as it does when workspaces/ is a link to another disk. Raises ValueError otherwise.
    """
    if given := os.environ.get("LLADAFLOW_HOME"):
        if not Path(given).is_absolute():
            raise ValueError(
                f"LLADAFLOW_HOME={given} counts from a folder that changes; give a whole path, {Path(given).resolve()}"
            )
        return Path(given)
    note, place = root / "workspace.json", root.resolve()
    if not note.exists():
        return place
    noted = Path(read_json(note)["home"])
    back = noted / "workspaces" / place.name
    if back.is_dir() and back.samefile(place):
        return noted
    if place.parent.name != "workspaces":
        raise ValueError(f"{place} is a workspace outside of its project; move it back to {noted / 'workspaces'}")
    return place.parents[1]


def files_in(path: Path) -> list[Path]:
    """Every file below a folder (or the file itself), sorted by name; caches of Python are left out."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(2, "no such file or folder", str(path))
    found = (p for p in path.rglob("*") if p.is_file() and not IGNORED & {*p.parts} and p.suffix != ".pyc")
    return sorted(found, key=lambda p: p.relative_to(path).as_posix())


def content_hash(path: Path) -> str:
    """SHA-256 (64 hex digits) of names and contents below `path`; moving or touching a file changes nothing."""
    files, notes = files_in(path), _notes(Path.cwd())
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        digests = list(pool.map(lambda file: _digest(file, notes), files))
    names = ("" if file == path else file.relative_to(path).as_posix() for file in files)
    return hash_of([[name, value] for name, value in zip(names, digests, strict=True)])


def _notes(start: Path) -> Path | None:
    """Where the project that `start` lies in keeps hashes of large files; None outside of any."""
    if "LLADAFLOW_HOME" in os.environ:
        return home(start) / ".cache" / "hashes"
    project = next((folder for folder in (start, *start.parents) if (folder / ".dvc").is_dir()), None)
    return home(project) / ".cache" / "hashes" if project else None


def _digest(file: Path, notes: Path | None) -> str:
    """SHA-256 of a file's content.

    That of a large file is kept in a file of its own, named by inode, size and time of the last change (ns): hard links,
    such as those in snapshots and in the store, share it, other machines on a shared disk find it, and whoever writes it
    at the same time writes the same. A change in place changes the time; one that came so soon after the last that it
    might not is waited out: such a file is read again.
    """
    with file.open("rb") as stream:
        now, before = time.time_ns(), os.fstat(stream.fileno())
        if notes is None or before.st_size < REMEMBERED:
            return hashlib.file_digest(stream, "sha256").hexdigest()
        note = notes / f"{before.st_ino:x}-{before.st_size:x}-{before.st_mtime_ns:x}"
        with contextlib.suppress(OSError):
            known = note.read_text(encoding="ascii")
            if len(known) == 64:  # less after a power failure
                return known
        found = hashlib.file_digest(stream, "sha256").hexdigest()
        after = os.fstat(stream.fileno())
    unchanged = (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)
    if unchanged and now - before.st_mtime_ns > SETTLED:
        with contextlib.suppress(OSError):  # a full or read-only disk: it is read again next time
            write_text(note, found)
    return found


def hash_of(value: Any) -> str:
    """SHA-256 of a value as canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a file all at once: a reader sees the old text or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """The value in a JSON file; raises `ValueError` that names a damaged file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it and run again") from None
