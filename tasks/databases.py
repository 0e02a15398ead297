"""Whether a database answers, told at once and in one line: MLflow and Prefect would try for minutes.

Knows addresses, not what is kept there.
"""

import re
import socket
import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

SECONDS = 5.0


class NoDatabaseError(OSError):
    """A database or server does not answer."""


def require(what: str, uri: str, setting: str) -> None:
    """Raises `NoDatabaseError` with the remedy when the database at `uri` is locked, damaged or gone."""
    place = urlsplit(uri)
    try:
        if place.scheme.startswith("postgresql") and place.hostname:
            socket.create_connection((place.hostname, place.port or 5432), SECONDS).close()
        elif place.scheme.startswith("sqlite") and (path := Path(place.path[1:])).exists():
            with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=SECONDS)) as database:
                database.execute("select 1 from sqlite_master limit 1").fetchall()
    except (OSError, sqlite3.Error) as error:
        remedy = f"start it, or point {setting} elsewhere"
        if "locked" in str(error):
            remedy = f"another program is writing; try again, or use PostgreSQL ({setting}=postgresql://...)"
        elif isinstance(error, sqlite3.DatabaseError):
            remedy = "move it away: the next run makes it anew, and registers from store/receipts.jsonl"
        raise NoDatabaseError(f"{what} keeps its records in {shown(uri)}: {error}; {remedy}") from None


def shown(uri: str) -> str:
    """An address without its password."""
    return re.sub(r"(://[^:/@]+):[^@]*@", r"\1:***@", uri)
