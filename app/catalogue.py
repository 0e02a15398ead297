"""What is known about models without loading them: names, lineage, scores, recommended settings, example questions.

Reads the registry and the files of a model folder; does not know Gradio, engines or sessions.
"""

import json
import re
from pathlib import Path

from llada_core.config.params import Params
from llada_core.data.puzzles import countdown, draw, seats, sudoku
from llada_core.evaluation import recipes
from llada_core.files import document, read
from llada_core.sampling.params import PUBLISHED, SamplingParams
from llada_core.settings import ConfigError
from tasks import registry
from tasks.folders import sqlite_file

HASH = re.compile(r"\b[0-9a-f]{40,}\b")
EACH = 2  # examples of each benchmark
GENERAL = (
    "What is 72 divided by 6? Explain step by step.",
    "Write a short poem about the sea.",
    "List three uses of a paper clip.",
)


class Catalogue:
    """The registry of one project folder, and its params for what a version does not say itself."""

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            self.params: Params | None = Params.load(root / "params.yaml")
        except ConfigError:
            self.params = None

    def names(self) -> list[str]:
        """Every alias and version of every registered model, newest first."""
        found = []
        for model in self._models():
            for version in reversed(registry.versions(self.root, model)):
                found += [f"models:/{model}@{alias}" for alias in version.aliases]
                found.append(f"models:/{model}/{version.number}")
        return found

    def version(self, name: str) -> registry.Version | None:
        """The registered version behind a name; None for folders and Hub names. Raises ConfigError when it is gone."""
        match = registry.REFERENCE.fullmatch(name)
        if not match or Path(name).is_dir():
            return None
        model, which = match[1] or match[4], match[2] or match[3] or match[5]
        if model not in self._models():
            raise ConfigError(f"no model {model!r} is registered; make run trains and registers one")
        return registry.version_of(self.root, model, which)

    def locate(self, name: str) -> str:
        """What changes when a name leads to other weights: cheap, unlike `resolve`, which verifies them."""
        version = self.version(name)
        return name if version is None else version.hash

    def resolve(self, name: str) -> Path:
        """The verified folder."""
        return registry.resolve(name, self.root)

    def facts(self, name: str) -> list[tuple[str, str]]:
        """Where a model comes from: version, aliases, lineage, and the receipt of its last training stage."""
        try:
            version, folder = self.version(name), self._folder(name)
        except ConfigError as error:
            return [("registry", str(error))]
        rows = [("name", name)]
        if version is not None:
            aliases = ", ".join(version.aliases) or "none"
            rows += [("version", version.number), ("aliases", aliases)]
            told = sorted((key, value) for key, value in version.tags.items() if key != "folder")  # a path of ours
            rows += [(key.replace("_", " ").replace(".", " "), _told(value)) for key, value in told]
            usual = vars(SamplingParams(max_new_tokens=1, block_length=1, steps=1))
            rows.append(
                ("recommended", _told({k: v for k, v in vars(self.recommended(name)).items() if v != usual[k]}))
            )
        receipt = folder / "training.json"
        if receipt.is_file():
            values = document(receipt)
            rows += [(f"training {key}", _told(v)) for key, v in sorted(values.items()) if key != "inputs"]
        return rows

    def size(self, name: str) -> int:
        """Bytes of the weights; 0 where they are not on this machine yet."""
        try:
            return sum(path.stat().st_size for path in self._folder(name).glob("*.safetensors"))
        except (ConfigError, OSError):
            return 0

    def scores(self, name: str) -> list[tuple[str, str]]:
        """Benchmark, mean score and number of questions as registered, and what is published for it."""
        try:
            version = self.version(name)
        except ConfigError:
            return []
        measured = {} if version is None else registry.scores_of(self.root, version.hash)
        return [
            (benchmark, f"{100 * sum(each.values()) / len(each):.1f} % of {len(each)} questions{_published(benchmark)}")
            for benchmark, each in sorted(measured.items())
            if each
        ]

    def recommended(self, name: str) -> SamplingParams:
        """The settings registered with a model; for others those of params.yaml, or of LLaDA's own demo."""
        try:
            version = self.version(name)
        except ConfigError:
            version = None
        if version is not None:
            return registry.sampling_of(self.root, version) or PUBLISHED
        if self._is_ours(name) and self.params is not None and self.params.register_ is not None:
            return self.params.register_.sampling
        return PUBLISHED

    def examples(self, name: str) -> list[str]:
        """Questions that this model answers: held-out ones it answered right, else fresh ones, else general ones."""
        if not self._is_ours(name):
            return list(GENERAL)
        makers = (sudoku, countdown, seats)
        fresh = [p.prompt for make in makers for p in draw(make, part="evaluate", count=2, seed="examples")]
        return self._answered(name) or fresh

    def _answered(self, name: str) -> list[str]:
        """Two questions of each benchmark of data/eval that the registered model got right."""
        try:
            version = self.version(name)
        except ConfigError:
            return []
        found: list[str] = []
        for benchmark, scores in (registry.scores_of(self.root, version.hash) if version else {}).items():
            file = registry.home(self.root) / "data" / "eval" / f"{benchmark}.jsonl"
            if file.is_file() and any(scores.values()):
                found += [q["prompt"] for q in read(file) if scores.get(q["id"])][:EACH]
        return found

    def knows_sudoku(self, name: str) -> bool:
        """Whether the grid fits the model."""
        return self._is_ours(name)

    def _folder(self, name: str) -> Path:
        version = self.version(name)
        return Path(name) if version is None else registry.store_folder(self.root, version.hash)

    def _is_ours(self, name: str) -> bool:
        """Trained on this project's puzzles: registered here, or a folder with a training receipt."""
        if Path(name).is_dir():
            return (Path(name) / "training.json").is_file()
        return registry.REFERENCE.fullmatch(name) is not None

    def _models(self) -> list[str]:
        """Names of all registered models; MLflow is not asked when it has no files yet, since asking makes them."""
        lost = {receipt["name"] for receipt in registry.receipts(self.root)}
        file = sqlite_file(registry.tracking_uri(self.root))
        if file is not None and not file.is_file():
            return sorted(lost)
        return sorted(lost | {model.name for model in registry.client(self.root).search_registered_models()})


def _published(benchmark: str) -> str:
    found = recipes.figures(benchmark) if recipes.exists(benchmark) else []
    return "".join(f" · {each.source}: {100 * each.value:.1f} % ({each.model})" for each in found)


def _told(value: object) -> str:
    """A tag or receipt entry for people: mappings as a list, long hashes cut."""
    if isinstance(value, str) and value.startswith("{"):
        value = json.loads(value)
    if isinstance(value, dict):
        return "; ".join(f"{key} {_told(each)}" for key, each in value.items())
    if isinstance(value, float) and value.is_integer():
        return f"{value:,.0f}"
    text = value if isinstance(value, str) else json.dumps(value)
    return HASH.sub(lambda found: found[0][:12] + "…", text)
