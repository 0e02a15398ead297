"""A folder of its own for a profile, and what the profile needs of the Hub."""

import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml
from configobj import ConfigObj
from filelock import FileLock

from llada_core.settings import ConfigError, nearest, read_yaml, with_overrides
from tasks import own_code
from tasks.folders import add_worktree, copied, has_git, hash_of, mend_worktree, submitted, write_json, write_text
from tasks.graph import lookup, prune, require_keys, require_listed
from tasks.launch import preflight
from tasks.project import Params, Project, data_root
from tasks.record.registry import named, resolve
from tasks.stages import TRAINING_STAGES


def configure_workspace(root: Path, place: Path) -> None:
    """The checkout's own settings for a workspace of it: the same cache and remotes, told from where it lies.

    A path in DVC's settings counts from the folder that holds them; a relative one moves with the project.
    """
    shared, own = _settings(root, "config"), _settings(root, "config.local")
    settings = ConfigObj(own.dict(), encoding="utf-8", interpolation=False)
    given = own.get("cache", {}).get("dir") or shared.get("cache", {}).get("dir") or "cache"
    settings.setdefault("cache", {})["dir"] = _from(place, root, given)
    for part in (shared, own):
        for name, section in part.items():
            if name.strip("'").startswith("remote ") and _is_relative(str(section.get("url", ""))):
                settings.setdefault(name, {})["url"] = _from(place, root, section["url"])
    if not has_git(root):
        settings.setdefault("core", {})["no_scm"] = "true"
    _write(settings, place)


def configure_without_git(root: Path) -> None:
    """Tell DVC that there is no git here (a tarball): without it every command fails."""
    settings = _settings(root, "config.local")
    if not (root / ".git").exists() and "no_scm" not in settings.get("core", {}):
        settings.setdefault("core", {})["no_scm"] = "true"
        _write(settings, root)


def _settings(root: Path, name: str) -> ConfigObj:
    file = root / ".dvc" / name
    return ConfigObj(str(file) if file.exists() else [], encoding="utf-8", interpolation=False)


def _is_relative(url: str) -> bool:
    return bool(url) and not urlsplit(url).scheme and not os.path.isabs(url)


def _from(place: Path, root: Path, given: str) -> str:
    """A path of `root`'s settings as one of `place`'s: relative where it lies in the project."""
    whole = (root.resolve() / ".dvc" / given).resolve()
    if whole.is_relative_to(root.resolve()):
        return os.path.relpath(whole, place.resolve() / ".dvc")
    return str(whole)


def _write(settings: ConfigObj, root: Path) -> None:
    file = root / ".dvc" / "config.local"
    if settings != _settings(root, "config.local"):
        settings.filename = str(file.with_suffix(".new"))
        settings.write()
        os.replace(settings.filename, file)


Item = tuple[str, Callable[[], object]]


def fetch(params: Params, home: Path, tell: Callable[[str], None] = print) -> list[str]:
    """Brings everything, one line each; what failed does not stop the rest and is returned, with its reason."""
    failed = []
    for what, bring in (*_models(params, home), *_sources(params, home), *_benchmarks(params, home)):
        try:
            bring()
        except (ConfigError, ValueError, OSError) as error:
            failed.append(f"{what}: {' '.join(str(error).split())}")
            tell(f"failed   {failed[-1]}")
        else:
            tell(f"fetched  {what}")
    return failed


def _models(params: Params, home: Path) -> Iterator[Item]:
    """Models and tokenizers that the profile starts from or measures, by their names on the Hub."""
    names = [params.training(stage).init_from for stage in params.stages if stage in TRAINING_STAGES]
    names += [name.rpartition("=")[2] for name in (params.evaluate.models if params.evaluate else ())]
    names += [params.data.tokenizer.name if params.data else None]
    for name in dict.fromkeys(filter(None, names)):
        if name not in TRAINING_STAGES and not (home / Path(name).expanduser()).is_dir() and not named(name):
            yield f"model {name}", partial(resolve, name, Project(home))


def _sources(params: Params, home: Path) -> Iterator[Item]:
    """Training data that is not below the data root."""
    from llada_core.data.sources import find

    roots = [root for root in (data_root(params, home), home) if root]
    parts = params.data.parts if params.data else {}
    for stage, source in ((name, source) for name, part in parts.items() for source in part.sources):
        origin = find(source, stage, roots)
        if origin.kind == "hub":
            yield (
                f"data set {origin.place}",
                partial(_load, origin.place, origin.config, origin.split, source.revision),
            )


def _load(name: str, config: str | None, split: str, revision: str | None) -> None:
    import datasets

    try:
        datasets.load_dataset(name, config, split=split, revision=revision)
    except datasets.exceptions.DatasetsError as error:
        raise ConfigError(str(error)) from None


def _benchmarks(params: Params, home: Path) -> Iterator[Item]:
    """Questions of the recipes whose files are not below the data root."""
    from llada_core.evaluation import recipes, taskset

    for name in params.evaluate.benchmarks if params.evaluate else ():
        if recipes.exists(name) and taskset.local_files(recipes.find(name), data_root(params, home)) is None:
            yield f"benchmark {name}", partial(taskset.tasks_of, recipes.find(name))


LABEL, NOT_LABEL = re.compile(r"[\w.@+-]+"), re.compile(r"[^\w.@+-]+")
PATIENCE = 600.0  # seconds for another process to make the same workspace


def open_workspace(
    project: Project, profile: str | None = None, overrides: list[str] | None = None, *, own: bool = False
) -> Project:
    """The checkout itself for its own params.yaml, else the workspace of a profile and overrides, made if need be.

    `own`: a workspace in any case. Raises `ConfigError` for an unknown profile or one that does not make sense, and as
    `preflight.check`; nothing is made then.
    """
    if profile is None and not overrides and not own:
        spec, places = read_yaml(project.root / "dvc.yaml"), [project.root]
        require_listed(spec, project.values)
        require_keys(spec, project.values)
        params = Params.load(project.root / "params.yaml")
        preflight.check(project.values, params, project, places, fresh=not (project.root / "data").exists())
        return Project(project.root.resolve())
    file = profile_file(project, profile)
    values = own_code.with_benchmarks(with_overrides(read_yaml(file), overrides or []))
    params = Params.parse(values, profile or "params.yaml")
    places = [file.resolve().parent, project.root]
    files = own_code.found(values, places)
    held, written = own_code.copies(files), values
    values = own_code.moved(values, files)
    if params.evaluate is not None:  # dvc.yaml names its keys one by one, and DVC wants every named key in the file
        values["evaluate"] = params.evaluate.model_dump(mode="json") | values["evaluate"]
    values = with_sources(values, project)
    spec = prune(read_yaml(project.root / "dvc.yaml"), values)
    base = project.home
    commit, tree = submitted(project.root)
    made_of = [_determining(values, base), tree, *([own_code.hashes(files)] if files else [])]
    place = base / "workspaces" / f"{values['name']}-{hash_of(made_of)[:8]}"
    preflight.check(written, params, project, places, fresh=not (place / "workspace.json").exists())
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(place.with_name(f".{place.name}.lock"), timeout=PATIENCE):
        if not (place / "workspace.json").exists():
            _make(project, place, commit)
            note = {"home": str(base), "profile": profile, "overrides": overrides or [], "commit": commit}
            write_json(place / "workspace.json", note | {"time": time.time()})
        own_code.put(held, place)
        _settle(project, place, values, spec)
    return Project(place)


def _determining(values: dict[str, Any], base: Path) -> dict[str, Any]:
    """What names a workspace: all but how it is launched, with models of the project told from where it lies."""
    kept = {key: value for key, value in values.items() if key != "launch"}
    inside = json.dumps(f"{base}/", ensure_ascii=False)[1:-1]
    return json.loads(json.dumps(kept, ensure_ascii=False).replace(inside, ""))


def _settle(project: Project, place: Path, values: dict[str, Any], graph: dict[str, Any]) -> None:
    """Write what a workspace holds of its place and of its models' places: it, or the project, may have moved."""
    if Project.at(place).home.resolve() != project.home.resolve():
        raise ConfigError(
            f"{place} belongs to {Project.at(place).home}; remove the link {place.parent}, which leads there"
        )
    write_text(place / "params.yaml", yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    spec = yaml.safe_dump(graph, sort_keys=False, width=120)
    if not (place / "dvc.yaml").exists() or (place / "dvc.yaml").read_text(encoding="utf-8") != spec:
        write_text(place / "dvc.yaml", spec)
    configure_workspace(project.root, place)
    if (place / ".git").is_file():
        mend_worktree(project.root, place)


def with_sources(params: dict[str, Any], project: Project) -> dict[str, Any]:
    """`params` with every model that is no stage's (a folder, an alias, a Hub name) as an absolute folder.

    Such a model of `evaluate.models` becomes `label=folder`; the label stands in tables.
    """
    result = dict(params)
    for stage in TRAINING_STAGES:
        value = lookup(params, f"{stage}.init_from")
        if value is not None and value not in TRAINING_STAGES:
            result[stage] = params[stage] | {"init_from": _folder(value, project)}
    if named := lookup(params, "evaluate.models"):
        result["evaluate"] = params["evaluate"] | {"models": _labelled(named, project)}
    return result


def _labelled(names: list[str], project: Project) -> list[str]:
    """Stages by name, other models as `label=folder`; raises `ConfigError` where two would share a label."""
    asked: dict[str, str] = {}
    models = []
    for name in names:
        label, sign, source = name.partition("=")
        if not sign or not LABEL.fullmatch(label) or (project.root / name).exists():  # a path may hold a "=" of its own
            label, source = NOT_LABEL.sub("-", name.rstrip("/").rpartition("/")[2]), name
        elif source in TRAINING_STAGES:
            raise ConfigError(f"evaluate.models: {name!r} labels a stage, which has its name; write {source!r}")
        if label in asked:
            both = f"{asked[label]!r} and {name!r} would both be {label!r} in tables"
            other = asked[label] if name in TRAINING_STAGES else source
            remedy = "list it once" if name == asked[label] else f"label one of them, such as other={other}"
            raise ConfigError(f"evaluate.models: {both}; {remedy}")
        asked[label] = name
        models.append(name if name in TRAINING_STAGES else f"{label}={_folder(source, project)}")
    return models


def _folder(name: str, project: Project) -> str:
    return str(resolve(name, project))


def profile_file(project: Project, profile: str | None) -> Path:
    """params.yaml, a file of profiles/ by name, or any YAML file; raises `ConfigError` with the nearest name."""
    if profile is None:
        return project.root / "params.yaml"
    for path in (project.root / "profiles" / f"{profile}.yaml", Path(profile)):
        if path.is_file():
            return path
    known = [path.stem for path in sorted((project.root / "profiles").glob("*.yaml"))]
    where = f"; {project.root} has no profiles/: give a file, or go to a project (`llada init FOLDER` makes one)"
    raise ConfigError(f"no profile {profile!r}{nearest(profile, known) if known else where}")


@contextmanager
def pipeline_lock(workspace: Project) -> Iterator[None]:
    """One pipeline at a time in a folder; raises `ConfigError` that names who is at it."""
    with _holding(workspace.root / ".dvc" / "tmp" / "lladaflow.lock", f"running the pipeline in {workspace.root}"):
        yield


@contextmanager
def _holding(path: Path, doing: str) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = json.loads(lock.read() or "{}")
            who = f"process {holder.get('pid', '?')}, since {holder.get('since', '?')}"
            ways = "`llada logs -f` follows it, `llada status` shows its runs"
            raise ConfigError(f"another process is {doing} ({who}); {ways}") from None
        lock.truncate(0)
        lock.write(json.dumps({"pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}))
        lock.flush()
        yield


def _make(project: Project, place: Path, commit: str | None) -> None:
    if commit is None:
        shutil.rmtree(place, ignore_errors=True)
        for file in copied(project.root):
            (place / file.relative_to(project.root)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, place / file.relative_to(project.root))
    else:
        add_worktree(project.root, place, commit)
