"""How the models of a project are to be asked: as saved with them; for those of old, as they were asked before."""

from pathlib import Path

from llada_core.data.puzzles import countdown, draw, seats, sudoku
from llada_core.files import read
from llada_core.modeling.families import recommended
from llada_core.sampling.params import PUBLISHED, RECOMMENDED, SamplingParams
from llada_core.settings import ConfigError
from llada_core.usage import Usage
from tasks.project import Project
from tasks.record.registry import Version, named, scores_of, settings_of, store_folder, version_of

EACH = 2  # examples of each benchmark
GENERAL = (
    "What is 72 divided by 6? Explain step by step.",
    "Write a short poem about the sea.",
    "List three uses of a paper clip.",
)


def usage_of(project: Project, name: str) -> Usage:
    """How a model is to be asked: a folder, `models:/NAME@alias`, `models:/NAME/3`, or a Hub name.

    Raises `ConfigError` for a registered name that leads nowhere.
    """
    version = _version(project, name)
    saved = _saved(project, name, version)
    usage = saved or Usage(sampling=_sampling_of_old(project, name, version))
    return usage if usage.examples else usage.model_copy(update={"examples": _examples_of_old(project, name, version)})


def saved_usage(project: Project, name: str) -> Usage | None:
    """What was saved with a model; None for one of old, and for one from elsewhere."""
    return _saved(project, name, _version(project, name))


def usage_to_register(project: Project, digest: str, sampling: SamplingParams) -> Usage:
    """As the model's own folder says, but at the settings of params.yaml, and with questions that it answered right."""
    own = Usage.load(store_folder(project, digest)) or Usage()
    examples = _answered(project, digest) or list(own.examples)
    return own.model_copy(update={"sampling": sampling, "examples": tuple(examples)})


def _version(project: Project, name: str) -> Version | None:
    reference = None if _folder(project, name).is_dir() else named(name)
    return None if reference is None else version_of(project, *reference)


def _saved(project: Project, name: str, version: Version | None) -> Usage | None:
    if version is None:
        return Usage.load(_folder(project, name))
    receipt = settings_of(project, version)
    return Usage.parse(receipt["usage"], f"the receipt of {name}") if "usage" in receipt else None


def _sampling_of_old(project: Project, name: str, version: Version | None) -> SamplingParams:
    """The settings of a version's receipt; for a folder that a run trained those of params.yaml; for a Hub name those that
    its family recommends.
    """
    if version is not None:
        found = settings_of(project, version).get("sampling")
        return SamplingParams(**found) if found else PUBLISHED
    if _is_ours(project, name, version):
        try:
            params = project.params
        except ConfigError:
            return PUBLISHED
        return PUBLISHED if params.register_ is None else params.register_.sampling
    return RECOMMENDED.get(recommended(name), PUBLISHED)


def _examples_of_old(project: Project, name: str, version: Version | None) -> tuple[str, ...]:
    """Held-out questions that the model answered right, else fresh puzzles; for models from elsewhere general ones."""
    if not _is_ours(project, name, version):
        return GENERAL
    makers = (sudoku, countdown, seats)
    fresh = (p.prompt for make in makers for p in draw(make, split="evaluate", count=EACH, seed="examples"))
    return tuple((_answered(project, version.hash) if version else []) or fresh)


def _answered(project: Project, digest: str) -> list[str]:
    """Questions of each benchmark of data/eval that the model with these weights got right."""
    found: list[str] = []
    for benchmark, scores in scores_of(project, digest).items():
        file = project.home / "data" / "eval" / f"{benchmark}.jsonl"
        if file.is_file() and any(scores.values()):
            found += [q["prompt"] for q in read(file) if scores.get(q["id"])][:EACH]
    return found


def _is_ours(project: Project, name: str, version: Version | None) -> bool:
    """Trained by this project: registered here, or a folder with a training receipt."""
    return version is not None or (_folder(project, name) / "training.json").is_file()


def _folder(project: Project, name: str) -> Path:
    return project.root / Path(name).expanduser()
