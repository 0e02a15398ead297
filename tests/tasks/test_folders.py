"""Content hashes: a large file is read once per content, and a change is never missed."""

import hashlib
import multiprocessing
import os
import shutil
import time
from pathlib import Path

import pytest

from llada_core import files
from tasks import folders
from tasks.folders import content_hash, link_into

OLD = time.time() - 100  # a file that has settled


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory is a project, in which every file counts as a large one."""
    (tmp_path / "project/.dvc").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "project")
    monkeypatch.delenv("LLADAFLOW_HOME", raising=False)
    monkeypatch.setattr(files, "REMEMBERED", 1)
    return tmp_path / "project"


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of files that were read for their hash."""
    real, names = hashlib.file_digest, []

    def counted(stream, digest):
        names.append(Path(stream.name).name)
        return real(stream, digest)

    monkeypatch.setattr(files.hashlib, "file_digest", counted)
    return names


def model(folder: Path, texts: tuple[str, ...] = ("one", "two")) -> Path:
    folder.mkdir(parents=True)
    for number, text in enumerate(texts):
        (folder / f"shard-{number}").write_text(text)
        os.utime(folder / f"shard-{number}", (OLD, OLD))
    return folder


def test_a_large_file_is_read_once_also_by_its_links_and_under_another_name(project: Path, read: list[str]) -> None:
    one = model(project / "models/one")
    first = content_hash(one)
    assert sorted(read) == ["shard-0", "shard-1"]
    link_into(one, project / "store/x")
    (project / "runs/key/tree").mkdir(parents=True)
    link_into(one, project / "runs/key/tree/models/one")
    one.rename(project / "models/two")
    os.chdir(project / "runs/key/tree")  # as a job does
    assert {content_hash(p) for p in (project / "store/x", Path("models/one"), project / "models/two")} == {first}
    assert len(read) == 2


def test_a_workspace_and_a_home_of_its_own_share_what_is_known(
    project: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = model(project / "models/one")
    content_hash(one)
    workspace = project / "workspaces/w"
    (workspace / ".dvc").mkdir(parents=True)
    folders.write_json(workspace / "workspace.json", {"home": str(project)})
    monkeypatch.chdir(workspace)
    content_hash(one)
    monkeypatch.chdir("/")
    monkeypatch.setenv("LLADAFLOW_HOME", str(project))
    content_hash(one)
    assert len(read) == 2
    monkeypatch.delenv("LLADAFLOW_HOME")
    content_hash(one)  # outside of any project nothing is remembered
    assert len(read) == 4


@pytest.mark.parametrize("how", ["in place", "replaced", "cut", "appended"])
def test_a_change_is_seen(project: Path, how: str) -> None:
    one = model(project / "one")
    before, file = content_hash(one), one / "shard-0"
    if how == "in place":
        with file.open("r+") as stream:
            stream.write("O")
    elif how == "replaced":
        (project / "new").write_text("two")
        os.replace(project / "new", file)
    else:
        file.write_text("on" if how == "cut" else "one more")
        os.utime(file, (OLD, OLD))
    assert content_hash(one) != before
    shutil.copytree(one, project / "copy")
    assert content_hash(project / "copy") == content_hash(one)


def test_a_file_that_has_just_changed_is_not_remembered(project: Path) -> None:
    """On a coarse clock two changes may bear one time; the second must not be taken for the first."""
    (project / "file").write_text("one")
    now = time.time_ns()
    os.utime(project / "file", ns=(now, now))
    before = content_hash(project / "file")
    (project / "file").write_text("two")
    os.utime(project / "file", ns=(now, now))
    assert content_hash(project / "file") != before


def test_a_file_that_changes_while_it_is_read_is_not_remembered(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, real = model(project / "one", ("one",)), hashlib.file_digest

    def changing(stream, digest):
        found = real(stream, digest)
        Path(stream.name).write_text("two")
        return found

    with monkeypatch.context() as patched:
        patched.setattr(files.hashlib, "file_digest", changing)
        torn = content_hash(one)
    os.utime(one / "shard-0", (OLD, OLD))
    assert content_hash(one) != torn


def test_torn_notes_and_a_disk_without_room_cost_a_read(project: Path, read: list[str]) -> None:
    one = model(project / "one")
    known = content_hash(one)
    for note in (project / ".cache/hashes").iterdir():
        note.write_text("")
    assert content_hash(one) == known
    assert len(read) == 4
    shutil.rmtree(project / ".cache/hashes")
    (project / ".cache/hashes").write_text("no folder")
    assert content_hash(one) == known


def _hash(folder: Path) -> str:
    return content_hash(folder)


def test_many_who_ask_at_once_get_one_answer(project: Path) -> None:
    one = model(project / "one", tuple("abcdefgh"))
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert len(set(pool.map(_hash, [one] * 16))) == 1
    assert len(list((project / ".cache/hashes").iterdir())) == 8
