"""MLflow's records in a file of this project: made by one process at a time, and true again after a move.

MLflow notes where artifacts lie as whole paths. A project that was moved, copied or mounted elsewhere would read and
write those of the old place; they are told anew when the records are opened. Knows MLflow's tables, not what is logged.
"""

import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote

from filelock import FileLock

from tasks.folders import PATIENCE

MAKING = 600.0  # seconds that another process may take to make the tables
PLACES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


def artifacts(home: Path) -> Path:
    """Where files of runs and notes of registered models lie."""
    return home / "mlartifacts"


def lock_of(home: Path) -> Path:
    """What whoever finds out that something is missing holds while it is made."""
    return home / "mlflow.db.lock"


def open_records(file: Path, home: Path) -> None:
    """See that the tables are there (two processes that make them at once fail), and that their places are `home`'s."""
    if not _made(file):
        from mlflow.tracking import MlflowClient

        with FileLock(lock_of(file.parent), timeout=MAKING):
            if not _made(file):
                MlflowClient().search_registered_models(max_results=1)
                MlflowClient().search_experiments(max_results=1)
    if file.parent == home:
        _tell_places_anew(file, home)


def _made(file: Path) -> bool:
    """Whether MLflow has finished making the tables: the first experiment comes last."""
    if not file.exists():
        return False
    with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True, timeout=PATIENCE)) as database:
        try:
            return bool(database.execute("select 1 from experiments limit 1").fetchall())
        except sqlite3.OperationalError:
            return False


def _tell_places_anew(file: Path, home: Path) -> None:
    now = artifacts(home.resolve()).as_uri()
    with closing(sqlite3.connect(file, timeout=PATIENCE, isolation_level=None)) as database:
        known = database.execute("select distinct artifact_location from experiments").fetchall()
        moved = [old for (old,) in known if old and old != now and _is_elsewhere(old, home)]
        if not moved:
            return
        database.execute("begin immediate")
        for old in moved:
            for table, column in PLACES:
                database.execute(
                    f"update {table} set {column} = ? || substr({column}, ?) where {column} = ? or {column} like ? escape '!'",
                    (now, len(old) + 1, old, _escaped(old) + "/%"),
                )
        database.execute("commit")
    print(f"{home} was moved or copied: MLflow's records now name it and not {unquote(moved[0])}", flush=True)


def _is_elsewhere(location: str, home: Path) -> bool:
    """Whether a location is this project's artifacts where they lay before.

    Another name of the same folder is not, nor is a folder that somebody chose: there is no mlflow.db beside it.
    """
    before, here = Path(unquote(location.removeprefix("file://"))), artifacts(home)
    if not location.startswith("file:///") or before.name != here.name:
        return False
    if not before.exists():
        return True
    return (before.parent / "mlflow.db").exists() and not (here.exists() and before.samefile(here))


def _escaped(text: str) -> str:
    return "".join(f"!{c}" if c in "!%_" else c for c in text)
