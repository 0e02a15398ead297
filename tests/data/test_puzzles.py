"""Puzzles: pure in the seed, right, split by value, and as short as a small model needs."""

import random
from collections import Counter
from functools import partial

import pytest

from llada_core.data import puzzles
from llada_core.data.formats import FORMATS
from llada_core.data.params import PuzzlesParams
from llada_core.data.puzzle_rows import BENCHMARKS, benchmarks, dialogues, prompts, training_puzzles
from llada_core.settings import ConfigError
from llada_core.verifiers.answers import verify

GENERATORS = {"sudoku": puzzles.sudoku, "countdown": puzzles.countdown, "seats": puzzles.seats}
PARTS = ("train", "grpo", "validation", "evaluate")


def drawn(task, part, count=300, seed="7"):
    return list(puzzles.draw(GENERATORS[task], split=part, count=count, seed=seed))


@pytest.mark.parametrize("task", puzzles.TASKS)
def test_same_seed_same_puzzles_and_every_solution_is_right(task):
    first = drawn(task, "train")
    assert first == drawn(task, "train")
    assert first != drawn(task, "train", seed="8")
    assert all(p.task == task and verify(task, p.solution, p.answer) for p in first)
    assert len({p.prompt.replace(p.key, "") for p in first}) > 2


@pytest.mark.parametrize("task", puzzles.TASKS)
def test_no_value_occurs_on_two_sides(task):
    keys = {part: {p.key for p in drawn(task, part, 60, seed=part)} for part in PARTS}
    for one in PARTS:
        for other in PARTS:
            assert one == other or not keys[one] & keys[other]
    assert len(keys["evaluate"]) == len(keys["validation"]) == 60


def test_countdown_value_is_blind_to_order_and_wording():
    puzzle = puzzles.countdown(random.Random(1))
    numbers, target = puzzle.answer["numbers"], puzzle.answer["target"]
    assert puzzles.countdown_key(numbers[::-1], target) == puzzle.key


def test_a_fifth_of_the_grids_is_never_a_training_solution():
    grids, new = set(puzzles.solved_grids()), puzzles.new_grids()
    assert len(grids) == 288
    assert len(new) == 58
    assert new < grids
    shown = {p.solution for part in PARTS for p in drawn("sudoku", part, 1000)}
    assert shown == grids - new


def test_cells_that_break_a_rule_are_found_and_a_grid_is_solved_if_there_are_none():
    solved = "1234341221434321"
    assert puzzles.conflicts(solved) == puzzles.conflicts("0" * 16) == puzzles.conflicts("1" + "0" * 14 + "1") == set()
    assert puzzles.conflicts("10001" + "0" * 11) == {0, 4}, "a column"
    assert puzzles.conflicts("01" + "00" + "10" + "0" * 10) == {1, 4}, "a box"
    assert puzzles.conflicts("1134" + solved[4:]) == {0, 1, 9}
    for at in range(16):
        for digit in "1234":
            grid = solved[:at] + digit + solved[at + 1 :]
            assert puzzles.is_solved(grid) == (not puzzles.conflicts(grid)) == (digit == solved[at])


def test_puzzles_of_new_grids_have_no_other_solution():
    new = list(puzzles.draw(partial(puzzles.sudoku, empty=(7, 9), new=True), split=None, count=100, seed="3"))
    assert len({p.key for p in new}) == 100
    assert all(puzzles.new_grids().issuperset(puzzles.solutions(p.key)) for p in new)
    assert Counter(p.key.count("0") for p in new).keys() == {7, 8, 9}


def test_hasty_answers_are_shown_in_their_share_and_only_the_last_person_keeps_the_seat():
    hasty = partial(puzzles.seats, people=9, hasty=0.6)
    some = list(puzzles.draw(hasty, split="train", count=1000, seed="5"))
    kept = [[a for a, b in zip(p.key, p.shown, strict=True) if a == b] for p in some]
    assert all(verify("seats", p.solution, p.answer) for p in some)
    assert all(stays in ([], [p.key[-1]]) for p, stays in zip(some, kept, strict=True))
    assert 550 < sum(map(len, kept)) < 650
    assert all(sorted(p.shown) == sorted(p.key) for p in some)


def test_asking_for_more_than_there_are_says_so():
    with pytest.raises(ValueError, match=r"seats: only \d+ of 5000 different puzzles exist for evaluate"):
        list(puzzles.draw(partial(puzzles.seats, people=4), split="evaluate", count=5000, seed="seats"))


def drawn_for(stage):
    counts = {"sft": 60, "grpo": 60, "validation": 5}
    params = PuzzlesParams.parse({"sudoku": counts, "countdown": counts, "seats": {**counts, "hasty": 0.5}}, "puzzles")
    return training_puzzles(stage, FORMATS[stage].split, params, seed=0)[0]


def test_the_names_that_a_profile_may_give_are_those_that_are_made(data_root):
    few = {task: {"evaluate": 1} for task in puzzles.TASKS}
    params = PuzzlesParams.parse({**few, "sudoku": {"evaluate": 1, "new_grids": 1}}, "puzzles")
    assert {each.name for each in benchmarks(params, 0, [data_root])} == set(BENCHMARKS)


def test_dialogues_of_fine_tuning_show_every_puzzle_once_in_one_to_four_turns():
    drawn = drawn_for("sft")
    rows = [row["messages"] for row in dialogues(drawn, (0.4, 0.2, 0.2, 0.2))]
    counts = Counter(len(messages) // 2 for messages in rows)
    assert set(counts) == {1, 2, 3, 4}
    assert min(counts.values()) > len(rows) / 10
    said = [m for messages in rows for m in messages]
    assert [m["content"] for m in said if m["role"] == "user"] == [p.prompt for p in drawn]
    assert [m["content"] for m in said if m["role"] == "assistant"] == [p.shown or p.solution for p in drawn]
    assert all([m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2) for messages in rows)


def test_grpo_asks_every_puzzle_once_behind_up_to_three_solved_ones():
    drawn = drawn_for("grpo")
    rows = list(prompts(drawn, (0.4, 0.2, 0.2, 0.2)))
    asked = [[{"role": "user", "content": r["prompt"]}] if isinstance(r["prompt"], str) else r["prompt"] for r in rows]
    assert [messages[-1]["content"] for messages in asked] == [p.prompt for p in drawn]
    assert [row["answer"] for row in rows] == [p.answer for p in drawn]
    assert {len(messages) // 2 for messages in asked} == {0, 1, 2, 3}
    for at, messages in enumerate(asked):
        earlier = [drawn[at - back] for back in range(len(messages) // 2, 0, -1)]
        assert [m["content"] for m in messages[:-1]] == [t for p in earlier for t in (p.prompt, p.solution)]


def test_without_turns_a_dialogue_is_one_question():
    drawn = drawn_for("sft")
    assert all(len(row["messages"]) == 2 for row in dialogues(drawn))
    assert all(isinstance(row["prompt"], str) for row in prompts(drawn))
    with pytest.raises(ConfigError, match=r"dialogues \[0.5, 0.4\]"):
        PuzzlesParams.parse({"dialogues": [0.5, 0.4]}, "data.puzzles")
