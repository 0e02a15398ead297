"""The generated tasks of ParallelBench: every example is right, and what is nearly right is wrong."""

import json
from itertools import pairwise

import pytest

from llada_core.evaluation.definitions.parallelbench import questions, right

KINDS = ["copy", "reverse", "sort", "shuffle", "latin_square", "sudoku"]
KINDS += [f"{what}_{where}" for what in ("insert", "remove", "replace") for where in ("index", "random")]


@pytest.mark.parametrize("kind", KINDS)
def test_a_hundred_questions_whose_answers_are_right_and_others_wrong(kind):
    made, again = questions(kind, version=1.0), questions(kind)
    rows = list(made["test"])
    assert rows == list(again["test"])
    assert (len(rows), len(made["example"])) == (100, 1)
    assert all(right(row, row["answer"]) for row in rows)
    assert (
        sum(right(row, other["answer"]) for row, other in pairwise(rows)) <= 3
    )  # of 288 grids, neighbours are alike now and then
    assert not any(right(row, "") or right(row, "[") or right(row, '["x", 1]') for row in rows)
    if kind not in ("latin_square", "sudoku"):
        assert sorted({len(row["given"]) for row in rows}) == [3, 4, 5, 6]
        assert not any(right(row, json.dumps([*row["given"], row["word"], row["word"]])) for row in rows)


def test_any_random_place_is_right_and_nothing_else():
    row = {"kind": "insert_random", "given": ["a", "b"], "word": "w", "answer": ""}
    assert all(right(row, f"Sure: {json.dumps(line)}.") for line in (["w", "a", "b"], ["a", "w", "b"], ["a", "b", "w"]))
    assert not right(row, '["w", "b", "a"]')
    shuffled = {**row, "kind": "shuffle"}
    assert right(shuffled, '["b", "a"]')
    assert not right(shuffled, '["a", "b"]')
    removed = {**row, "kind": "remove_random"}
    assert right(removed, '["b"]')
    assert not right(removed, "[]")
    sudoku = {"kind": "sudoku", "given": list("_41__2_3__3_4_21"), "word": "", "answer": ""}
    assert right(sudoku, "3412\n1243\n2134\n4321")
    assert not right(sudoku, "3412\n1243\n2134\n4312")
    assert not right(sudoku, "1234\n3412\n2143\n4321")  # a solution, of another puzzle
    square = {"kind": "latin_square", "given": list("ABCD"), "word": "", "answer": ""}
    assert right(square, "A,B,C,D\nB,C,D,A\nC,D,A,B\nD,A,B,C")
    assert not right(square, "A,B,C,D\nA,B,C,D\nC,D,A,B\nD,A,B,C")
