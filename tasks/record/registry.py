"""MLflow's records opened; names to verified folders; the store, receipts and aliases."""

import json
import os
import re
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from filelock import FileLock

from llada_core.files import document, line_of, read
from llada_core.modeling.folder import (
    ADAPTER_CONFIG,
    CONTENT,
    base_folder,
    base_name,
    base_of,
    is_adapter,
    model_folders,
)
from llada_core.settings import ConfigError
from tasks.folders import (
    PATIENCE,
    content_hash,
    files_in,
    link_into,
    read_json,
    require,
    sqlite_file,
    write_json,
)
from tasks.project import Params, Project

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient


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


# A repository's snapshot in the Hub's cache. Its folder is somewhere else on every machine, its name and commit are not.
CACHED = re.compile(r"/models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]{40})/?$")
NAME = r"[A-Za-z0-9][\w.-]*"
REFERENCE = re.compile(rf"models:/({NAME})(?:@([\w.-]+)|/(\d+))|({NAME})@([\w.-]+)")


@dataclass(frozen=True)
class Version:
    """One registered version of a model."""

    name: str
    number: str
    hash: str
    tags: dict[str, str] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()


def named(text: str) -> tuple[str, str] | None:
    """Model and alias or number of `models:/NAME@alias`, `models:/NAME/3`, `NAME@alias`; None for any other text."""
    match = REFERENCE.fullmatch(text)
    return (match[1] or match[4], match[2] or match[3] or match[5]) if match else None


def resolve(name: str, project: Project | None = None) -> Path:
    """The local folder of a model. Raises `ConfigError` when there is none, or when registered weights were altered."""
    project = project or Project.at()
    folder = project.root / Path(name).expanduser()
    if folder.is_dir():
        hold_base(project, folder)
        return folder.resolve()
    if reference := named(name):
        return verified(project, version_of(project, *reference).hash)
    if name.startswith((".", "/", "~", "models:")) or name.count("/") != 1:
        ways = "give a folder, models:/NAME@alias, or a Hub name such as GSAI-ML/LLaDA-8B-Base"
        raise ConfigError(f"there is no model {name!r}; {ways}")
    return _from_hub(name)


def champion_of(project: Project) -> str:
    """The name of the champion that the project's params.yaml registers; raises `ConfigError` if it registers none."""
    path = project.root / "params.yaml"
    params = Params.load(path) if path.exists() else None
    if params is None or params.register_ is None:
        what = "is not here" if params is None else "registers no model"
        raise ConfigError(f"{path}, which names the champion, {what}; say which model with --model")
    return f"models:/{params.register_.name}@champion"


def version_of(project: Project, name: str, which: str) -> Version:
    """The version with an alias or number; raises `ConfigError` that lists what there is."""
    known = versions(project, name)
    if not known and is_lost(project, name):
        kept = project.store / "receipts.jsonl"
        raise ConfigError(f"the registry has lost model {name!r}; `llada restore` registers it anew from {kept}")
    if not known:
        raise ConfigError(f"no model {name!r} is registered; `make run` trains and registers one")
    for version in known:
        if which == version.number or which in version.aliases:
            return version
    listed = ", ".join(f"{v.number}{''.join(f' @{a}' for a in v.aliases)}" for v in known)
    raise ConfigError(f"model {name!r} has no version {which!r}; it has: {listed}")


def is_lost(project: Project, name: str) -> bool:
    """Whether receipts tell of versions of a model, and MLflow knows none."""
    return any(receipt["name"] == name for receipt in receipts(project)) and not versions(project, name)


def versions(project: Project, name: str) -> list[Version]:
    """All versions of a model that MLflow knows, oldest first."""
    if not re.fullmatch(NAME, name):
        raise ConfigError(f"{name!r} is no name of a model; use letters, digits, dots, dashes and underscores")
    if (stored := _stored_versions(project, name)) is not None:
        return stored
    talk = client(project)
    found = talk.search_model_versions(f"name='{name}'", max_results=1000)
    aliases: dict[str, list[str]] = {}
    if found:
        for alias, number in talk.get_registered_model(name).aliases.items():
            aliases.setdefault(str(number), []).append(alias)
    ours = [entry for entry in found if "content_hash" in entry.tags]
    result = [
        Version(
            name, str(e.version), e.tags["content_hash"], dict(e.tags), tuple(sorted(aliases.get(str(e.version), ())))
        )
        for e in ours
    ]
    return sorted(result, key=lambda version: int(version.number))


_STORED = """
select v.version, t.key, t.value from model_versions v join model_version_tags t on t.name = v.name and t.version = v.version
where v.name = ? and coalesce(v.current_stage, '') != 'Deleted_Internal'
"""


def _stored_versions(project: Project, name: str) -> list[Version] | None:
    """`versions` from MLflow's own tables in a SQLite file, without the seconds that importing its client takes.

    None where there is no such file, or tables other than these: the client says what is wrong with them.
    """
    file = sqlite_file(project.tracking_uri)
    if file is None or not file.is_file():
        return None
    try:
        with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True, timeout=PATIENCE)) as database:
            rows = database.execute(_STORED, (name,)).fetchall()
            named = database.execute(
                "select version, alias from registered_model_aliases where name = ? order by alias", (name,)
            ).fetchall()
    except sqlite3.Error:
        return None
    tags: dict[int, dict[str, str]] = {}
    for number, key, value in rows:
        tags.setdefault(number, {})[key] = value
    return [
        Version(name, str(n), own["content_hash"], own, tuple(alias for number, alias in named if number == n))
        for n, own in sorted(tags.items())
        if "content_hash" in own
    ]


def trained_on(project: Project, data: str) -> list[Version]:
    """Every version, of any name, that a folder of data or weights (or the hash of one) went into."""
    digest = content_hash(project.root / data) if data and (project.root / data).exists() else data
    names = {entry.name for entry in client(project).search_registered_models(max_results=1000)}
    found = [version for name in sorted(names) for version in versions(project, name)]
    return [v for v in found if any(value.startswith(digest) for value in json.loads(v.tags["inputs"]).values())]


def client(project: Project) -> "MlflowClient":
    """MLflow's client for this project."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    uri = project.tracking_uri
    require("MLflow", uri, "MLFLOW_TRACKING_URI")
    import mlflow
    from mlflow.tracking import MlflowClient

    mlflow.set_tracking_uri(uri)
    if file := sqlite_file(uri):
        open_records(file, project.home)
    return MlflowClient()


def store_folder(project: Project, digest: str) -> Path:
    """Where the weights with this content hash are kept."""
    return project.store / digest


def keep(project: Project, folder: Path) -> str:
    """Link a model folder into the store, unless it is there; returns its content hash. Nothing there ever changes.

    An adapter that names its base by its place is kept as `lasting` makes it, and its base with it.
    """
    with lasting(folder) as whole:
        base = base_at(folder)
        if base is not None and not CACHED.search(base.resolve().as_posix()):
            keep(project, base)
        digest = content_hash(whole)
        place = store_folder(project, digest)
        if not place.is_dir() or content_hash(place) != digest:
            link_into(whole, place)
    return digest


@contextmanager
def lasting(folder: Path) -> Iterator[Path]:
    """A model folder as it is kept: an adapter that names its base by its place names it by what lasts (`lasting_name`).

    Any other folder, or a file, is itself. Raises `ConfigError` where nothing lies at that place.
    """
    base = base_at(folder)
    if base is None:
        yield folder
        return
    with tempfile.TemporaryDirectory() as place:
        fresh = Path(place) / "adapter"
        for file in files_in(folder):
            link = fresh / file.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file.resolve())
        name, _, revision = lasting_name(base, model_hash(base)).partition("@")
        config = document(folder / ADAPTER_CONFIG)
        config |= {"base_model_name_or_path": name, "revision": revision or None}
        write_json(fresh / ADAPTER_CONFIG, config)  # in the place of the link
        yield fresh


def model_hash(path: Path) -> str:
    """The content hash of a file or folder; of an adapter that names its base by its place, with its base.

    It is the one that `keep` gives it, so that whoever makes something of a model knows that the whole of it is the same.
    """
    with lasting(path) as whole:
        return content_hash(whole)


def base_at(folder: Path) -> Path | None:
    """`base_folder` of an adapter, None for all else; raises `ConfigError` where nothing lies at that place."""
    try:
        return base_folder(folder) if is_adapter(folder) else None
    except FileNotFoundError as error:
        raise ConfigError(str(error)) from None


def verified(project: Project, digest: str) -> Path:
    """The folder with this content hash; raises `ConfigError` when it, or what it adapts, is missing or was altered."""
    place = store_folder(project, digest)
    if not place.is_dir():
        raise ConfigError(f"{place} is gone, but a registered version points to it; run the pipeline again")
    _unaltered(place)
    hold_base(project, place)
    return place


def _unaltered(place: Path) -> None:
    if content_hash(place) != place.name:
        raise ConfigError(f"{place} was altered: its files no longer have the registered hash; remove it and run again")


def require_weights(folder: Path) -> None:
    """See by their headers that the files of a model, and of what it adapts, are whole; raises ValueError or OSError."""
    from safetensors import SafetensorError, safe_open

    from llada_core.modeling.folder import require_folder, stored_weights

    for part in model_folders(folder):
        if not is_adapter(part):
            require_folder(part, "config.json")
            stored_weights(part)
            continue
        file = part / "adapter_model.safetensors"
        require_folder(part, file.name)
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{file}: damaged or cut short: {error}") from None


def lasting_name(folder: Path, digest: str) -> str:
    """What an adapter of the model in `folder` calls it: a Hub repository at its commit, else its content hash."""
    if found := CACHED.search(folder.resolve().as_posix()):
        return f"{found[1]}/{found[2]}@{found[3]}"
    return CONTENT + digest


def keep_base(project: Project, folder: Path, name: str, *, copy: bool = True) -> None:
    """Link a model that is named by its content into the store, unless it is there.

    copy: also where the store is on another disk, at the cost of the model's size.
    """
    place = store_folder(project, name.removeprefix(CONTENT))
    wanted = name.startswith(CONTENT) and not place.is_dir()
    if wanted and (copy or folder.stat().st_dev == project.home.stat().st_dev):
        keep(project, folder)


def hold_base(project: Project, folder: Path) -> None:
    """See that the weights an adapter changes are in a store, and unaltered; nothing for other folders.

    Where `models/` has them and the store does not (a clone after `dvc pull`), they are kept there now. Raises
    `ConfigError` where they are nowhere.
    """
    if at := base_at(folder):
        hold_base(project, at)
    if not is_adapter(folder) or not (name := base_name(folder)).startswith(CONTENT):
        return
    digest = name.removeprefix(CONTENT)
    try:
        base = Path(base_of(folder))
    except FileNotFoundError as error:
        made = (path for path in sorted((project.root / "models").glob("*")) if path.is_dir())
        found = next((path for path in made if content_hash(path) == digest), None)
        if found is None:
            raise ConfigError(str(error)) from None
        base = store_folder(project, digest)
        link_into(found, base)
    _unaltered(base)
    hold_base(project, base)


def scores_of(project: Project, digest: str) -> dict[str, dict[str, float]]:
    """Benchmark -> question -> score, as kept when the weights were registered; empty when nothing was measured."""
    path = store_folder(project, digest).with_suffix(".scores.json")
    return read_json(path) if path.exists() else {}


def settings_of(project: Project, version: Version) -> dict[str, Any]:
    """The receipt of a version, with its sampling, usage, device and bits; empty when it is gone."""
    own = (r for r in receipts(project) if r["event"] == "version" and r["hash"] == version.hash)
    return next((r for r in own if r["name"] == version.name), {})


def write_receipt(project: Project, receipt: dict[str, Any]) -> None:
    """Append what happened to the registry (a version made, an alias moved), so that it can be done again."""
    path = project.store / "receipts.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as stream:
        stream.write(line_of(receipt))


def receipts(project: Project) -> Iterator[dict[str, Any]]:
    """Every receipt, oldest first."""
    path = project.store / "receipts.jsonl"
    if path.exists():
        yield from read(path)


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    wanted = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
    repository, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"there is no folder {name!r} here, and the Hub does not give it: {reason}") from None
