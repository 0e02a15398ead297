"""Loaded models, what is known of others without loading them, and what every view shares."""

import logging
import math
import os
import secrets
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch
from transformers.utils import logging as logging_of_transformers

from app.canvas import speller
from llada_core.files import read_json
from llada_core.modeling import load_to_answer
from llada_core.modeling.place import checked_bits, held_bytes, positions_that_fit
from llada_core.modeling.predictor import MaskPredictor
from llada_core.sampling import Step
from llada_core.sampling.engine import Engine
from llada_core.sampling.graph import Compiled
from llada_core.sampling.params import SamplingParams
from llada_core.sampling.requests import Request, to_answer, to_fill
from llada_core.settings import Bits, ConfigError, nearest
from llada_core.tokenizer import Tokenizer
from llada_core.usage import Usage
from tasks.folders import safe, sqlite_file
from tasks.project import Project
from tasks.record import registry
from tasks.record.model_usage import GENERAL, usage_of


class ModelIndex:
    """The registry of one project folder, and how its models are to be asked."""

    def __init__(self, project: Project) -> None:
        self.project = project

    def names(self) -> list[str]:
        """Every alias and version of every registered model, newest first."""
        found = []
        for model in self._models():
            for version in reversed(registry.versions(self.project, model)):
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
        return registry.version_of(self.project, model, which)

    def locate(self, name: str) -> str:
        """What changes when a name leads to other weights: cheap, unlike `resolve`, which verifies them."""
        version = self.version(name)
        return name if version is None else version.hash

    def resolve(self, name: str, place: str = "") -> Path:
        """The verified folder; with a `place` that `locate` gave, of that version, wherever its alias has moved since."""
        if place in ("", name):
            return registry.resolve(name, self.project)
        return registry.verified(self.project, place)

    def size(self, name: str) -> int:
        """Bytes of the weights; 0 where they are not on this machine yet."""
        try:
            return sum(path.stat().st_size for path in self.folder(name).glob("*.safetensors"))
        except (ConfigError, OSError):
            return 0

    def scores(self, name: str) -> dict[str, dict[str, float]]:
        """Benchmark -> question -> score, as registered; empty for what was never measured here."""
        try:
            version = self.version(name)
        except ConfigError:
            return {}
        return {} if version is None else registry.scores_of(self.project, version.hash)

    def measured(self, name: str, settings: str) -> dict[str, str]:
        """Benchmark -> percent right with faster settings, and against exact, as `llada eval --speed` has kept it here."""
        found = {}
        for file in sorted((self.project.home / "reports" / "checkpoints" / safe(name)).glob("speed-*.json")):
            kept = read_json(file)
            for row in kept["rows"]:
                if row["setting"] == settings:
                    mean, *gap = (100 * row[key] for key in ("mean", "difference", "low", "high"))
                    against = "{:+.1f} [{:+.1f}, {:+.1f}] against exact".format(*gap)
                    found[kept["benchmark"]] = f"{mean:.1f} % right, {against}"
        return found

    def usage(self, name: str) -> Usage:
        """How a model is to be asked; one that the registry no longer names is asked as one from elsewhere."""
        try:
            return usage_of(self.project, name)
        except ConfigError:
            return Usage(examples=GENERAL)

    def folder(self, name: str) -> Path:
        """Where a model lies, if it is on this machine; raises `ConfigError` for a registered name that leads nowhere."""
        version = self.version(name)
        return Path(name) if version is None else registry.store_folder(self.project, version.hash)

    def _models(self) -> list[str]:
        """Names of all registered models; MLflow is not asked when it has no files yet, since asking makes them."""
        lost = {receipt["name"] for receipt in registry.receipts(self.project)}
        file = sqlite_file(self.project.tracking_uri)
        if file is not None and not file.is_file():
            return sorted(lost)
        return sorted(lost | {model.name for model in registry.client(self.project).search_registered_models()})


class UserError(ValueError):
    """Something the person asked for that cannot be done; the text is a sentence for them."""


@contextmanager
def as_user_error() -> Iterator[None]:
    """What the library says of a value that does not fit is a sentence for the person."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error


MOST_CONTEXT = 4096  # of the page, whose machine many may share
AT_ONCE = 64  # answers that one model writes together


@dataclass(frozen=True)
class LoadedModel:
    """One model, ready to write: whoever writes at the same time shares the steps of its engine."""

    name: str
    folder: Path | None  # None: of a model that no folder holds
    model: MaskPredictor
    tokenizer: Tokenizer
    max_context: int = MOST_CONTEXT  # tokens of a canvas that whoever shows it allows
    usage: Usage = field(default_factory=Usage)
    compiled: Compiled = "off"  # as `RunningBatch` has it
    copies: tuple[MaskPredictor, ...] = ()  # of the model, on other devices, which write beside it
    # What writes for all who ask: 64 at once, or as many as are together as long as 32 whole contexts, or as keys and values
    # have room for (at 8 B a context of 4,096 takes 2 GB). Made with the model: of two threads that asked for it at the
    # same time, each could have got one of its own.
    engine: Engine = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        positions = 32 * self.context
        for each in (self.model, *self.copies):  # one queue for all: a canvas must fit the smallest of their devices
            if each.supports_cache:
                one = each.new_cache(1, 1)
                positions = min(positions, positions_that_fit((*one.keys, *one.values)))
        engine = Engine(self.model, rows=AT_ONCE, positions=positions, compiled=self.compiled)
        for copy in self.copies:
            Engine(copy, rows=AT_ONCE, positions=positions, compiled=self.compiled, beside=engine)
        object.__setattr__(self, "engine", engine)

    @property
    def context(self) -> int:
        """Longest canvas in tokens."""
        return min(self.model.max_length, self.max_context)

    @property
    def turn(self) -> threading.Lock:
        """For whoever asks the model beside its engine: no step is made meanwhile."""
        return self.engine.turn

    def doubts(self, params: SamplingParams) -> str:
        """What of these settings the model did not learn, as sentences for a person; mostly none."""
        lines = self.usage.doubts(params, self.model.block_length)
        return " ".join(f"{line[0].upper()}{line[1:]}." for line in lines)

    def decode(self, token: int) -> str:
        """One token as text, end tokens as a sign."""
        return speller(self.tokenizer)(token)

    def write(
        self,
        prompt: list[int],
        params: SamplingParams,
        *,
        fixed_tokens: dict[int, int] | None = None,
        look_ahead: bool = False,
    ) -> Generator[Step, None, None]:
        """Denoises an answer after `prompt`; with `look_ahead`, guesses are made beyond the present block too.

        `fixed_tokens`: answer position -> token that stands there from the start.
        """
        with as_user_error():
            requests, _ = to_answer(self.model, [prompt], params, pinned=fixed_tokens, ahead=look_ahead)
        return self._steps(requests)

    def fill(
        self, template: list[int], params: SamplingParams, *, look_ahead: bool = False
    ) -> Generator[Step, None, None]:
        """Denoises the masks of a template."""
        with as_user_error():
            requests = to_fill(self.model, [template], params, ahead=look_ahead)
        return self._steps(requests)

    def _steps(self, requests: list[Request]) -> Generator[Step, None, None]:
        with as_user_error():  # once the first step is asked for: who never begins takes no place
            (answer,) = self.engine.submit(requests, watched=True)
        yield from self.engine.follow(answer)


def compiled_as(text: str) -> Compiled:
    """How steps are compiled, as a person gave it; `ConfigError` in one line for anything else."""
    ways: dict[str, Compiled] = {way: way for way in get_args(Compiled)}
    if text not in ways:
        raise ConfigError(f"compile {text!r}{nearest(text, list(ways))}")
    return ways[text]


@dataclass(frozen=True)
class Setting:
    """Where models lie, and with how many bits a weight, as `load_to_answer` takes them; whether their steps are compiled.

    `more` devices have a copy each.
    """

    device: str = "auto"
    bits: Bits | None = None
    compiled: Compiled = "off"
    more: tuple[str, ...] = ()

    @classmethod
    def one(cls, device: str, bits: int | None, compiled: Compiled = "off") -> "Setting":
        """One device; `ValueError` in one line if this machine has no such thing."""
        return cls(device, checked_bits(device, bits), compiled)

    @classmethod
    def checked(cls, device: str, bits: int | None, compiled: str = "off") -> "Setting":
        """As a person gave it, devices with commas between; `ValueError` in one line if this machine has no such thing."""
        first, *more = (each.strip() for each in device.split(","))
        kept = [checked_bits(each, bits) for each in (first, *more)]
        return cls(first, kept[0], compiled_as(compiled), tuple(more))


def opened(
    name: str, folder: Path, usage: Usage, setting: Setting = Setting(), *, max_context: int | None = MOST_CONTEXT
) -> LoadedModel:
    """The model of a folder with its tokenizer, wherever `setting` has it lie: what page, terminal and server ask.

    Raises ValueError, OSError, KeyError or ImportError with one line. Without `max_context` the model's own length counts.
    """
    logging_of_transformers.disable_progress_bar()
    places = (setting.device, *setting.more)
    model, *copies = (load_to_answer(folder, device=place, bits=setting.bits) for place in places)
    _choose_threads([model])
    tokenizer, longest = Tokenizer.load(folder), model.max_length if max_context is None else max_context
    return LoadedModel(name, folder, model, tokenizer, longest, usage, setting.compiled, tuple(copies))


SMALL = 10_000_000  # weights
THREADS = torch.get_num_threads()  # as torch found the machine


def _choose_threads(models: Sequence[MaskPredictor]) -> None:
    """Lets one thread compute where all models of this process are small and on a CPU, unless OMP_NUM_THREADS says how
    many.
    """
    # Its products are so short that threads which share them mostly wait for each other, spinning: beside other work two
    # cost the default champion twelve times the processor's time of one.
    here = [model for model in models if model.device.type == "cpu"]
    if "OMP_NUM_THREADS" not in os.environ and here:
        small = all(sum(weight.numel() for weight in model.parameters()) < SMALL for model in here)
        torch.set_num_threads(1 if small else THREADS)


def load(name: str, source: ModelIndex, setting: Setting = Setting(), place: str = "") -> LoadedModel:
    """Resolves, checks memory and loads; raises UserError with one sentence when any of it fails."""
    try:
        return opened(name, source.resolve(name, place), source.usage(name), setting)
    except (ValueError, OSError, KeyError, ImportError) as error:
        raise UserError(f"The model {name!r} cannot be loaded: {str(error).splitlines()[0]}") from error


class ModelCache:
    """The loaded models, at most `most`; the one asked for longest ago makes room.

    A name is looked up at every `get`, so that a moved champion is the one that answers next.
    """

    def __init__(self, source: ModelIndex, most: int = 2, setting: Setting = Setting()) -> None:
        self._source, self._most, self._setting = source, most, setting
        self._models: dict[str, tuple[str, LoadedModel]] = {}
        self._lock, self._loading = threading.Lock(), threading.Lock()  # who loads waits; who has a model does not

    def get(self, name: str) -> tuple[LoadedModel, str]:
        """The loaded, and a sentence when it is another than last time or the registry no longer names it."""
        place, loaded = self._models.get(name, ("", None))
        try:
            with self._lock:
                now = self._source.locate(name)
        except (ValueError, OSError) as error:
            if loaded is None:
                raise UserError(f"There is no model {name!r}: {str(error).splitlines()[0]}") from error
            return loaded, f"{name} is no longer in the registry; the version that was loaded goes on."
        if loaded is not None and place == now:
            return self._kept(name, now, loaded), ""
        try:
            with self._loading:
                return self._brought(name, now), f"{name} moved: another version answers from now on." if loaded else ""
        except UserError as error:
            if loaded is None:
                raise
            return loaded, f"{name} moved, but the version before goes on. {error}"

    def _brought(self, name: str, place: str) -> LoadedModel:
        """The weights at `place`, loaded unless some name has them already."""
        with self._lock:
            same = next((loaded for at, loaded in self._models.values() if at == place), None)
            while same is None and len(self._models.keys() - {name}) >= self._most:
                del self._models[next(key for key in self._models if key != name)]
        found = self._kept(name, place, same or load(name, self._source, self._setting, place))
        with self._lock:
            _choose_threads([loaded.model for _, loaded in self._models.values()])
        return found

    def _kept(self, name: str, place: str, loaded: LoadedModel) -> LoadedModel:
        """The model, now the one asked for last."""
        with self._lock:
            self._models.pop(name, None)
            self._models[name] = place, loaded
        return loaded


Shown = TypeVar("Shown")
SPEEDS = {"slow": 12.0, "normal": 4.0, "instant": 0.0}  # seconds in which an answer is shown, if the model is that fast
log = logging.getLogger("lladaflow.app")


@dataclass
class AppState:
    """The page's surroundings. `seconds` bounds one generation, `at_once` how many run; `speeds`: name -> seconds in which
    an answer is shown, of which `speed` is chosen at first; `named`: the models that may be asked, None: any that is there."""

    cache: ModelCache
    index: ModelIndex
    model: str
    seconds: float = 120.0
    at_once: int = 16
    speeds: Mapping[str, float] = field(default_factory=lambda: SPEEDS)
    speed: str = "normal"
    named: tuple[str, ...] | None = None

    def allowed(self, name: str | None) -> str:
        """The name as it is looked up (empty: the page's own); raises UserError for one that nobody named for this page."""
        asked = (name or "").strip() or self.model
        if self.named is not None and asked not in self.named:
            raise UserError(
                f"This page can be reached from other machines and asks {', '.join(self.named)} alone; "
                "whoever runs it names further models with --also."
            )
        return asked

    def queue(self) -> dict[str, Any]:
        """How events of the page that generate share the model: in order of arrival, so many at once."""
        return {**self.line(), "show_progress": "minimal", "api_visibility": "private"}

    def line(self) -> dict[str, Any]:
        """The one line that every question waits in."""
        return {"concurrency_limit": self.at_once, "concurrency_id": "model"}

    def loaded(self, name: str | None) -> tuple[LoadedModel, str]:
        """The loaded of a registered or given name (empty: the page's own), and a sentence if it changed."""
        return self.cache.get(self.allowed(name))

    def bring(self, name: str | None, show: Callable[[str], Shown]) -> Generator[Shown, None, tuple[LoadedModel, str]]:
        """`loaded`, with a sentence to `show` every half second while a model is read."""
        loader = ThreadPoolExecutor(1)
        found, begun, before = loader.submit(self.loaded, name), time.monotonic(), held_bytes()
        loader.shutdown(wait=False)
        size = self.index.size(self.allowed(name))
        while wait([found], 0.5).not_done:
            taken = max(0, held_bytes() - before) / 2**30
            spent = time.monotonic() - begun
            yield show(f"Loading: {taken:.1f} of {size / 2**30:.1f} GB in memory after {spent:.0f} s.")
        return found.result()


def sentence(error: Exception) -> str:
    """What the person reads: a refusal as it is, anything else with the number under which the log has the details."""
    if isinstance(error, UserError):
        return str(error)
    number = secrets.token_hex(3)
    log.error("error %s", number, exc_info=error)
    if out_of_memory(error):
        return f"The machine ran out of memory; ask for fewer tokens or a smaller model. (Error {number} in the log.)"
    return f"Something went wrong here; error {number} in the log of the page has the details."


def out_of_memory(error: Exception) -> bool:
    """Whether a device had no room left, or the machine: torch has no error of its own for that."""
    told = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in told or "can't allocate memory" in told


@dataclass(frozen=True)
class Clock:
    """Time as pacing needs it; a test has its own."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


REAL = Clock()


def due(number: int, params: SamplingParams, seconds: float) -> float:
    """When step `number` (from 0) of an answer is shown, in seconds after the first: none later than `seconds`.

    A schedule says how many steps there will be, which then come evenly. Where confidence decides, the first come slowest:
    an answer of six steps takes half of `seconds`, one of seventeen nine tenths.
    """
    return seconds * (1 - math.exp(-number / 8) if params.parallel else min(1.0, number / params.steps))


def paced(frames: Iterator[Shown], when: Callable[[int], float], *, clock: Clock = REAL) -> Iterator[Shown]:
    """The same frames, number n no earlier than `when(n)` seconds after the first, and the end no earlier than its turn.

    `when` is asked again every tenth of a second: a person may want to see the rest at once.
    """
    begun, now = clock.now(), clock.now
    for number, frame in enumerate(frames, 1):
        yield frame
        while (left := begun + when(number) - now()) > 0:
            clock.sleep(min(left, 0.1))


def errors_as_text(work: Callable[[], Iterator[Shown]], tell: Callable[[str], Shown]) -> Iterator[Shown]:
    """The values of `work()`; an error becomes one more value, so that the page lives on."""
    try:
        yield from work()
    except Exception as error:  # noqa: BLE001 - the boundary between the model and a person: nothing may pass it
        yield tell(sentence(error))
