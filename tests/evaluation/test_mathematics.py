"""Answers of competition problems: extraction, normalisation and equivalence, without antlr 4.11."""

import pytest

from llada_core.evaluation.definitions.scoring import last_boxed, normalised, results


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("$x=5$ cm", "5"),
        ("\\frac12", "\\frac{1}{2}"),
        ("10,000", "10000"),
        ("0,1", "0,1"),
        ("\\text{even}", "even"),
        ("\\sqrt3", "\\sqrt{3}"),
        ("\\left(2,3\\right)", "\\left(2,3\\right)"),
        ("90^\\circ", "90"),
    ],
)
def test_final_answers_are_normalised(answer, expected):
    assert normalised(answer) == expected


def test_the_last_box_with_its_inner_braces():
    assert last_boxed("\\boxed{1} then \\boxed{\\frac{1}{2}}.") == "\\frac{1}{2}"
    assert last_boxed("so $\\boxed 7$ it is") == "7"
    assert last_boxed("no box") == last_boxed("\\boxed{open") == ""


DOCUMENT = {"solution": "Hence \\boxed{\\frac{1}{2}}.", "answer": "\\frac{1}{2}"}


@pytest.mark.parametrize(
    ("reply", "exact", "verified"),
    [
        ("Final Answer: The final answer is $\\frac{1}{2}$. I hope it is correct.", 1, 1),
        ("Final Answer: The final answer is $0.5$. I hope it is correct.", 1, 1),
        ("So we get $\\boxed{\\frac{2}{4}}$.", 0, 1),
        ("Final Answer: The final answer is $\\frac{1}{3}$. I hope it is correct.", 0, 0),
        ("", 0, 0),
    ],
)
def test_both_scores_of_a_reply(reply, exact, verified):
    scores = results(DOCUMENT, [reply])
    assert (scores["exact_match"], scores["math_verify"]) == (exact, verified)


def test_a_reference_that_math_verify_cannot_read_counts_when_repeated():
    solution = "the range is $\\boxed{\\left[ \\frac{\\pi^2}{8}, \\frac{5 \\pi^2}{4} \\right]}.$"
    document = {"solution": solution, "answer": normalised(last_boxed(solution))}
    assert results(document, ["I find " + solution])["math_verify"] == 1
