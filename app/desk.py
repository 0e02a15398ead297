"""What every view of the page shares: the shelf of models, limits, and how an error becomes a sentence.

Knows engines and sessions; does not know Gradio or HTML.
"""

import logging
import secrets
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, TypeVar

from app.catalogue import Catalogue
from app.engine import Engine, Refused, Shelf
from llada_core.modeling.place import held_bytes

Shown = TypeVar("Shown")
log = logging.getLogger("lladaflow.app")


@dataclass
class Desk:
    """The page's surroundings. `seconds` bounds one generation, `at_once` how many run, `pace` the steps a second."""

    shelf: Shelf
    catalogue: Catalogue
    model: str
    seconds: float = 120.0
    at_once: int = 4
    pace: float = 25.0

    def queue(self) -> dict[str, Any]:
        """How events of the page that generate share the model: in order of arrival, so many at once."""
        return {**self.line(), "show_progress": "minimal", "api_visibility": "private"}

    def line(self) -> dict[str, Any]:
        """The one line that every question waits in."""
        return {"concurrency_limit": self.at_once, "concurrency_id": "model"}

    def engine(self, name: str | None) -> tuple[Engine, str]:
        """The engine of a registered or given name (empty: the page's own), and a sentence if it changed."""
        return self.shelf.get((name or "").strip() or self.model)

    def bring(self, name: str | None, show: Callable[[str], Shown]) -> Generator[Shown, None, tuple[Engine, str]]:
        """`engine`, with a sentence to `show` every half second while a model is read."""
        loader = ThreadPoolExecutor(1)
        found, begun, before = loader.submit(self.engine, name), time.monotonic(), held_bytes()
        loader.shutdown(wait=False)
        size = self.catalogue.size(name or self.model)
        while wait([found], 0.5).not_done:
            taken = max(0, held_bytes() - before) / 2**30
            spent = time.monotonic() - begun
            yield show(f"Loading: {taken:.1f} of {size / 2**30:.1f} GB in memory after {spent:.0f} s.")
        return found.result()


def sentence(error: Exception) -> str:
    """What the person reads: a refusal as it is, anything else with the number under which the log has the details."""
    if isinstance(error, Refused):
        return str(error)
    number = secrets.token_hex(3)
    log.error("error %s", number, exc_info=error)
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        return f"The machine ran out of memory; ask for fewer tokens or a smaller model. (Error {number} in the log.)"
    return f"Something went wrong here; error {number} in the log of the page has the details."


def paced(frames: Iterator[Shown], per_second: float) -> Iterator[Shown]:
    """The same frames, no more than so many a second (0: as they come)."""
    due = time.monotonic()
    for frame in frames:
        if per_second > 0:
            time.sleep(max(0.0, due - time.monotonic()))
            due = max(due, time.monotonic()) + 1 / per_second
        yield frame


def told(work: Callable[[], Iterator[Shown]], tell: Callable[[str], Shown]) -> Iterator[Shown]:
    """The values of `work()`; an error becomes one more value, so that the page lives on."""
    try:
        yield from work()
    except Exception as error:  # noqa: BLE001 - the boundary between the model and a person: nothing may pass it
        yield tell(sentence(error))
