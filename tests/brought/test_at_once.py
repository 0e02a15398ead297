"""Two of everything at once, and records that follow a project: nothing is lost, doubled or locked.

A new case of what two processes may do at once is a line of TWICE: a name, and what each of them runs.
"""

import json
import multiprocessing
import os
import shutil
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from llada_core.evaluation.answering import AnswerStore
from tasks import folders
from tasks import folders as databases
from tasks.folders import NoDatabaseError, content_hash, link_into, require, sqlite_uri
from tasks.project import Project
from tasks.record.registry import PLACES, keep, open_records
from tests.brought.test_folders import made

ROUNDS = 15
# Not forks of this process: where a test has run a flow here before, Prefect's services end a fork with 1, silently,
# whatever it did (their `_at_exit` asserts an event that their `reset_for_fork` has removed).
FRESH = multiprocessing.get_context("forkserver")
FRESH.set_forkserver_preload([__name__])


def _replace(root: Path) -> None:
    for number in range(ROUNDS):
        source = root / f"source-{multiprocessing.current_process().pid}-{number}"
        source.mkdir()
        (source / "weights").write_text("whole")
        link_into(source, root / "models/sft")


def _keep(root: Path) -> None:
    for _ in range(ROUNDS):
        keep(Project.at(root), root / "model")


def _answer(root: Path) -> None:
    for number in range(ROUNDS):
        store = AnswerStore(root / "runs/answers-0/toy/b1")
        store.add([f"k{number}"], [{"text": "x" * 20_000}], 1.0)


def _workspace(root: Path) -> None:
    from tasks.launch.workspace import open_workspace

    open_workspace(Project.at(root), overrides=["seed=2"])


def _whole_model(root: Path) -> None:
    assert [p.read_text() for p in (root / "models/sft").iterdir()] == ["whole"]
    assert not list((root / "models").glob(".sft*"))


def _kept_once(root: Path) -> None:
    digest = content_hash(root / "model")
    assert [p.name for p in (root / "store").iterdir()] == [digest]
    assert content_hash(root / "store" / digest) == digest


def _all_answers(root: Path) -> None:
    [file] = (root / "runs/answers-0/toy/b1").iterdir()
    assert len([json.loads(line) for line in file.read_text().splitlines()]) == 3 * ROUNDS
    assert all(f"k{number}" in AnswerStore(file.parent) for number in range(ROUNDS))


def _one_workspace(root: Path) -> None:
    assert len(list(root.glob("workspaces/*/workspace.json"))) == 1


TWICE: tuple[tuple[Callable[[Path], None], Callable[[Path], None]], ...] = (
    (_replace, _whole_model),
    (_keep, _kept_once),
    (_answer, _all_answers),
    (_workspace, _one_workspace),
)


def _inside(root: Path, work: Callable[[Path], None]) -> None:
    os.chdir(root)
    work(root)


@pytest.mark.parametrize(("work", "check"), TWICE, ids=lambda function: function.__name__.strip("_"))
def test_two_at_once(tmp_path: Path, work: Callable[[Path], None], check: Callable[[Path], None]) -> None:
    root = made(tmp_path / "project")
    (root / "model").mkdir()
    (root / "model/weights").write_text("whole")
    processes = [FRESH.Process(target=_inside, args=(root, work)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    check(root)


def test_a_folder_that_another_process_has_just_put_there_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new/weights").write_text("ours")
    real, faster = folders.os.replace, []

    def replace(source: Path, target: Path) -> None:
        if target.name == "target" and not faster:
            faster.append(target)
            target.mkdir()
            (target / "weights").write_text("theirs")
        real(source, target)

    monkeypatch.setattr(folders.os, "replace", replace)
    link_into(tmp_path / "new", tmp_path / "target")
    assert (tmp_path / "target/weights").read_text() == "ours"


def test_a_database_in_use_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert databases.PATIENCE >= 60
    file = tmp_path / "mlflow.db"
    writer = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
    for begin in ("begin immediate", "begin exclusive"):
        writer.execute(begin)
        monkeypatch.setattr(databases, "PATIENCE", 0.01)
        with pytest.raises(NoDatabaseError, match="is locked; another program is writing"):
            require("MLflow", sqlite_uri(file), "MLFLOW_TRACKING_URI")
        monkeypatch.setattr(databases, "PATIENCE", 60)
        waiter = threading.Thread(target=require, args=("MLflow", sqlite_uri(file), "MLFLOW_TRACKING_URI"))
        waiter.start()
        writer.execute("commit")
        waiter.join(timeout=60)
        assert not waiter.is_alive()
    writer.close()


def test_who_may_only_read_waits_for_nobody(tmp_path: Path) -> None:
    file = tmp_path / "mlflow.db"
    with closing(sqlite3.connect(file)) as database:
        database.execute("create table t (x)")
    file.chmod(0o444)
    require("MLflow", sqlite_uri(file), "MLFLOW_TRACKING_URI")


def records(home: Path, location: str) -> Path:
    """The columns of MLflow's tables that hold places, one row each below `location`."""
    with closing(sqlite3.connect(home / "mlflow.db", isolation_level=None)) as database:
        for table in sorted({table for table, _ in PLACES}):
            columns = [column for name, column in PLACES if name == table]
            database.execute(f"create table {table} ({', '.join(columns)})")
            values = [location if table == "experiments" else f"{location}/1/artifacts"] * len(columns)
            database.execute(f"insert into {table} values ({', '.join('?' * len(columns))})", values)
            database.execute(f"insert into {table} ({columns[0]}) values ('models:/m-1'), (null)")
    return home / "mlflow.db"


def places(file: Path) -> set[str]:
    with closing(sqlite3.connect(file)) as database:
        return {row[0] for table, column in PLACES for row in database.execute(f"select {column} from {table}")}


@pytest.mark.parametrize("how", [shutil.copytree, shutil.move])
@pytest.mark.parametrize("name", ["plain", "run #2", "50%_one", "Grüße"])
def test_mlflows_records_follow_their_project(tmp_path: Path, name: str, how: Callable[..., str]) -> None:
    first = tmp_path / name
    (first / "mlartifacts").mkdir(parents=True)
    location = (first / "mlartifacts").as_uri()
    file = records(first, location)
    open_records(file, first)
    assert {p for p in places(file) if p and p.startswith("file:")} == {location, f"{location}/1/artifacts"}
    moved = Path(how(first, tmp_path / f"{name}-2"))
    open_records(moved / "mlflow.db", moved)
    now = (moved / "mlartifacts").as_uri()
    assert places(moved / "mlflow.db") == {now, f"{now}/1/artifacts", "models:/m-1", None}
    if first.exists():
        open_records(file, first)
        assert location in places(file)


@pytest.mark.parametrize("kind", ["another name of the same folder", "a folder that somebody chose", "a server's"])
def test_other_places_of_artifacts_stay(tmp_path: Path, kind: str) -> None:
    home, other = tmp_path / "home", tmp_path / "other"
    (home / "mlartifacts").mkdir(parents=True)
    location = (other / "mlartifacts").as_uri()
    if kind.startswith("another"):
        other.symlink_to(home)
    elif kind.startswith("a folder"):
        (other / "mlartifacts").mkdir(parents=True)
    else:
        location = "mlflow-artifacts:/1"
    file = records(home, location)
    open_records(file, home)
    assert location in places(file)


def _client(root: Path) -> None:
    from tasks.record.registry import client

    client(Project.at(root)).search_registered_models()


@pytest.mark.faults
def test_tables_that_two_make_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    processes = [multiprocessing.get_context("spawn").Process(target=_client, args=(tmp_path,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
