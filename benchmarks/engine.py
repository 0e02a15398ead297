"""Many chats at once: `python -m benchmarks.engine [MODEL]`, answers a processor second of one
engine, against a model lent by turns.

Each chat asks again as soon as it is answered, as the page would have it: frames are made and spelled. The two ways take
turns within a round, on the same questions. Then batches: requests of several lengths whose answers end at different
steps, by batches that wait for their longest, and by one queue that fills free places.
"""

import argparse
import statistics
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from app.conversation import Conversation
from app.models import LoadedModel
from llada_core.modeling import load_to_answer
from llada_core.sampling import SamplingParams, Step, generate, stream
from llada_core.tokenizer import Tokenizer
from llada_core.usage import Usage

QUESTIONS = ("Solve the sudoku 1030340020030001", "Make 13 from 8, 3, 8", "Seat these people anew: 438597612")


class ByTurns(LoadedModel):
    """One model lent step by step: every answer is a batch of its own."""

    turn = threading.Lock()

    def write(
        self,
        prompt: list[int],
        params: SamplingParams,
        *,
        fixed_tokens: dict[int, int] | None = None,
        look_ahead: bool = False,
    ) -> Generator[Step, None, None]:
        steps: Iterator[Step] = stream(self.model, [prompt], params, pinned=fixed_tokens, look_ahead=look_ahead)
        while True:
            with self.turn:
                step = next(steps, None)
            if step is None:
                return
            yield step


def answers_per_second(loaded: LoadedModel, params: SamplingParams, chats: int, each: int) -> float:
    """Of the processor; of so many chats, each of which is answered so many times."""

    def talk(number: int) -> None:
        for turn in range(each):
            chat = Conversation()
            chat.ask(QUESTIONS[(number + turn) % len(QUESTIONS)])
            for _ in chat.reply(loaded, params):
                pass

    threads = [threading.Thread(target=talk, args=(number,)) for number in range(chats)]
    began = time.process_time()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return chats * each / (time.process_time() - began)


def rows_per_second(write: Callable[[list[list[int]]], object], prompts: list[list[int]]) -> float:
    """Of answers to a list of prompts."""
    began = time.process_time()
    write(prompts)
    return len(prompts) / (time.process_time() - began)


def batches(loaded: LoadedModel, params: SamplingParams, size: int) -> dict[str, Callable[[list[list[int]]], object]]:
    """The ways to answer a list: batch after batch, and one queue."""

    def one_by_one(prompts: list[list[int]]) -> None:
        for at in range(0, len(prompts), size):
            generate(loaded.model, prompts[at : at + size], params)

    return {
        "batch after batch": one_by_one,
        "one queue": lambda prompts: generate(loaded.model, prompts, params, at_once=size),
    }


def main() -> None:
    """Print medians, and the ratio of each round."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="models/grpo")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--chats", type=int, default=16)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(asked.model).resolve()
    model, tokenizer = load_to_answer(folder, device="cpu"), Tokenizer.load(folder)
    usage = Usage.load(folder) or Usage()
    one = LoadedModel("m", folder, model, tokenizer, usage=usage)
    other = ByTurns("m", folder, model, tokenizer, usage=usage)
    exact = replace(usage.sampling, threshold=None, stop_at_eos=False, steps=usage.sampling.max_new_tokens)
    for name, params in {"recommended": usage.sampling, "exact": exact, "dual": replace(exact, cache="dual")}.items():
        rates: dict[str, list[float]] = {"by turns": [], "engine": []}
        for _ in range(asked.rounds):
            for way, loaded in (("by turns", other), ("engine", one)):
                rates[way].append(answers_per_second(loaded, params, asked.chats, 4))
        report(f"{asked.chats} chats, {name}", rates)
        prompts = [
            tokenizer.chat_ids([{"role": "user", "content": f"{QUESTIONS[n % 3]}{' 1' * (n % 7)}"}]) for n in range(96)
        ]
        ways = batches(one, params, 16)
        timed: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(asked.rounds):
            for way, write in ways.items():
                timed[way].append(rows_per_second(write, prompts))
        report(f"96 requests, 16 at once, {name}", timed)


def report(what: str, rates: dict[str, list[float]]) -> None:
    """One line: each way's median of answers a processor second, and the ratios of the rounds."""
    (slow, before), (fast, after) = rates.items()
    ratios = sorted(b / a for a, b in zip(before, after, strict=True))
    medians = f"{slow} {statistics.median(before):.1f}/s, {fast} {statistics.median(after):.1f}/s"
    print(f"{what}: {medians}, ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})", flush=True)


if __name__ == "__main__":
    main()
