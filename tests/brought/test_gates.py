"""Gates as people write them: what replaces a champion, and what does not.

A new case from a bug report is a line of the table.
"""

import pytest

from tasks.project import GateParams
from tasks.work.register import decide

NAN = float("nan")


def scores(right: float, of: int = 100) -> dict[str, float]:
    return {str(n): float(n < right) for n in range(of)}


GOOD, BAD = {"main": scores(90), "side": scores(50)}, {"main": scores(10), "side": scores(50)}
BROKEN = {"main": scores(90) | {"0": NAN}, "side": scores(50)}
FLOOR = {"at_least": {"main": 0.5}}
GATES = [  # gate, candidate, champion, whether it passes, a piece of the reason
    ({}, GOOD, None, True, "there was no champion"),
    ({}, GOOD, BAD, False, "the gate is empty, and there is a champion; name benchmarks in register.gate"),
    ({}, GOOD, GOOD, False, "`llada promote` by hand"),
    ({}, {}, {}, False, "the gate is empty"),
    ({"better": [], "not_worse": [], "at_least": {}}, GOOD, BAD, False, "the gate is empty"),
    (FLOOR, GOOD, BAD, True, "worse on nothing"),
    (FLOOR, BAD, GOOD, False, "below the required 0.500"),
    (FLOOR, BAD, None, False, "below the required 0.500"),
    ({"not_worse": ["side"]}, GOOD, GOOD, True, "worse on nothing"),
    ({"not_worse": ["main"]}, BAD, GOOD, False, "worse on main"),
    ({"better": ["main"]}, GOOD, BAD, True, "better on main"),
    ({"better": ["main"]}, GOOD, {}, False, "was not measured on the same questions"),
    ({"better": ["main"]}, GOOD, {"main": {"other": 1.0}}, False, "was not measured on the same questions"),
    ({"better": ["main"]}, BROKEN, BAD, False, "main has a score that is no number"),
    ({"not_worse": ["main"]}, BROKEN, BAD, False, "main has a score that is no number"),
    (FLOOR, BROKEN, None, False, "main has a score that is no number"),
    ({"better": ["main"]}, GOOD, BROKEN, False, "not better on main by more than noise"),
]


@pytest.mark.parametrize(("gate", "candidate", "champion", "passes", "reason"), GATES)
def test_what_a_gate_lets_through(gate: dict, candidate: dict, champion: dict, passes: bool, reason: str) -> None:
    decision = decide(GateParams.parse(gate, "gate"), candidate, champion)
    assert decision.passed is passes
    assert reason in decision.reason
