"""Folders, files and checkouts as values: their hash, links, commit; databases that answer."""

import contextlib
import errno
import itertools
import json
import os
import re
import shutil
import socket
import sqlite3
import subprocess
import tempfile
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from llada_core.files import content_hash as content_hash  # versions registered earlier look for it here
from llada_core.files import files_in as files_in
from llada_core.files import hash_of as hash_of
from llada_core.files import home as home
from llada_core.files import read_json as read_json
from llada_core.files import write_text as write_text
from llada_core.settings import ConfigError

SECONDS = 5.0  # for a server to answer
PATIENCE = 60.0  # seconds for a lock to be given up: others that write need milliseconds, a laptop that slept more
SQLITE = re.compile(r"sqlite(?:\+\w+)?:///([^?]*)")


class NoDatabaseError(OSError):
    """A database or server does not answer."""


def sqlite_uri(file: Path) -> str:
    """The address of a SQLite file, whatever its folder is called."""
    quoted = quote(str(file))
    if quoted == str(file):
        return f"sqlite:///{file}"
    # SQLAlchemy takes %20 for a space; MLflow does not where it sees sqlite:/// and makes a folder beside the right one
    return f"sqlite+pysqlite:///{quoted}"


def sqlite_file(uri: str) -> Path | None:
    """The file behind the address of a SQLite database; None for any other address, or a database in memory."""
    match = SQLITE.match(uri)
    return Path(unquote(match[1])) if match and match[1] not in ("", ":memory:") else None


def require(what: str, uri: str, setting: str) -> None:
    """Wait for the database at `uri` to be free; raises `NoDatabaseError` with the remedy when it stays locked, is
    damaged or gone."""
    place, path = urlsplit(uri), sqlite_file(uri)
    try:
        if place.scheme.startswith("postgresql") and place.hostname:
            socket.create_connection((place.hostname, place.port or 5432), SECONDS).close()
        elif path is not None and path.exists():
            _await_turn(path)
    except (OSError, sqlite3.Error) as error:
        remedy = f"start it, or point {setting} elsewhere"
        if "locked" in str(error):
            remedy = f"another program is writing; try again, or use PostgreSQL ({setting}=postgresql://...)"
        elif isinstance(error, sqlite3.DatabaseError):
            remedy = "move it away: `llada restore` makes it anew from store/receipts.jsonl and the run folders"
        raise NoDatabaseError(f"{what} keeps its records in {shown(uri)}: {error}; {remedy}") from None


def _await_turn(path: Path) -> None:
    """Return once nobody else is writing: whoever begins now has the patience of MLflow or Prefect still before it."""
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=PATIENCE)) as database:
        database.execute("select 1 from sqlite_master limit 1").fetchall()
    with closing(sqlite3.connect(path, timeout=PATIENCE, isolation_level=None)) as database:
        try:
            database.execute("begin immediate")
            database.execute("rollback")
        except sqlite3.OperationalError as error:
            if "readonly" not in str(error):  # who may only read waits for nobody
                raise


def shown(uri: str) -> str:
    """An address without its password."""
    return re.sub(r"(://[^:/@]+):[^@]*@", r"\1:***@", uri)


def write_json(path: Path, value: Any) -> None:
    """Write JSON with sorted keys, all at once."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


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


LEFT_OUT = ("data", "models", "runs", "store", "workspaces", "mlartifacts", "mlruns", "build", "dist", "__pycache__")
WHO = {f"GIT_{role}_{what}": "lladaflow" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
HERE = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_OBJECT_DIRECTORY", "GIT_PREFIX")


def has_git(root: Path) -> bool:
    """Whether `root` is a checkout of its own, and git is there to ask."""
    return (root / ".git").exists() and shutil.which("git") is not None


def commit_of(root: Path) -> str:
    """The commit that a checkout is at, `+changes` if tracked files differ from it; "no git" outside of git."""
    if shutil.which("git") is None:
        return "no git"
    done = _run(root, "rev-parse", "HEAD")
    commit = done.stdout.strip()
    if done.returncode:
        return "no git"
    return commit + ("+changes" if _run(root, "status", "--porcelain", "-uno").stdout.strip() else "")


def submitted(root: Path) -> tuple[str | None, str]:
    """What was submitted: a commit that holds the tracked files as they are now, and the hash of its content.

    The commit is the present one where nothing differs, else one that no branch has. None without git: then the hash is
    that of the files.
    """
    if not has_git(root):
        files = [file for file in copied(root) if file.suffix in (".py", ".yaml", ".jinja", ".json")]
        return None, hash_of([[str(file.relative_to(root)), content_hash(file)] for file in files])
    _refuse_copied(root)
    index = Path(git(root, "rev-parse", "--absolute-git-dir")) / f"lladaflow-index.{os.getpid()}"
    try:  # an index of its own: the person's keeps what it has staged
        if (theirs := index.with_name("index")).exists():
            shutil.copyfile(theirs, index)
        git(root, "add", "--update", ".", index=index)
        tree = git(root, "write-tree", index=index)
    finally:
        index.unlink(missing_ok=True)
    head = _run(root, "rev-parse", "--verify", "--quiet", "HEAD").stdout.strip()
    if head and git(root, "rev-parse", f"{head}^{{tree}}") == tree:
        return head, tree
    parent = ["-p", head] if head else []
    return git(root, "commit-tree", tree, *parent, "-m", "as submitted"), tree


def add_worktree(root: Path, place: Path, commit: str) -> None:
    """Put the files of a commit into a new worktree at `place`; what a making that was cut short left there goes."""
    shutil.rmtree(place, ignore_errors=True)
    prune_worktrees(root, place.parent)
    git(root, "worktree", "add", "--quiet", "--force", "--force", "--detach", str(place), commit)
    mend_worktree(root, place)


def prune_worktrees(root: Path, workspaces: Path) -> None:
    """Let git forget worktrees whose folder is gone; those that only moved are mended first, or it would forget them."""
    for file in workspaces.glob("*/.git"):
        with contextlib.suppress(ConfigError, OSError):
            mend_worktree(root, file.parent)
    git(root, "worktree", "prune")


def mend_worktree(root: Path, place: Path) -> None:
    """Let a worktree and its repository find one another where they lie now; neither touches what they were copied from.

    Git notes both as whole paths. The worktree's own note becomes a relative one, which a later move leaves true; the
    repository's is what `git worktree prune` goes by. Raises `ConfigError` where the repository has lost the worktree.
    """
    if not has_git(root):
        raise ConfigError(
            f"{place} is a worktree of git, and {root} has no git any more; remove the folder and run again"
        )
    name = Path((place / ".git").read_text(encoding="utf-8").partition(":")[2].strip()).name
    common = root / git(root, "rev-parse", "--git-common-dir")
    admin = common.resolve() / "worktrees" / name
    if not (admin / "gitdir").exists():
        raise ConfigError(f"git does not know {place} any more; remove the folder and run again")
    back, there = f"{place.resolve() / '.git'}\n", f"gitdir: {os.path.relpath(admin, place.resolve())}\n"
    for file, text in ((admin / "gitdir", back), (place / ".git", there)):
        if file.read_text(encoding="utf-8") != text:
            write_text(file, text)


def _refuse_copied(root: Path) -> None:
    """Raises `ConfigError` for a copy of a worktree: git takes it for the original, whose repository it would change."""
    file = root / ".git"
    if not file.is_file():
        return
    note = root / file.read_text(encoding="utf-8").partition(":")[2].strip() / "gitdir"
    original = (
        Path(note.read_text(encoding="utf-8").strip()) if note.is_file() else file
    )  # a submodule has no such note
    if original.exists() and not original.samefile(file):
        ways = "remove its file .git to run without git, or make one with `git worktree add` or `git clone`"
        raise ConfigError(f"{root} is a copy of the git worktree {original.parent}; {ways}")


def copied(root: Path) -> list[Path]:
    """The files of a checkout without git that are its own: nothing hidden but .dvc's settings, nothing made."""
    hidden = [root / ".dvcignore", root / ".dvc" / "config"]
    entries = [p for p in sorted(root.iterdir()) if p.name not in LEFT_OUT and not p.name.startswith(".")]
    return [file for entry in [*hidden, *entries] if entry.exists() for file in files_in(entry)]


def git(root: Path, *arguments: str, index: Path | None = None) -> str:
    """What a git command prints; raises `ConfigError` with git's own words."""
    done = _run(root, *arguments, index=index)
    if done.returncode:
        moved = "not a git repository" in done.stderr and (root / ".git").is_file()
        remedy = f"; after a move `git worktree repair '{root}'`, in the repository, finds it again" if moved else ""
        raise ConfigError(f"git {' '.join(arguments[:2])}: {' '.join(done.stderr.split())}{remedy}")
    return done.stdout.strip()


def _run(root: Path, *arguments: str, index: Path | None = None) -> subprocess.CompletedProcess[str]:
    surroundings = {key: value for key, value in os.environ.items() if key not in HERE} | WHO
    own = {"GIT_INDEX_FILE": str(index)} if index else {}
    command = ["git", "-c", "core.hooksPath=/dev/null", "-c", "core.fsmonitor=false", *arguments]
    return subprocess.run(command, cwd=root, env=surroundings | own, capture_output=True, text=True, check=False)
