"""GSM8K, MATH and code: what counts as right."""

import pytest

from llada_core.verifiers.answers import last_boxed, normalised, verify


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("<answer>1,234</answer>", True),
        ("<answer>$1234.00</answer> and 5", True),
        ("so it is\n#### 1234", True),
        ("The answer is 1234.", True),
        ("The answer is 1235.", False),
        ("<answer></answer> 1234", False),
        ("no number", False),
        ("-1234", False),
    ],
)
def test_gsm8k(text, right):
    assert verify("gsm8k", text, {"answer": "1,234"}) is right


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("\\frac{1}{2}", "\\dfrac12", True),
        ("0.5", "1/2", True),
        ("x=5", "5", True),
        (".5", "0.5", True),
        ("5\\text{ cm}", "5", True),
        ("10\\%", "10", True),
        ("\\sqrt3", "\\sqrt{3}", True),
        ("\\left( 1, 2 \\right)", "(1,2)", True),
        ("1,000", "1000", True),
        ("90^\\circ", "90", True),
        ("(1,000)", "(1000)", False),
        ("\\frac{1}{2}", "\\frac{2}{4}", False),
        ("2", "-2", False),
    ],
)
def test_math_notation(one, other, same):
    assert (normalised(one) == normalised(other)) is same
    assert verify("math_hendrycks", f"so \\boxed{{{one}}}", {"answer": f"\\boxed{{{other}}}"}) is same


def test_boxes():
    assert last_boxed("a \\boxed{1} b \\boxed{\\frac{1}{2}}.") == "\\frac{1}{2}"
    assert last_boxed("\\boxed{1") is None
    assert verify("math", "7", {"answer": "\\boxed{7}"}) is False
    assert verify("math", "\\boxed{7}", {"answer": "7"}) is True


def test_published_rules_have_names_of_their_own():
    """Stricter ones: equal texts."""
    half = {"answer": "\\boxed{\\frac{1}{2}}"}
    assert verify("math", "\\boxed{\\frac{2}{4}}", half) is True
    assert verify("math_hendrycks", "\\boxed{\\frac{2}{4}}", half) is False
    assert verify("gsm8k", "<answer>18.0 dollars</answer>", {"answer": "18"}) is True
    assert verify("gsm8k_exact", "<answer>18.0 dollars</answer>", {"answer": "18"}) is False
    assert verify("gsm8k_exact", "<answer>1,800</answer>", {"answer": "1800"}) is True


PROGRAM = "```python\ndef add(a, b):\n    return a + b\n```"


@pytest.mark.parametrize(
    ("program", "tests", "right"),
    [
        (PROGRAM, "from solution import add\ndef test_a():\n    assert add(1, 2) == 3", True),
        (PROGRAM.replace("add", "plus"), "assert add(1, 2) == 3\nassert add(0, 0) == 0", True),
        (PROGRAM, "assert add(1, 2) == 3\nassert add(1, 2) == 4", False),
        (PROGRAM.replace("return a + b", "import os; os._exit(0)"), "assert add(1, 2) == 3", False),
        (PROGRAM.replace("return a + b", "raise SystemExit"), "assert add(1, 2) == 3", False),
        ("def add(a, b): return 3", "assert add(1, 2) == 3", True),
        ("return 3", "assert add(1, 2) == 3", False),
        ("```python\nx = 1\n```", "assert add(1, 2) == 3", False),
    ],
)
def test_code(program, tests, right):
    assert verify("code", program, {"tests": tests}) is right
