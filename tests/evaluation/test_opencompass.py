"""Answers are read as OpenCompass reads them: its rules were run beside ours on 60,000 made-up replies of each kind."""

import random

import pytest
from datasets import Dataset

from llada_core.evaluation.definitions import opencompass


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("The answer is (C), as A is wrong", "C"),
        ("The correct answer is: D", "D"),
        ("answer: B", "B"),
        ("ANSWER: b, or so", "A"),  # the word itself
        ("A is wrong, so it is B", "B"),  # a letter that ends the reply goes before others
        ("Of 10 birds C and A flew", "A"),  # after "1": the first by letter
        ("nothing", ""),
        ("Cats", "C"),
    ],
)
def test_the_first_option_that_a_pattern_finds(reply, letter):
    assert opencompass.first_option(reply, "ABCD") == letter


def test_numbers_end_where_the_next_question_begins():
    assert opencompass.last_number("18 eggs and 2.50 cost 9.0\nQuestion: 7?") == "9"
    assert opencompass.last_number("It is 1,000") == "0"  # theirs knows no commas
    assert opencompass.last_number("-3.5") == "-3.5"
    assert opencompass.last_number("many") == "NULL"


@pytest.mark.parametrize(
    ("reply", "solution", "same"),
    [
        (r"so \boxed{\dfrac12}", r"\boxed{\frac{1}{2}}", True),
        (r"\boxed{1/2}", r"\boxed{\frac{1}{2}}", True),
        (r"\boxed{10,000}", r"\boxed{10000}", True),
        (r"\boxed{x=5}", r"\boxed{5}", True),
        (r"\boxed{5 \text{ cm}}", r"\boxed{5}", True),
        (r"\boxed{50\%}", r"\boxed{50}", True),
        ("The final answer is $7$. I hope", r"\boxed{7}", True),
        (r"\boxed{6}", r"\boxed{7}", False),
        ("7", "no box", False),
        ("", r"\boxed{7}", False),
    ],
)
def test_boxed_answers(reply, solution, same):
    assert opencompass.same_answer(reply, solution) is same


def test_programs_between_their_marks():
    assert opencompass.marked_program("[BEGIN]\n 'def f():\n  return 1' \n[DONE] \n\n ") == "def f():\n  return 1"
    assert opencompass.marked_program("```python\nx = 1\n``` so") == "x = 1"
    assert opencompass.marked_program("x = 1") == "x = 1"
    ((program,),) = opencompass.after_prompt_in_fence([["Sure:\n```python\n  x\n```\n```\ny```"]], [{"prompt": "P"}])
    assert program == "Px\n"


def test_gpqa_is_shuffled_row_after_row_and_asked_after_five_examples():
    rows = [
        {"Question": f"Q{i}", "Correct Answer": "r", **{f"Incorrect Answer {k}": f"w{k}" for k in (1, 2, 3)}}
        for i in range(6)
    ]
    documents = opencompass.with_shuffled_choices(Dataset.from_list(rows))
    generator = random.Random(0)
    for document in documents:
        expected = ["r", "w1", "w2", "w3"]
        generator.shuffle(expected)
        assert [document[letter] for letter in "ABCD"] == expected
        assert document[document["answer"]] == "r"
    prompt = opencompass.gpqa_prompt(documents[0])
    assert prompt.startswith("\nHere are some example questions from experts.")
    assert prompt.count("The correct answer is (") == 6
    assert "\nQuestion:\nQ0\nChoices:\nA. " in prompt
