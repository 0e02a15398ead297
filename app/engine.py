"""A loaded model behind the page, and the shelf that holds the few that are loaded.

Knows the registry's `resolve` and llada_core's loaders; does not know Gradio, sessions or HTML.
"""

import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from app.catalogue import Catalogue
from llada_core.modeling import load_to_answer
from llada_core.modeling.place import checked_bits
from llada_core.modeling.predictor import MaskPredictor
from llada_core.sampling import Step, stream, stream_infill
from llada_core.sampling.params import SamplingParams
from llada_core.sampling.trace import speller
from llada_core.settings import Bits
from llada_core.tokenizer import Tokenizer


class Refused(ValueError):  # noqa: N818 - a sentence for a person rather than a fault
    """Something the person asked for that cannot be done; the text is a sentence for them."""


@contextmanager
def refusing() -> Iterator[None]:
    """What the library says of a value that does not fit is a sentence for the person."""
    try:
        yield
    except ValueError as error:
        raise Refused(str(error)) from error


MOST_CONTEXT = 4096


@dataclass(frozen=True)
class Engine:
    """One model, ready to write. `turn` lets simultaneous writers share it step by step."""

    name: str
    folder: Path
    model: MaskPredictor
    tokenizer: Tokenizer
    turn: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def context(self) -> int:
        """Longest canvas in tokens."""
        return min(self.model.max_length, MOST_CONTEXT)

    @property
    def mask_id(self) -> int:
        """The token that stands for a masked position."""
        return self.model.special_tokens.mask_id

    def chat_ids(self, messages: list[dict[str, str]]) -> list[int]:
        """The prompt of a conversation."""
        return self.tokenizer.chat_ids(messages)

    def encode(self, text: str) -> list[int]:
        """Ids of a person's text; nothing in it is read as a special token."""
        return self.tokenizer.encode(text)

    def decode(self, token: int) -> str:
        """One token as text, end tokens as a sign."""
        return speller(self.tokenizer)(token)

    def text(self, tokens: list[int]) -> str:
        """The plain answer."""
        return self.tokenizer.answer_text(tokens)

    def whole(self, tokens: list[int]) -> str:
        """The text of a filled template, nothing cut off."""
        return self.tokenizer.decode(tokens)

    def write(
        self, prompt: list[int], params: SamplingParams, *, pinned: dict[int, int] | None = None, watch: bool = False
    ) -> Generator[Step, None, None]:
        """Denoises an answer after `prompt`; with `watch`, guesses are made beyond the present block too."""
        with refusing():
            return self._in_turn(stream(self.model, [prompt], params, pinned=pinned, look_ahead=watch))

    def fill(self, template: list[int], params: SamplingParams, *, watch: bool = False) -> Generator[Step, None, None]:
        """Denoises the masks of a template."""
        with refusing():
            return self._in_turn(stream_infill(self.model, [template], params, look_ahead=watch))

    def _in_turn(self, steps: Iterator[Step]) -> Generator[Step, None, None]:
        while True:
            with self.turn:
                step = next(steps, None)
            if step is None:
                return
            yield step


@dataclass(frozen=True)
class Setting:
    """Where the page's models lie, and with how many bits a weight; as `load_to_answer` takes them."""

    device: str = "auto"
    bits: Bits | None = None

    @classmethod
    def checked(cls, device: str, bits: int | None) -> "Setting":
        """As a person gave it; `ValueError` in one line if this machine has no such thing."""
        return cls(device, checked_bits(device, bits))


def load(name: str, resolve: Callable[[str], Path], setting: Setting = Setting()) -> Engine:
    """Resolves, checks memory and loads; raises Refused with one sentence when any of it fails."""
    try:
        folder = resolve(name)
        model, tokenizer = load_to_answer(folder, device=setting.device, bits=setting.bits), Tokenizer.load(folder)
    except (ValueError, OSError, KeyError, ImportError) as error:
        raise Refused(f"The model {name!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    return Engine(name, folder, model, tokenizer)


class Shelf:
    """The loaded models, at most `most`; the one asked for longest ago makes room.

    A name is looked up at every `get`, so that a moved champion is the one that answers next.
    """

    def __init__(self, source: Catalogue, most: int = 2, setting: Setting = Setting()) -> None:
        self._source, self._most, self._setting = source, most, setting
        self._engines: dict[str, tuple[str, Engine]] = {}
        self._lock, self._loading = threading.Lock(), threading.Lock()  # who loads waits; who has a model does not

    def get(self, name: str) -> tuple[Engine, str]:
        """The engine, and a sentence when it is another than last time or the registry no longer names it."""
        place, loaded = self._engines.get(name, ("", None))
        try:
            with self._lock:
                now = self._source.locate(name)
        except (ValueError, OSError) as error:
            if loaded is None:
                raise Refused(f"There is no model {name!r}: {str(error).splitlines()[0]}") from error
            return loaded, f"{name} is no longer in the registry; the version that was loaded goes on."
        if loaded is not None and place == now:
            return self._kept(name, now, loaded), ""
        try:
            with self._loading:
                return self._brought(name, now), f"{name} moved: another version answers from now on." if loaded else ""
        except Refused as error:
            if loaded is None:
                raise
            return loaded, f"{name} moved, but the version before goes on. {error}"

    def _brought(self, name: str, place: str) -> Engine:
        """The weights at `place`, loaded unless some name has them already."""
        with self._lock:
            same = next((engine for at, engine in self._engines.values() if at == place), None)
            while same is None and len(self._engines.keys() - {name}) >= self._most:
                del self._engines[next(key for key in self._engines if key != name)]
        return self._kept(name, place, same or load(name, self._source.resolve, self._setting))

    def _kept(self, name: str, place: str, engine: Engine) -> Engine:
        """The engine, now the one asked for last."""
        with self._lock:
            self._engines.pop(name, None)
            self._engines[name] = place, engine
        return engine
