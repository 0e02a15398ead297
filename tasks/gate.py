"""Whether a candidate may replace the champion: both answered the same questions, and the difference is not noise.

Knows scores by benchmark and question; neither MLflow nor models.
"""

import math
from dataclasses import dataclass

from llada_core.config.registry import GateParams
from llada_core.evaluation.statistics import Difference, paired

Scores = dict[str, dict[str, float]]  # benchmark -> question -> score in [0, 1]


@dataclass(frozen=True)
class Decision:
    """The verdict and, in words, what it rests on."""

    passed: bool
    reason: str


def decide(gate: GateParams, candidate: Scores, champion: Scores | None) -> Decision:
    """Apply the gate; `champion` is None when there is none yet.

    A gate that names nothing lets a first champion through and no other: nothing says that the candidate is as good.
    Raises ValueError for a benchmark nobody measured.
    """
    named = (*gate.better, *gate.not_worse, *gate.at_least)
    if missing := [name for name in named if name not in candidate]:
        raise ValueError(
            f"the gate names benchmark {missing[0]!r}; measured are: {', '.join(sorted(candidate)) or 'none'}"
        )
    if broken := [name for name in named if not all(map(math.isfinite, candidate[name].values()))]:
        return Decision(False, f"{broken[0]} has a score that is no number")
    for name, floor in gate.at_least.items():
        if (score := _mean(candidate[name])) < floor:
            return Decision(False, f"{name} is {score:.3f}, below the required {floor:.3f}")
    if champion is None:
        return Decision(True, "there was no champion")
    if not named:
        ways = "name benchmarks in register.gate (better, not_worse, at_least), or `llada promote` by hand"
        return Decision(False, f"the gate is empty, and there is a champion; {ways}")
    if missing := [name for name in (*gate.better, *gate.not_worse) if not _common(candidate, champion, name)]:
        return Decision(False, f"{missing[0]}: the champion was not measured on the same questions; evaluate it first")
    for name in (*gate.not_worse, *gate.better):
        difference = _difference([name], candidate, champion)
        if difference.high < 0:
            return Decision(False, f"worse on {name}: {_words(difference)}")
    if not gate.better:
        return Decision(True, "worse on nothing that the gate lists")
    difference = _difference(list(gate.better), candidate, champion)
    where = " and ".join(gate.better)
    if difference.low <= 0:
        return Decision(False, f"not better on {where} by more than noise: {_words(difference)}")
    return Decision(True, f"better on {where}: {_words(difference)}")


def _difference(names: list[str], candidate: Scores, champion: Scores) -> Difference:
    questions = [(name, question) for name in names for question in _common(candidate, champion, name)]
    return paired([candidate[n][q] for n, q in questions], [champion[n][q] for n, q in questions])


def _common(candidate: Scores, champion: Scores, name: str) -> list[str]:
    theirs = {question for question, score in champion.get(name, {}).items() if math.isfinite(score)}
    return sorted(candidate[name].keys() & theirs)


def _mean(scores: dict[str, float]) -> float:
    return sum(scores.values()) / len(scores) if scores else 0.0


def _words(difference: Difference) -> str:
    low, high = difference.low, difference.high
    return f"{difference.value:+.3f} (95 % interval {low:+.3f} to {high:+.3f}, {difference.n} questions)"
