"""What counts as a right answer to a puzzle, and what does not."""

import pytest

from llada_core.data.params import PuzzlesParams
from llada_core.data.puzzle_rows import benchmarks
from llada_core.verifiers.answers import unfit, value, verify

SUDOKU = {"puzzle": "0200040200034320"}
COUNTDOWN = {"numbers": [2, 4, 20], "target": 26}


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("1234341221434321", True),
        (" 1234\n3412 2143\n4321 ", True),
        ("<reasoning>1</reasoning><answer>1234341221434321</answer>", True),
        ("1234341221434312", False),  # not valid
        ("2143342112344312", False),  # valid, but does not keep the givens
        ("123434122143432", False),
        ("12343412214343211", False),
        ("0234341221434321", False),
        ("The answer is 1234341221434321", False),
        ("", False),
    ],
)
def test_sudoku(text, right):
    assert verify("sudoku", text, SUDOKU) is right


def test_a_sudoku_of_several_solutions_accepts_each():
    puzzle = {"puzzle": "1234341200000000"}
    assert verify("sudoku", "1234341221434321", puzzle)
    assert verify("sudoku", "1234341243212143", puzzle)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("2+4+20", True),
        (" 20 + (4 + 2) ", True),
        ("<answer>1</answer><answer>20+4+2</answer>", True),
        ("2+4+20=26", False),
        ("26", False),
        ("2+4+20+0", False),
        ("2+24", False),
        ("2+4+20)", False),
        ("2+4+20;", False),
        ("20+2**4-10", False),
        ("", False),
        ("(" * 5000, False),
    ],
)
def test_countdown(text, right):
    assert verify("countdown", text, COUNTDOWN) is right


def test_countdown_is_exact_and_refuses_powers():
    assert verify("countdown", "8/(3-8/3)", {"numbers": [3, 3, 8, 8], "target": 24})
    assert value("7**7") is None
    assert value("9**9**9") is None
    assert value("1/0") is None
    assert value("-3+5") == 2
    assert value("3 5") is None


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("2143", True),
        ("4321", True),
        (" 2 1 4 3 ", True),
        ("2134", False),
        ("1243", False),
        ("2144", False),
        ("21435", False),
        ("2143.", False),
        ("", False),
    ],
)
def test_seats(text, right):
    assert verify("seats", text, {"order": "1234"}) is right


def test_an_unknown_task_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'sudoku'"):
        verify("sodoku", "", {})


def test_what_a_verifier_reads_is_in_every_puzzle_and_its_lack_is_said():
    counts = {name: {"evaluate": 3} for name in ("sudoku", "countdown", "seats")}
    for made in benchmarks(PuzzlesParams.model_validate(counts), 0, []):
        assert [unfit(row["task"], row["answer"]) for row in made.rows] == [None] * len(made.rows)
    assert unfit("seats", {}) == (
        "the verifier of 'seats' needs 'order', a text, a letter or digit for each person, which is not there"
    )
    assert "which is [3, 'x']" in unfit("countdown", {"numbers": [3, "x"], "target": 3})
    for task in ("gsm8k", "math", "text"):
        assert unfit(task, {"answer": 4}) is None
        assert "'answer', a text or a number, which is None" in unfit(task, {"answer": None})
