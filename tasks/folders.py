"""Folders as values: their content hash, hard-linked copies of them, and files written all at once.

Large files are read for their hash once and then known by what the file system says of them. Knows where a project keeps
what it makes; knows nothing of stages, runs or models.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

IGNORED = frozenset({"__pycache__", ".DS_Store"})
REMEMBERED = 1 << 23  # bytes from which on a hash is kept: a smaller file is read as fast as a note on it
SETTLED = 3_000_000_000  # ns since its last change, so that another one gets another time on any file system


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


def write_json(path: Path, value: Any) -> None:
    """Write JSON with sorted keys, all at once."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


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


def link_into(source: Path, target: Path) -> None:
    """Put `source` (file or folder) at `target`, hard-linked where the file system allows it, else copied.

    What was at `target` is replaced only when the new content is complete. Nothing here is ever changed in place, so a
    link is as good as a copy and costs nothing.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.")) / "new"
    try:
        for file in files_in(source):
            place = fresh if file == source else fresh / file.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            _link(file, place)
        fresh.mkdir(exist_ok=True) if source.is_dir() else None
        _put(fresh, target)
    finally:
        shutil.rmtree(fresh.parent, ignore_errors=True)


def _put(fresh: Path, target: Path) -> None:
    """Move `fresh` to `target`; what is there moves beside `fresh` first, as often as another process puts it there."""
    for number in itertools.count():
        if target.is_dir() and not target.is_symlink():
            with contextlib.suppress(FileNotFoundError):
                os.replace(target, fresh.with_name(f"old-{number}"))
        try:
            os.replace(fresh, target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EISDIR):
                raise
        else:
            return


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)


def size_of(paths: Iterable[Path]) -> int:
    """Bytes on disk below `paths`; a file that has several links counts once."""
    seen: dict[tuple[int, int], int] = {}
    for path in paths:
        for file in files_in(path) if path.exists() else []:
            stat = file.stat()
            seen[stat.st_dev, stat.st_ino] = stat.st_size
    return sum(seen.values())


def safe(model: str) -> str:
    """A model's name as a file's name."""
    return model.strip("/").replace("models:/", "").replace("/", "__").replace("@", "-at-")
