"""ParallelBench's tasks that can be generated (arXiv:2510.04767): ten on a waiting line, Latin squares and 4x4 sudokus.

Prompts, lengths and what is right are as published; the names, lists and squares are made here, from a seed.
"""

import json
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset

from llada_core.verifiers.answers import verify

Document = Mapping[str, Any]
FIRST = ("Ada", "Ben", "Clara", "David", "Elena", "Felix", "Greta", "Hugo", "Iris", "Jonas", "Klara", "Leo", "Mira")
LAST = (
    "Adams",
    "Berger",
    "Costa",
    "Dixon",
    "Evans",
    "Fischer",
    "Gomez",
    "Hansen",
    "Ivanov",
    "Jones",
    "Keller",
    "Lopez",
)
LENGTHS, EACH = (3, 4, 5, 6), 25  # people in a line, questions of each length
HOLES = 8  # of a sudoku's sixteen cells
SYMBOLS, SIZE = "ABCDEFGHKLMNPQRSTUVWXYZ123456789", 4


def questions(kind: str, **_: Any) -> dict[str, Dataset]:
    """100 questions of a kind and one worked example: prompt, an answer that is right, and what the answer is judged by."""
    prompts = yaml.safe_load((Path(__file__).parent / "_parallelbench_prompts.yaml").read_text(encoding="utf-8"))
    generator = random.Random(kind)
    lengths = [4, *(length for length in LENGTHS for _ in range(EACH))]
    made = {"latin_square": _square, "sudoku": _sudoku}.get(kind, _line)
    example, *rows = [made(kind, prompts[kind], length, generator) for length in lengths]
    return {"test": Dataset.from_list(rows), "example": Dataset.from_list([example])}


def _line(kind: str, prompt: str, length: int, generator: random.Random) -> dict[str, Any]:
    last = generator.sample(LAST, length + 1)
    *people, word = [f"{generator.choice(FIRST)} {name}" for name in last]
    insert = kind.startswith("insert")
    index = generator.randrange(length + insert)
    answer = list(people)
    if kind in ("reverse", "sort"):
        answer = people[::-1] if kind == "reverse" else sorted(people, key=lambda person: person.split()[1])
    elif kind == "shuffle":
        answer = people[1:] + people[:1]
    elif insert:
        answer.insert(index, word)
    elif kind.startswith("remove"):
        answer.pop(index)
    elif kind.startswith("replace"):
        answer[index] = word
    asked = prompt.format(context=json.dumps(people), word=word, index=index)
    return {"prompt": asked, "answer": json.dumps(answer), "kind": kind, "given": people, "word": word}


def _square(kind: str, prompt: str, length: int, generator: random.Random) -> dict[str, Any]:
    symbols = generator.sample(SYMBOLS, SIZE)
    rows = [symbols[i:] + symbols[:i] for i in range(SIZE)]
    generator.shuffle(rows)
    answer = "\n".join(map(",".join, rows))
    asked = prompt.format(context=f"[{', '.join(symbols)}]")
    return {"prompt": asked, "answer": answer, "kind": kind, "given": symbols, "word": ""}


def _sudoku(kind: str, prompt: str, length: int, generator: random.Random) -> dict[str, Any]:
    """A full grid, rows and columns moved within and with their bands and digits renamed, and eight of its cells emptied."""
    rows, columns = ([2 * band + i for band in _mixed(2, generator) for i in _mixed(2, generator)] for _ in range(2))
    digits = generator.sample("1234", SIZE)
    full = [digits[(2 * (row % 2) + row // 2 + column) % SIZE] for row in rows for column in columns]
    empty = set(generator.sample(range(SIZE * SIZE), HOLES))
    given = ["_" if n in empty else digit for n, digit in enumerate(full)]
    asked, answer = ("\n".join("".join(c[i : i + SIZE]) for i in range(0, SIZE * SIZE, SIZE)) for c in (given, full))
    return {"prompt": prompt.format(context=asked), "answer": answer, "kind": kind, "given": given, "word": ""}


def _mixed(count: int, generator: random.Random) -> list[int]:
    return generator.sample(range(count), count)


def results(document: Document, replies: list[str]) -> dict[str, float]:
    """Whether a reply is one of the right answers: there are several where something is to be random."""
    return {"right": float(right(document, replies[0]))}


def right(document: Document, reply: str) -> bool:
    """The same, as a truth value; a reply without a list, or without a square, is wrong."""
    kind, given, word = document["kind"], list(document["given"]), document["word"]
    if kind == "latin_square":
        rows = [[cell.strip() for cell in line.split(",")] for line in reply.strip().splitlines()]
        square = len(rows) == SIZE and all(len(row) == SIZE for row in rows)
        return square and all(sorted(line) == sorted(given) for line in [*rows, *map(list, zip(*rows, strict=True))])
    if kind == "sudoku":
        return verify("sudoku", "".join(reply.split()), {"puzzle": "".join(given).replace("_", "0")})
    people = _list_in(reply)
    if people is None:
        return False
    if kind == "shuffle":
        return people != given and sorted(people) == sorted(given)
    if kind == "insert_random":
        return any([*given[:i], word, *given[i:]] == people for i in range(len(given) + 1))
    if kind == "remove_random":
        return any(given[:i] + given[i + 1 :] == people for i in range(len(given)))
    if kind == "replace_random":
        return any([*given[:i], word, *given[i + 1 :]] == people for i in range(len(given)))
    return people == json.loads(document["answer"])


def _list_in(reply: str) -> list[str] | None:
    found = re.search(r"\[.*?\]", reply, re.DOTALL)
    try:
        people = json.loads(found.group()) if found else None
    except json.JSONDecodeError:
        return None
    return people if isinstance(people, list) and all(isinstance(person, str) for person in people) else None
