"""Many chats at once on the page, against what Gradio itself can take.

`python -m benchmarks.page MODEL [--chats 16] [--rounds 3] [--seconds 20]` starts the page three times: with the engine, with one
that has each step of an answer ready (what the page could show if steps cost nothing), and with one that has only the
whole answer (one step, Gradio's own ceiling). In every round each is asked in turn by all chats, which ask again as soon as
they are answered. Figures are answers a second of the wall, clients on the same machine; ratios are within a round.
"""

import argparse
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import psutil
from gradio_client import Client

from app.models import AppState, LoadedModel, ModelCache, ModelIndex
from benchmarks.timing import machine, table
from llada_core.sampling import Step
from llada_core.sampling.params import SamplingParams
from llada_core.sampling.requests import Request
from tasks.project import Project
from tests.ports import free_ports

QUESTIONS = ("Solve the sudoku 1030340020030001", "Make 13 from 8, 3, 8", "hello")
ENGINES = {"engine": None, "steps ready": False, "answer ready": True}  # whether the last step is all that is told


@dataclass(frozen=True)
class Ready(LoadedModel):
    """Answers as its engine did the first time, with all steps or as one."""

    at_once: bool = False
    known: dict[tuple[tuple[int, ...], SamplingParams], list[Step]] = field(default_factory=dict, compare=False)

    def _steps(self, requests: list[Request]) -> Generator[Step, None, None]:
        (request,) = requests
        key = (tuple(request.tokens.tolist()), request.params)
        if key not in self.known:
            self.known[key] = list(super()._steps(requests))[-1 if self.at_once else 0 :]
        yield from self.known[key]


class ReadyCache(ModelCache):
    """Gives out one model, made `Ready`."""

    def __init__(self, source: ModelIndex, name: str, *, at_once: bool) -> None:
        super().__init__(source)
        found, _ = super().get(name)
        self.ready = Ready(found.name, found.folder, found.model, found.tokenizer, usage=found.usage, at_once=at_once)

    def get(self, name: str) -> tuple[LoadedModel, str]:
        return self.ready, ""


def serve(model: str, engine: str, port: int) -> None:
    """The page as `python -m app` serves it, but for the engine."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    from app import page
    from app.__main__ import options

    index, at_once = ModelIndex(Project.at()), ENGINES[engine]
    cache = ModelCache(index) if at_once is None else ReadyCache(index, model, at_once=at_once)
    state = AppState(cache, index, model)
    state.loaded(model)
    page.build_page(state).launch(server_port=port, quiet=True, **options())


def ready(url: str) -> Client:
    """A client, once the page is up."""
    for _ in range(300):
        try:
            return Client(url, verbose=False, httpx_kwargs={"timeout": 120})
        except Exception:  # noqa: BLE001 - whatever it is, the page is not up yet
            time.sleep(1)
    raise SystemExit("the page did not come up")


@dataclass
class Seen:
    """What the chats of one page met, over all rounds."""

    rates: list[float] = field(default_factory=list)  # answers a second, a round each
    waits: list[float] = field(default_factory=list)
    spent: list[float] = field(default_factory=list)  # ms of the page's processor an answer, a round each
    megabytes: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    least: int = sys.maxsize  # answers of the chat that got fewest in a round

    def row(self, name: str, base: list[float]) -> list[str]:
        """A line of the table; `base`: the rates that its own are set against."""
        ratios, waits = [own / other for own, other in zip(self.rates, base, strict=True)], sorted(self.waits)
        return [
            name, str(len(waits)), str(len(self.failures)), f"{statistics.median(self.rates):.1f}",
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})",
            f"{statistics.median(waits):.2f} / {waits[int(0.95 * len(waits))]:.2f}", str(self.least),
            f"{statistics.median(self.spent):.1f}", f"{self.megabytes[0]:.0f} / {max(self.megabytes):.0f}",
        ]  # fmt: skip


def talk(client: Client, until: float, seen: Seen) -> int:
    """One chat that asks until the time is over; its answers."""
    count = 0
    while time.monotonic() < until:
        begun = time.monotonic()
        try:
            said: dict[str, Any] = client.predict(QUESTIONS[count % 3], "recommended", 0, api_name="/chat")
            seen.failures += [said["error"]] if "error" in said else []
        except Exception as error:  # noqa: BLE001 - every failure counts
            seen.failures.append(repr(error))
        seen.waits.append(time.monotonic() - begun)
        count += 1
    return count


def ask(clients: list[Client], seconds: float, page: psutil.Process, seen: Seen) -> None:
    """One round of one page."""
    begun, spent = time.monotonic(), sum(page.cpu_times()[:2])
    counts: list[int] = []
    threads = [
        threading.Thread(target=lambda each=each: counts.append(talk(each, begun + seconds, seen))) for each in clients
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    answers = max(1, sum(counts))
    seen.rates.append(answers / (time.monotonic() - begun))
    seen.spent.append(1000 * (sum(page.cpu_times()[:2]) - spent) / answers)
    seen.megabytes.append(page.memory_info().rss / 2**20)
    seen.least = min(seen.least, *counts)


def main() -> None:
    """Prints the table; exit status 1 if an answer failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.page", description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--chats", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--serve", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(given.model, given.serve, given.port)
        return
    ports, seen = dict(zip(ENGINES, free_ports(len(ENGINES)), strict=True)), {name: Seen() for name in ENGINES}
    own = [sys.executable, "-m", "benchmarks.page", given.model]
    started = {
        name: subprocess.Popen([*own, "--serve", name, "--port", str(port)], stdout=subprocess.DEVNULL)
        for name, port in ports.items()
    }
    try:
        chats = {name: [ready(f"http://127.0.0.1:{port}/") for _ in range(given.chats)] for name, port in ports.items()}
        turns = {n: partial(ask, chats[n], page=psutil.Process(started[n].pid), seen=seen[n]) for n in ENGINES}
        for clients in chats.values():
            for text in QUESTIONS:  # what is ready is there before anything is counted
                clients[0].predict(text, "recommended", 0, api_name="/chat")
        for _ in range(given.rounds):
            for turn in turns.values():
                turn(given.seconds)
    finally:
        for process in started.values():
            process.terminate()
    print(f"page: {machine()}, {os.cpu_count()} cores shared with {given.chats} chats\n")
    header = ["with", "answers", "failed", "answers/s", "of the ceiling", "seconds (50 / 95 %)", "least of a chat a round", "ms of the page's processor each", "MB begin / most"]  # fmt: skip
    print(table(header, [seen[name].row(name, seen["answer ready"].rates) for name in ENGINES]))
    sys.exit(1 if any(each.failures for each in seen.values()) else 0)


if __name__ == "__main__":
    main()
