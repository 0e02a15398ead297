"""Generated puzzles as rows of the training stages and as evaluation files."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from llada_core.data import puzzles
from llada_core.data.params import PuzzleCounts, PuzzlesParams, SourceParams
from llada_core.data.puzzles import Puzzle, PuzzleSplit
from llada_core.data.sources import DataError, Row, UnusableRow, find, read, split_file

NEW_GRIDS = "sudoku_new_grids"
PUBLISHED = {"sudoku": "sudoku4x4", "countdown": "countdown"}  # task -> data set with puzzles that were published
# The names that `benchmarks` may give.
BENCHMARKS = (*puzzles.TASKS, NEW_GRIDS, *(f"{task}_published" for task in PUBLISHED))


@dataclass(frozen=True)
class Benchmark:
    """Puzzles to be evaluated on; `keys` are their values, `note` fields are added to each row's own."""

    name: str
    rows: list[dict[str, Any]]
    keys: list[str] = field(default_factory=list)


def training_puzzles(
    part: str, split: PuzzleSplit, params: PuzzlesParams, seed: int
) -> tuple[list[Puzzle], list[Puzzle]]:
    """The puzzles that `params` count for a part, of `split` for training and for validation, each in mixed order."""
    train: list[Puzzle] = []
    validation: list[Puzzle] = []
    for task, counts, generate in _generators(params):
        count = getattr(counts, part)
        if count:
            train += puzzles.draw(generate, split=split, count=count, seed=f"{seed}:{task}:{part}")
            name = f"data.puzzles.{task}.validation ({seed})"
            validation += puzzles.draw(generate, split="validation", count=counts.validation, seed=name)
    for drawn in (train, validation):
        random.Random(f"{seed}:{part}:order").shuffle(drawn)
    return train, validation


# Each gives what the encoder of one format reads. `shares[n - 1]` is the share of dialogues with n questions.


def documents(drawn: list[Puzzle], shares: Sequence[float] = (1.0,)) -> Iterator[Row]:
    """One text a puzzle."""
    yield from ({"text": puzzle.text} for puzzle in drawn)


def dialogues(drawn: list[Puzzle], shares: Sequence[float] = (1.0,)) -> Iterator[Row]:
    """Each puzzle once, in the dialogues that the list is cut into."""
    questions, start = _questions(drawn, shares), 0
    while start < len(drawn):
        end = start + next(questions)
        yield {"messages": [m for puzzle in drawn[start:end] for m in _asked(puzzle, puzzle.shown)]}
        start = end


def prompts(drawn: list[Puzzle], shares: Sequence[float] = (1.0,)) -> Iterator[Row]:
    """Each puzzle asked once, behind the solved ones that precede it in the list (of the first ones, those that end it)."""
    for number, (puzzle, questions) in enumerate(zip(drawn, _questions(drawn, shares), strict=False)):
        history = [drawn[number - back] for back in range(questions - 1, 0, -1)]
        messages = [m for earlier in history for m in _asked(earlier)]
        prompt = [*messages, {"role": "user", "content": puzzle.prompt}] if messages else puzzle.prompt
        yield {"prompt": prompt, "task": puzzle.task, "answer": puzzle.answer}


def pairs(drawn: list[Puzzle], shares: Sequence[float] = (1.0,)) -> Iterator[Row]:
    """Each puzzle with its solution, and with one that has a wrong digit."""
    for number, puzzle in enumerate(drawn):
        yield {"prompt": puzzle.prompt, "chosen": puzzle.solution, "rejected": _wrong(puzzle, number)}


def _questions(drawn: list[Puzzle], shares: Sequence[float]) -> Iterator[int]:
    """How many questions the next dialogue has, without an end."""
    rng = random.Random(f"dialogues of {len(drawn)}")
    while True:
        yield rng.choices(range(1, len(shares) + 1), shares)[0]


def _asked(puzzle: Puzzle, reply: str = "") -> list[dict[str, str]]:
    """One turn of a dialogue; the reply is the solution unless another one is given."""
    return [
        {"role": "user", "content": puzzle.prompt},
        {"role": "assistant", "content": reply or puzzle.solution},
    ]


def keys_of(drawn: list[Puzzle]) -> set[str]:
    """The values of puzzles, each with its task before it."""
    return {f"{puzzle.task}:{puzzle.key}" for puzzle in drawn}


def benchmarks(params: PuzzlesParams, seed: int, roots: list[Path]) -> list[Benchmark]:
    """Held-out puzzles of every task, sudokus with grids never shown, and the published sets that a data root holds."""
    found = []
    for task, counts, generate in _generators(params):
        if counts.evaluate:
            name = f"data.puzzles.{task}.evaluate ({seed})"
            drawn = list(puzzles.draw(generate, split="evaluate", count=counts.evaluate, seed=name))
            found.append(_benchmark(task, drawn))
            found += _published(task, seed, roots)
    sudoku = params.sudoku
    if sudoku.new_grids:
        generate = partial(puzzles.sudoku, empty=sudoku.empty, new=True)
        name = f"data.puzzles.sudoku.new_grids ({seed})"
        drawn = list(puzzles.draw(generate, split=None, count=sudoku.new_grids, seed=name))
        found.append(_benchmark(NEW_GRIDS, drawn))
    return found


def _generators(params: PuzzlesParams) -> list[tuple[str, PuzzleCounts, Callable[[random.Random], Puzzle]]]:
    return [
        ("sudoku", params.sudoku, partial(puzzles.sudoku, empty=params.sudoku.empty)),
        ("countdown", params.countdown, partial(puzzles.countdown, largest=params.countdown.largest)),
        ("seats", params.seats, partial(puzzles.seats, people=params.seats.people, hasty=params.seats.hasty)),
    ]


def _benchmark(name: str, drawn: list[Puzzle]) -> Benchmark:
    rows = [
        {
            "id": f"{name}-{i}",
            "task": puzzle.task,
            "prompt": puzzle.prompt,
            "answer": puzzle.answer,
            "solution": puzzle.solution,
        }
        for i, puzzle in enumerate(drawn)
    ]
    return Benchmark(name, rows, [f"{puzzle.task}:{puzzle.key}" for puzzle in drawn])


def _published(task: str, seed: int, roots: list[Path]) -> list[Benchmark]:
    """d1's test set of a task, worded as this run's own puzzles, when a root holds it."""
    name = PUBLISHED.get(task)
    if name is None or not any(split_file(root / name, "test") for root in roots):
        return []
    source = SourceParams(name=name, split="test")
    benchmark = Benchmark(f"{task}_published", [])
    origin = find(source, "evaluate", roots)
    for number, row in read(source, origin):
        if isinstance(row, UnusableRow):  # what is measured is measured whole
            raise DataError(f"{origin.place}, {row.told}")
        rng = random.Random(f"{seed}:{name}:{number}")
        answer: dict[str, Any]
        if task == "sudoku":
            puzzle = str(row["Puzzle"]).zfill(16)
            prompt, answer, key = puzzles.sudoku_prompt(puzzle, rng), {"puzzle": puzzle}, puzzle
        else:
            numbers, target = [int(n) for n in row["input"].split(",")], int(row["output"])
            prompt, key = puzzles.countdown_prompt(numbers, target, rng), puzzles.countdown_key(numbers, target)
            answer = {"numbers": numbers, "target": target}
        benchmark.rows.append({"id": f"{task}_published-{number}", "task": task, "prompt": prompt, "answer": answer})
        benchmark.keys.append(f"{task}:{key}")
    return [benchmark]


def _wrong(puzzle: Puzzle, number: int) -> str:
    """The solution with one digit replaced, which makes it wrong in each of the tasks."""
    digits = [i for i, character in enumerate(puzzle.solution) if character.isdigit()]
    place = digits[number % len(digits)]
    other = str(int(puzzle.solution[place]) % 4 + 1)
    return puzzle.solution[:place] + other + puzzle.solution[place + 1 :]
