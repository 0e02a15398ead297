"""Two evaluations question by question: what differs in settings, questions, versions and scores, with a paired test.

Knows results and records as `run.py` makes them; does not know files.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from llada_core.evaluation.statistics import paired
from llada_core.settings import flat

Record = dict[str, Any]
NOT_SETTINGS = ("score", "n", "also", "stderr", "low", "high", "forwards_per_answer", "tokens_per_answer")


@dataclass(frozen=True)
class Side:
    """One model on one benchmark: its result, and its records by question."""

    result: Mapping[str, Any]
    records: Mapping[str, Record]


def compare(first: Side, second: Side) -> dict[str, Any]:
    """How `second` differs from `first`.

    `settings`: key -> (first, second); `questions`: how many only one side has, and how many read differently;
    `difference`: second minus first with its 95 % interval; `gained` and `lost`: the questions behind it.
    """
    common = sorted(first.records.keys() & second.records.keys())
    asked = [q for q in common if _question(first.records[q]) != _question(second.records[q])]
    report: dict[str, Any] = {
        "settings": _differences(first.result, second.result),
        "questions": {
            "common": len(common),
            "only_first": len(first.records) - len(common),
            "only_second": len(second.records) - len(common),
            "asked_differently": len(asked),
        },
        "other_answers": sum(first.records[q]["reply"] != second.records[q]["reply"] for q in common),
    }
    if common:
        scores = [(float(second.records[q]["score"]), float(first.records[q]["score"])) for q in common]
        found = paired([new for new, _ in scores], [old for _, old in scores])
        report["difference"] = {**asdict(found), "significant": found.significant}
        report["gained"] = [q for q, (new, old) in zip(common, scores, strict=True) if new > old]
        report["lost"] = [q for q, (new, old) in zip(common, scores, strict=True) if new < old]
    return report


def _question(record: Record) -> tuple[Any, Any]:
    return record["prompt"], record["target"]


def _differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    one, other = flat(first), flat(second)
    keys = sorted(key for key in one.keys() | other.keys() if key.partition(".")[0] not in NOT_SETTINGS)
    return {key: (one.get(key), other.get(key)) for key in keys if one.get(key) != other.get(key)}
