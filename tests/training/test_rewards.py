"""Rewards: equal to the published ones, except where those are mistaken, which is written down here."""

import json
import threading
from pathlib import Path

import pytest

from llada_core.settings import ConfigError
from llada_core.training.params import GRPOParams
from llada_core.training.rewards import published, reward_named
from llada_core.training.rollouts import Prompt, judge
from llada_core.verifiers import answers as verifiers
from llada_core.verifiers import code

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/rewards.json").read_text())
# (case, reward) -> ours, where the published value is a mistake.
DIFFERENT = {
    (1, "xmlcount"): 0.5,  # no newline at the end: theirs takes off 0.001 for each character of the whole reply
    (11, "xmlcount"): 0.125,  # the same mistake, to its favour
    (20, "countdown"): 0.1,  # 2**4-20: theirs allows powers, and hangs on large ones
    (40, "correctness"): 2.0,  # 1,000 is 1000
}


@pytest.mark.parametrize("case", range(len(GOLDEN)))
def test_golden(case):
    golden = GOLDEN[case]
    task, text = golden["task"], golden["completion"]
    theirs = golden["dllm"] if isinstance(golden["dllm"], dict) else {task: golden["dllm"]}
    ours = published.parts(task, text, golden)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(DIFFERENT.get((case, name), value), abs=1e-9), name
    assert published.reward(task, text, golden) == pytest.approx(sum(ours.values()))


def test_commas_do_not_cost_a_right_answer():
    score = published.gsm8k("<answer>\n1,234\n</answer>\n", {"answer": "1,234"})
    assert score == published.gsm8k("<answer>\n1234\n</answer>\n", {"answer": "1,234"})
    assert score["correctness"] == 2.0
    assert score["int"] == 0.5
    assert published.gsm8k("<answer>1,2</answer>", {"answer": "12"})["correctness"] == 0.0


def test_sudoku_with_several_solutions_and_changed_givens():
    puzzle = {"puzzle": "1234341200000000", "solution": "1234341221434321"}
    assert published.sudoku_score("<answer>1234341243212143</answer>", puzzle) == 1.0
    assert published.sudoku_score("<answer>2134341243212143</answer>", puzzle) == 1 - 1 / 8


PROGRAM = "<answer>\n```python\ndef plus(a, b):\n    return a + b\n```\n</answer>"
TESTS = """from solution import add

def test_one():
    assert add(1, 2) == 3

def test_two():
    assert add(1, 1) == 3
"""


def test_code_counts_passed_tests_and_its_place():
    assert published.code_score(PROGRAM, {"tests": TESTS}) == 0.5 + 0.5
    outside = PROGRAM.replace("<answer>", "").replace("</answer>", "")
    assert published.code_score(outside, {"tests": "assert add(1, 2) == 3"}) == 1.0
    assert published.code_score("no program", {"tests": TESTS}) == 0.0


def own(task, text, answer):
    """A reward of one's own."""
    return float(len(text))


def test_rewards_by_name_and_by_dotted_path():
    answer = {"puzzle": "0200040200034320"}
    assert reward_named("default")("sudoku", "1234341221434321", answer) == 1.0
    assert reward_named("default")("sudoku", "1111111111111111", answer) == 0.0
    assert reward_named("published")("sudoku", "<answer>1234</answer>", answer) == 3 / 9
    assert reward_named("tests.training.test_rewards.own")("any", "four", {}) == 4.0
    with pytest.raises(ConfigError, match=r"grpo.reward 'corect'; did you mean 'correct'"):
        reward_named("corect")
    with pytest.raises(ConfigError, match=r"has no function 'owm'; did you mean 'own'"):
        reward_named("tests.training.test_rewards.owm")
    with pytest.raises(ConfigError, match="no module named 'nowhere'"):
        reward_named("nowhere.f")
    with pytest.raises(ValueError, match="task 'seats' has no published reward"):
        published.reward("seats", "21", {})


def test_each_completion_is_verified_and_rewarded_once(monkeypatch):
    asked = []
    monkeypatch.setitem(verifiers._VERIFIERS, "gsm8k", lambda text, answer: asked.append(text) or text == "7")
    prompts = [Prompt([1], task, {}) for task in ("gsm8k", "poem", "gsm8k")]
    texts = ["7", "a rose", "8"]
    found = judge(lambda task, text, answer: asked.append(task) or len(text), prompts, texts)
    assert asked == ["7", "8", "gsm8k", "poem", "gsm8k"]
    assert found.rewards.tolist() == [1.0, 6.0, 1.0]
    assert str(found.right.tolist()) == "[1.0, nan, 0.0]"
    asked.clear()
    found = judge(reward_named("default"), prompts[::2], texts[::2])
    assert asked == ["7", "8"]
    assert found.rewards.tolist() == found.right.tolist() == [1.0, 0.0]


def test_the_tests_of_programs_run_once_and_side_by_side(monkeypatch):
    ran, together = [], threading.Barrier(2, timeout=60)
    monkeypatch.setattr(verifiers, "_processors", lambda: 2)

    def passes(program, cases, limits, *, rename):
        ran.append(len(cases))
        together.wait()  # until the other program's tests run too
        return [True] * len(cases)

    monkeypatch.setattr(code, "passes", passes)
    code.passed_share.cache_clear()
    prompts = [Prompt([1], "code", {"tests": "assert add(1, 2) == 3"})] * 2
    found = judge(reward_named("published"), prompts, [PROGRAM, PROGRAM.replace("plus", "sum_of")])
    code.passed_share.cache_clear()  # these verdicts were made up
    assert ran == [1, 1]
    assert found.right.tolist() == [1.0, 1.0]
    assert found.rewards.tolist() == [1.625, 1.625]


def test_a_reward_that_raises_drops_its_row_and_a_wrong_setting_ends_the_run():
    prompts = [Prompt([1], "gsm8k", {"answer": "1"})] * 2
    found = judge(lambda task, text, answer: 1.0 / len(text), prompts, ["", "1"])
    assert str(found.rewards.tolist()) == "[nan, 1.0]"
    with pytest.raises(ConfigError, match="task 'seats' has no published reward"):
        judge(reward_named("published"), [Prompt([1], "seats", {"order": "1"})], ["1"])


def test_the_published_parts_are_weighed_by_name():
    text, answer = "<reasoning>\na\n</reasoning>\n<answer>\n7\n</answer>\n", {"answer": "7"}
    weights = {"correctness": 0.25, "xmlcount": 0.0}
    weighed = reward_named("published", weights)("gsm8k", text, answer)
    parts = published.parts("gsm8k", text, answer)
    assert parts["correctness"] == 2.0
    assert parts["xmlcount"] > 0
    assert weighed == pytest.approx(sum(parts.values()) - 1.5 - parts["xmlcount"])
    with pytest.raises(ConfigError, match=r"grpo.reward_weights: no reward 'corectness'; did you mean 'correctness'"):
        reward_named("published", {"corectness": 1.0})
    with pytest.raises(ConfigError, match="reward_weights weigh the parts of reward: published, not 'default'"):
        GRPOParams.parse({"max_steps": 1, "reward_weights": weights}, "grpo")


def test_every_part_of_every_task_has_a_name_that_can_be_weighed():
    found = {name for golden in GOLDEN for name in published.parts(golden["task"], golden["completion"], golden)}
    assert found | {"tests"} == set(published.PARTS)
