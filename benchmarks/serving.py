"""A server under load: arrivals drawn from a seed, percentiles of the first text and of whole answers, tokens a second, memory.

`python -m benchmarks.serving FOLDER [--clients 1,8,32,128] [--seconds 30]` starts `llada serve` on a model folder (the default
run's: its puzzles are asked) and streams answers to so many clients at once; each asks its next question after a pause
drawn from an exponential distribution of the mean that `--pause` gives. `--answers 10000` ends a cell after so many, and
prints the server's memory after each tenth of them; `--long 20` makes one question in twenty a megabyte, which is refused;
`--grown 30`: exit status 1 if the memory after the last tenth is by more MB above that after the first. Seconds are the wall's, client and server share the machine: a figure
is worth something beside another of the same run.
"""

import argparse
import asyncio
import json
import math
import os
import random
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from benchmarks.timing import machine, table
from llada_core.data.puzzles import seats, sudoku


@dataclass
class Load:
    """What the clients of one cell saw."""

    first: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    tokens: int = 0
    forwards: int = 0
    refused: int = 0
    failed: int = 0
    megabytes: list[float] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)  # that there were at each look at the memory

    @property
    def tenths(self) -> list[float]:
        """Megabytes at the beginning and after each tenth of the answers."""
        tenths = [len(self.whole) * i / 10 for i in range(11)]
        looks = [next((i for i, n in enumerate(self.answers) if n >= part), len(self.answers) - 1) for part in tenths]
        return [self.megabytes[i] for i in looks]


def question(rng: random.Random, long: int = 0) -> str:
    """A puzzle as the default run asks it; one in so many a megabyte of numbers."""
    if long and rng.randrange(long) == 0:
        return " ".join(str(rng.randrange(10**12)) for _ in range(76_000))
    return sudoku(rng, empty=(5, 10)).prompt if rng.random() < 0.5 else seats(rng, people=9).prompt


async def answer(client: httpx.AsyncClient, text: str, load: Load) -> None:
    """One question, streamed to its end."""
    body = {"model": "default", "stream": True, "stream_options": {"include_usage": True}}
    body |= {"messages": [{"role": "user", "content": text}]}
    began, first = time.monotonic(), 0.0
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            load.refused += response.status_code in (400, 429)
            load.failed += response.status_code not in (400, 429)
            return
        ended = False
        async for line in response.aiter_lines():
            if not line or line == "data: [DONE]":
                ended = ended or line == "data: [DONE]"
                continue
            event = json.loads(line.removeprefix("data: "))
            if event.get("choices") and event["choices"][0]["delta"].get("content") and not first:
                first = time.monotonic() - began
            if "usage" in event:
                load.tokens += event["usage"]["completion_tokens"]
                load.forwards += event["usage"]["forwards"]
        load.failed += not ended
    load.first.append(first or time.monotonic() - began)
    load.whole.append(time.monotonic() - began)


async def client_of(url: str, number: int, until: float, given: argparse.Namespace, load: Load) -> None:
    """One person who asks, reads, thinks and asks again until the time is over, or there are so many answers."""
    rng, most, pause = random.Random(number), given.answers or math.inf, given.pause
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:
        while time.monotonic() < until and len(load.whole) < most:
            await asyncio.sleep(rng.expovariate(1 / pause) if pause else 0)
            try:
                await answer(client, question(rng, given.long), load)
            except httpx.HTTPError as error:  # a broken or slow connection is counted, and not the end of the cell
                load.failed += 1
                print(f"client {number}: {error!r}", file=sys.stderr, flush=True)


async def cell(url: str, clients: int, given: argparse.Namespace, server: psutil.Process) -> Load:
    """So many clients for so long, or for so many answers; memory is looked at once a second."""
    load = Load()
    until = math.inf if given.answers else time.monotonic() + given.seconds
    work = asyncio.gather(*(client_of(url, number, until, given, load) for number in range(clients)))
    while not work.done():
        load.megabytes.append(server.memory_info().rss / 2**20)
        load.answers.append(len(load.whole))
        await asyncio.wait([work], timeout=1.0)
    await work
    return load


def percentiles(values: list[float]) -> str:
    """Median, 90th and 99th, in seconds."""
    ordered = sorted(values) or [float("nan")]
    return " / ".join(f"{ordered[min(len(ordered) - 1, int(share * len(ordered)))]:.2f}" for share in (0.5, 0.9, 0.99))


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--clients", default="1,8,32,128")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--answers", type=int, default=0)
    parser.add_argument("--pause", type=float, default=1.0)
    parser.add_argument("--long", type=int, default=0)
    parser.add_argument("--grown", type=float, default=math.inf)
    given = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "cli.main",
        "serve",
        "-m",
        str(given.model.resolve()),
        "--port",
        str(port),
        "--waiting",
        "256",
    ]
    with subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(url, process)
            server, rows, grown = psutil.Process(process.pid), [], 0.0
            for clients in map(int, given.clients.split(",")):
                began, spent = time.monotonic(), sum(server.cpu_times()[:2])
                load = asyncio.run(cell(url, clients, given, server))
                count, seconds = max(1, len(load.whole)), time.monotonic() - began
                spent = 1000 * (sum(server.cpu_times()[:2]) - spent) / count
                told = f"{clients} clients, {count} answers, {spent:.1f} ms of the server's processor each"
                print(f"{told}, memory in MB by tenths: {' '.join(f'{x:.0f}' for x in load.tenths)}", flush=True)
                grown = max(grown, load.tenths[-1] - load.tenths[1])
                rows.append(
                    [str(clients), str(len(load.whole)), str(load.refused), str(load.failed), percentiles(load.first),
                     percentiles(load.whole), f"{len(load.whole) / seconds:.1f}", f"{load.tokens / seconds:.0f}",
                     f"{load.forwards / count:.1f}", f"{load.megabytes[0]:.0f} / {max(load.megabytes):.0f}"]
                )  # fmt: skip
        finally:
            process.terminate()
    header = ["clients", "answers", "refused", "failed", "first text, s (50 / 90 / 99)", "whole answer, s", "answers/s", "tokens/s", "forwards each", "MB begin / most"]  # fmt: skip
    print(f"\nserving: {machine()}, {os.cpu_count()} cores shared with the clients\n\n{table(header, rows)}")
    if grown > given.grown:
        raise SystemExit(
            f"memory grew by {grown:.0f} MB after the first tenth of the answers; {given.grown:.0f} may be"
        )


def _wait(url: str, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        try:
            httpx.get(f"{url}/health")
            return
        except httpx.HTTPError:
            time.sleep(0.2)
    raise SystemExit("the server did not start")


if __name__ == "__main__":
    main()
