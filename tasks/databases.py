"""Whether a database answers, told in one line: MLflow and Prefect would fail with a traceback, or try for minutes.

Knows addresses, not what is kept there.
"""

import re
import socket
import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

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
            remedy = "move it away: the next run makes it anew, and registers from store/receipts.jsonl"
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
