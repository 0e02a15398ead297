"""What the page says of puzzles: recognised in their own words, judged by the verifiers, offered where they succeed."""

import pytest

from app.guide import PUZZLES, judged, kinds, offered, recognised
from llada_core.data import puzzles
from llada_core.usage import Usage
from llada_core.verifiers.answers import verify

OWN = Usage(examples=tuple(known.question for known in PUZZLES.values()))
SCORES = {"sudoku": {"1": 1.0, "2": 1.0}, "countdown": {str(n): float(n == 0) for n in range(8)}, "sums": {"1": 1.0}}


@pytest.mark.parametrize("make", [puzzles.sudoku, puzzles.countdown, puzzles.seats])
def test_a_puzzle_is_recognised_in_every_wording_and_its_solution_is_right(make):
    for puzzle in puzzles.draw(make, split="evaluate", count=40, seed="guide"):
        assert recognised(puzzle.prompt) == (puzzle.task, puzzle.answer)
        assert judged(puzzle.prompt, puzzle.solution, OWN).right


def test_the_solved_examples_are_right():
    for kind, known in PUZZLES.items():
        found = recognised(known.question)
        assert found is not None
        assert found[0] == kind
        assert verify(kind, known.answer, found[1])


@pytest.mark.parametrize(
    ("question", "answer", "says"),
    [
        ("Solve the sudoku 1030340020030001", "123434122143432", "Wrong: a solution has 16 digits"),
        ("Solve the sudoku 1030340020030001", "2134341221434321", "Wrong: it changed 1 given digit."),
        ("Solve the sudoku 1030340020030001", "1134341221434321", "repeat a digit"),
        ("Seat these people anew: 168954732", "168954732", "kept their seat"),
        ("Seat these people anew: 123", "321", "Wrong: 2 kept its seat."),
        ("Seat these people anew: 168954732", "1", "not the same people"),
        ("Make 5 from 4, 9, 1", "9*9-9", "it must use 4, 9, 1, each once"),
        ("Make 5 from 4, 9, 1", "4+9+1", "4+9+1 is 14, not 5"),
        ("Make 5 from 4, 9, 1", "4+9+1)", "no sum"),
    ],
)
def test_a_wrong_answer_is_told_why(question, answer, says):
    verdict = judged(question, answer, OWN)
    assert verdict is not None
    assert verdict.right is False
    assert says in verdict.text


def test_a_model_of_puzzles_says_that_it_knows_no_more_and_another_model_is_not_judged():
    assert judged("Who are you?", "42", OWN).right is None
    assert "4x4 sudoku, New seats, Countdown" in judged("Who are you?", "42", OWN).text
    assert judged("Who are you?", "I am.", Usage(examples=("Who are you?",))) is None
    assert kinds(OWN) == ["sudoku", "seats", "countdown"]
    assert kinds(Usage(examples=("Who are you?", *OWN.examples))) == [] == kinds(Usage())


def test_what_seldom_succeeds_is_offered_to_nobody():
    sudokus = tuple(f"Solve the sudoku {n}030340020030001" for n in (1, 2, 4))
    usage = Usage(examples=("Reach 21 with 8, 4, 9", *sudokus, "Seat these people anew: 168954732"))
    assert offered(usage, SCORES) == [*sudokus[:2], "Seat these people anew: 168954732"], "of each kind two"
    assert "Reach 21 with 8, 4, 9" in offered(usage, {}), "nobody knows yet"
    general = Usage(examples=("one", "two", "three"))
    assert offered(general, SCORES) == ["one", "two", "three"]
