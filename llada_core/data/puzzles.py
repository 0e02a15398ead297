"""Puzzles drawn from a seed: 4x4 sudoku, countdown with three numbers, and giving everyone at a table a new seat.

A generator is a pure function of the random stream it is given. Which side a puzzle belongs to (training, GRPO,
validation, evaluation) is decided by a hash of its value alone, so no wording, seed or count can leak one.
"""

import hashlib
import itertools
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

PuzzleSplit = Literal["train", "grpo", "validation", "evaluate"]
Task = Literal["sudoku", "countdown", "seats"]
TASKS: tuple[Task, ...] = ("sudoku", "countdown", "seats")

# Upper ends of the hash ranges: 15 % evaluation, 5 % validation, 20 % GRPO, the rest pretraining and SFT.
_SPLITS: tuple[tuple[float, PuzzleSplit], ...] = (
    (0.15, "evaluate"),
    (0.20, "validation"),
    (0.40, "grpo"),
    (1.0, "train"),
)

# The cells of each column, box and row of a 4x4 sudoku, numbered in row order. Rows come last: the grids that
# `solved_grids` tries are made of whole rows, so the first units asked are those that can fail.
UNITS: tuple[tuple[int, ...], ...] = (
    *(tuple(range(i, 16, 4)) for i in range(4)),
    *((i, i + 1, i + 4, i + 5) for i in (0, 2, 8, 10)),
    *(tuple(range(4 * i, 4 * i + 4)) for i in range(4)),
)


@dataclass(frozen=True)
class Puzzle:
    """One puzzle: `prompt` as a person asks it, `solution` as one right answer, `answer` as the verifier reads it.

    `key` is the value of the puzzle, equal for equal puzzles however they are worded: a sudoku's 16 givens in row order
    (0 for an empty cell), countdown's numbers and target, the order in which people sit. `text` is the solved puzzle as a
    plain sentence for pretraining. `shown`, if any, is what fine-tuning shows in place of the solution.
    """

    task: Task
    key: str
    prompt: str
    solution: str
    text: str
    answer: dict[str, str | int | list[int]]
    shown: str = ""


def split_of(task: str, key: str) -> PuzzleSplit:
    """The only side on which a puzzle of this value may occur."""
    share = _hash(f"{task}:{key}") / 2**64
    return next(split for end, split in _SPLITS if share < end)


def countdown_key(numbers: list[int], target: int) -> str:
    """Value of a countdown puzzle: the sorted numbers and the target."""
    return f"{','.join(map(str, sorted(numbers)))}={target}"


def is_solved(grid: str) -> bool:
    """Whether 16 digits from 1 to 4, in row order, break no rule of sudoku."""
    return all(len({grid[i] for i in unit}) == 4 for unit in UNITS)


def conflicts(grid: str) -> set[int]:
    """The cells of a grid (0: empty) whose digit occurs twice in a row, column or box."""
    return {i for unit in UNITS for i in unit if grid[i] != "0" and sum(grid[j] == grid[i] for j in unit) > 1}


@cache
def solved_grids() -> tuple[str, ...]:
    """All 288 solved 4x4 sudokus, as 16 digits in row order."""
    rows = ["".join(p) for p in itertools.permutations("1234")]
    return tuple(grid for grid in map("".join, itertools.product(rows, repeat=4)) if is_solved(grid))


@cache
def new_grids() -> frozenset[str]:
    """The fifth of all solved grids (58 of 288) that no training example ever shows as its solution."""
    grids = sorted(solved_grids(), key=lambda grid: _hash(f"grid:{grid}"))
    return frozenset(grids[: round(len(grids) / 5)])


def solutions(puzzle: str) -> list[str]:
    """Every solved grid that keeps the givens of `puzzle`."""
    givens = [(i, digit) for i, digit in enumerate(puzzle) if digit != "0"]
    return [grid for grid in solved_grids() if all(grid[i] == digit for i, digit in givens)]


def sudoku(rng: random.Random, *, empty: tuple[int, int] = (4, 11), new: bool = False) -> Puzzle:
    """A sudoku with an even chance of each number of empty cells in `empty`; it may have several solutions.

    Its solution is never one of `new_grids()`; with `new`, all of its solutions are.
    """
    if new:
        grid = rng.choice(sorted(new_grids()))
        while True:
            puzzle = _with_holes(grid, rng, empty)
            if new_grids().issuperset(solutions(puzzle)):
                break
    else:
        grid = rng.choice(_training_grids())
        puzzle = _with_holes(grid, rng, empty)
    return Puzzle(
        task="sudoku",
        key=puzzle,
        prompt=sudoku_prompt(puzzle, rng),
        solution=grid,
        text=rng.choice(_SUDOKU_TEXTS).format(puzzle=puzzle, grid=grid),
        answer={"puzzle": puzzle},
    )


def sudoku_prompt(puzzle: str, rng: random.Random) -> str:
    """One of the wordings in which a sudoku is asked."""
    return rng.choice(_SUDOKU_PROMPTS).format(puzzle=puzzle)


def countdown(rng: random.Random, *, largest: int = 9) -> Puzzle:
    """Three numbers from 1 to `largest` and a target from 1 to 99 that they reach in some order without brackets."""
    while True:
        numbers = [rng.randint(1, largest) for _ in range(3)]
        expression, target = _expression(rng, numbers)
        if 1 <= target <= 99:
            break
    rng.shuffle(numbers)
    return Puzzle(
        task="countdown",
        key=countdown_key(numbers, target),
        prompt=countdown_prompt(numbers, target, rng),
        solution=expression,
        text=rng.choice(_COUNTDOWN_TEXTS).format(*numbers, target=target, expression=expression),
        answer={"numbers": numbers, "target": target},
    )


def countdown_prompt(numbers: list[int], target: int, rng: random.Random) -> str:
    """One of the wordings in which a countdown puzzle is asked."""
    return rng.choice(_COUNTDOWN_PROMPTS).format(*numbers, target=target)


def seats(rng: random.Random, *, people: int = 8, hasty: float = 0.0) -> Puzzle:
    """People 1 to `people` in some order, to be seated anew so that nobody keeps a seat (a derangement).

    The solution given is the plainest: everyone moves one seat on. With probability `hasty` the shown answer forgets
    the last person, who stays.
    """
    order = list("123456789"[:people])
    rng.shuffle(order)
    before, after = "".join(order), "".join(order[-1:] + order[:-1])
    shown = "".join(order[-2:-1] + order[:-2] + order[-1:]) if rng.random() < hasty else after
    return Puzzle(
        task="seats",
        key=before,
        prompt=rng.choice(_SEATS_PROMPTS).format(order=before),
        solution=after,
        text=rng.choice(_SEATS_TEXTS).format(before=before, after=after),
        answer={"order": before},
        shown=shown,
    )


def wordings(task: str) -> tuple[str, ...]:
    """Every wording in which a task's puzzles are asked, as `worded` takes it; none for a task that is not made here."""
    return _PROMPTS.get(task, ())


def worded(wording: str, answer: Mapping[str, Any]) -> str:
    """The puzzle whose `Puzzle.answer` this is, asked in a wording of its task."""
    return wording.format(*answer.get("numbers", ()), **answer)


def draw(
    generate: Callable[[random.Random], Puzzle], *, split: PuzzleSplit | None, count: int, seed: str
) -> Iterator[Puzzle]:
    """`count` puzzles that `generate` makes for one side; None: whatever it makes.

    Only the training sides repeat a value. Raises ValueError, naming `seed`, when there are not enough different ones.
    """
    rng = random.Random(f"{seed}:{split}")
    distinct = split not in ("train", "grpo")
    seen: set[str] = set()
    found = misses = 0
    while found < count:
        puzzle = generate(rng)
        if (split is not None and split_of(puzzle.task, puzzle.key) != split) or puzzle.key in seen:
            misses += 1
            if misses > _MISSES:
                raise ValueError(f"{seed}: only {found} of {count} different puzzles exist for {split}; ask for fewer")
            continue
        if distinct:
            seen.add(puzzle.key)
        found, misses = found + 1, 0
        yield puzzle


_MISSES = 20_000  # in a row, before the puzzles of a side count as used up
# Every wording ends with its data, so that an answer always sits equally far behind what it is made from.
_SUDOKU_PROMPTS = (
    "Solve the sudoku {puzzle}",
    "Fill in this sudoku: {puzzle}",
    "Complete the sudoku grid {puzzle}",
)
_SUDOKU_TEXTS = (
    "The sudoku {puzzle} has the solution {grid}.",
    "The sudoku grid {puzzle} is complete as {grid}.",
    "Sudoku: {puzzle} Solution: {grid}",
)
_COUNTDOWN_PROMPTS = (
    "Make {target} from {0}, {1}, {2}",
    "Reach {target} with {0}, {1}, {2}",
    "Write {target} with the numbers {0}, {1}, {2}",
)
_COUNTDOWN_TEXTS = (
    "To make {target} from {0}, {1}, {2} write {expression}.",
    "To reach {target} with {0}, {1}, {2} write {expression}.",
    "{expression} = {target}.",
    "{target} = {expression}.",
)
_SEATS_PROMPTS = (
    "Give everyone a new seat: {order}",
    "Nobody may keep a seat: {order}",
    "Seat these people anew: {order}",
)
_PROMPTS: dict[str, tuple[str, ...]] = {
    "sudoku": _SUDOKU_PROMPTS,
    "countdown": _COUNTDOWN_PROMPTS,
    "seats": _SEATS_PROMPTS,
}
_SEATS_TEXTS = (
    "From {before} everyone moves to {after}.",
    "The seats {before} become {after}.",
)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


@cache
def _training_grids() -> tuple[str, ...]:
    return tuple(grid for grid in solved_grids() if grid not in new_grids())


def _with_holes(grid: str, rng: random.Random, empty: tuple[int, int]) -> str:
    holes = set(rng.sample(range(16), rng.randint(*empty)))
    return "".join("0" if i in holes else digit for i, digit in enumerate(grid))


def _expression(rng: random.Random, numbers: list[int]) -> tuple[str, int]:
    """A random expression of three numbers without brackets, and its value."""
    (a, b, c), first, second = numbers, rng.choice("+-*"), rng.choice("+-*")
    if second == "*" and first != "*":
        return f"{a}{first}{b}{second}{c}", _apply(a, first, b * c)
    return f"{a}{first}{b}{second}{c}", _apply(_apply(a, first, b), second, c)


def _apply(left: int, operator: str, right: int) -> int:
    return {"+": left + right, "-": left - right, "*": left * right}[operator]
