"""What the page says of puzzles: each in one line with a solved example; whether an answer is right, and why not."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llada_core.data.puzzles import conflicts
from llada_core.usage import Usage
from llada_core.verifiers.answers import value, verify

OFTEN = 0.5  # share of right answers from which a kind of puzzle is offered as an example
EACH = 2  # examples offered of one kind


@dataclass(frozen=True)
class Known:
    """A kind of puzzle for people: what is asked, and one with its answer."""

    title: str
    says: str
    question: str
    answer: str


PUZZLES: dict[str, Known] = {
    "sudoku": Known(
        "4x4 sudoku",
        "16 cells, row by row: fill the zeros so that every row, column and 2x2 box holds 1 to 4.",
        "Solve the sudoku 1030340020030001",
        "1234341221434321",
    ),
    "seats": Known(
        "New seats",
        "Every digit is a person; seat the same people anew so that nobody keeps a seat.",
        "Seat these people anew: 168954732",
        "216895473",
    ),
    "countdown": Known(
        "Countdown",
        "Reach a number with +, - and *, each of the three others used once.",
        "Reach 21 with 8, 4, 9",
        "8+4+9",
    ),
}


@dataclass(frozen=True)
class Verdict:
    """What can be said of an answer: right, wrong, or (None) that nothing can be expected of it."""

    right: bool | None
    text: str


def recognised(question: str) -> tuple[str, dict[str, Any]] | None:
    """The kind of puzzle that a question asks, and what its verifier compares an answer with; None for anything else."""
    if found := re.search(r"(?<!\d)[0-4]{16}(?!\d)", question):
        return "sudoku", {"puzzle": found[0]}
    if found := re.search(r"\b(?:make|reach|write)\s+(\d+)\s+(?:from|with|with the numbers)\s+(\d+(?:\s*,\s*\d+)+)", question, re.IGNORECASE):  # fmt: skip
        return "countdown", {"numbers": [int(n) for n in found[2].split(",")], "target": int(found[1])}
    found = re.search(r"\bseat(?:s|ed)?\b.*?(?<!\d)([1-9]{2,9})(?!\d)", question, re.IGNORECASE)
    if found and len(set(found[1])) == len(found[1]):
        return "seats", {"order": found[1]}
    return None


def kinds(usage: Usage) -> list[str]:
    """The kinds of puzzle among a model's example questions, in the order of `PUZZLES`; none where one is no puzzle."""
    asked = [recognised(question) for question in usage.examples]
    found = {puzzle[0] for puzzle in asked if puzzle}
    return [kind for kind in PUZZLES if kind in found] if all(asked) else []


def judged(question: str, answer: str, usage: Usage) -> Verdict | None:
    """Whether an answer is right where that can be checked; of a model that knows puzzles alone, that it knows no more."""
    if (asked := recognised(question)) is None:
        known = [PUZZLES[kind].title for kind in kinds(usage)]
        none = (
            f"This is none of the puzzles that the model was trained on ({', '.join(known)}): its answer means nothing."
        )
        return Verdict(None, none) if known else None
    kind, wanted = asked
    right = verify(kind, answer, wanted)
    said = _REASONS[kind](re.sub(r"\s", "", answer), wanted)
    return Verdict(right, f"Right: {_RIGHT[kind]}." if right else f"Wrong: {said}.")


_RIGHT = {
    "sudoku": "every row, column and box holds 1 to 4, and the given digits are kept",
    "seats": "the same people, and nobody keeps a seat",
    "countdown": "every number is used once, and the value is the one asked for",
}


def _wrong_sudoku(answer: str, wanted: Mapping[str, Any]) -> str:
    if re.fullmatch("[1-4]{16}", answer) is None:
        return "a solution has 16 digits from 1 to 4"
    changed = [
        i for i, (given, now) in enumerate(zip(wanted["puzzle"], answer, strict=True)) if given not in ("0", now)
    ]
    if changed:
        return f"it changed {_some(len(changed), 'given digit')}"
    return f"{_some(len(conflicts(answer)), 'cell')} repeat a digit of their row, column or box"


def _wrong_seats(answer: str, wanted: Mapping[str, Any]) -> str:
    if sorted(answer) != sorted(wanted["order"]):
        return "these are not the same people"
    kept = [now for before, now in zip(wanted["order"], answer, strict=True) if before == now]
    return f"{' and '.join(kept)} kept {'its' if len(kept) == 1 else 'their'} seat"


def _wrong_countdown(answer: str, wanted: Mapping[str, Any]) -> str:
    if sorted(re.findall(r"\d+", answer)) != sorted(map(str, wanted["numbers"])):
        return f"it must use {', '.join(map(str, wanted['numbers']))}, each once"
    found = value(answer)
    return "this is no sum of them" if found is None else f"{answer} is {found}, not {wanted['target']}"


def _some(count: int, what: str) -> str:
    return f"{count} {what}{'s' if count > 1 else ''}"


_REASONS: dict[str, Callable[[str, Mapping[str, Any]], str]] = {
    "sudoku": _wrong_sudoku,
    "seats": _wrong_seats,
    "countdown": _wrong_countdown,
}


def seldom(scores: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The kinds that the model was measured on and answers right less often than `OFTEN`."""
    return [kind for kind in PUZZLES if (each := scores.get(kind)) and sum(each.values()) / len(each) < OFTEN]


def offered(usage: Usage, scores: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The example questions to offer: `EACH` of a kind of puzzle, none of a kind that seldom succeeds, other texts all."""
    found: list[str] = []
    count: dict[str, int] = {}
    for question in usage.examples:
        kind = (recognised(question) or ("",))[0]
        count[kind] = count.get(kind, 0) + 1
        if not kind or (count[kind] <= EACH and kind not in seldom(scores)):
            found.append(question)
    return sorted(found, key=lambda question: list(PUZZLES).index((recognised(question) or ("countdown",))[0]))
