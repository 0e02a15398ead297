"""Results of many benchmarks as one table: scores with intervals, paired differences, published figures beside them.

It says by itself what the numbers do not carry: scores at chance, subsets, settings that are not the recipe's. Knows
results as `run.py` makes them; does not know files, models or plots.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from llada_core.evaluation import recipes
from llada_core.evaluation.params import Comparison, ReportParams
from llada_core.evaluation.statistics import paired

Result = dict[str, Any]
Scores = Mapping[str, float]  # question -> score


def table(
    results: Mapping[str, Mapping[str, Result]],
    questions: Mapping[str, Mapping[str, Scores]],
    params: ReportParams,
    training: Mapping[str, Result] | None = None,
) -> Result:
    """The report as JSON values.

    results: benchmark -> model -> result. questions: the same, question by question. training: stage -> its last
    metrics, for what GRPO's own numbers say.
    """
    rows = [_row(name, by_model, questions.get(name, {}), params) for name, by_model in results.items()]
    models = list(dict.fromkeys(model for by_model in results.values() for model in by_model))
    evidence = grpo_evidence(training or {})
    said = remarks(rows, params) + _told(evidence)
    return {"models": models, "rows": rows, "grpo": evidence, "remarks": said, "curves": sorted(training or {})}


def _row(name: str, by_model: Mapping[str, Result], questions: Mapping[str, Scores], params: ReportParams) -> Result:
    measured = {model: result for model, result in by_model.items() if "absent" not in result}
    if not measured:
        return {"benchmark": name, "absent": next(iter(by_model.values()))["absent"], "scores": {}, "differences": []}
    first = next(iter(measured.values()))
    kept = ("recipe", "variant", "metric", "chance", "subset", "shots", "chat", "settings", "as_pinned", "versions")
    scores = {
        model: {key: value for key, value in result.items() if key not in kept} | {"at_chance": at_chance(result)}
        for model, result in measured.items()
    }
    return {
        "benchmark": name,
        **{key: first[key] for key in kept},
        "scores": scores,
        "differences": [d for c in params.comparisons if (d := difference(c, questions, params)) is not None],
        "references": references(first, measured),
    }


def at_chance(result: Result) -> bool | None:
    """Whether the interval does not lie above what guessing scores; None without an interval or a chance level."""
    if result.get("low") is None or result.get("chance") is None:
        return None
    return bool(result["low"] <= result["chance"])


def difference(comparison: Comparison, questions: Mapping[str, Scores], params: ReportParams) -> Result | None:
    """`model` minus `baseline` on the questions that both answered; None if there are none."""
    first, second = questions.get(comparison.model, {}), questions.get(comparison.baseline, {})
    common = sorted(first.keys() & second.keys())
    if not common:
        return None
    found = paired([first[q] for q in common], [second[q] for q in common], resamples=params.bootstrap)
    return {**comparison.model_dump(), **asdict(found), "significant": found.significant}


def references(first: Result, measured: Mapping[str, Result]) -> list[Result]:
    """Published figures of the row's recipe, with how far each model is from them and whether that is noise."""
    figures = recipes.figures(first["recipe"])
    variants = recipes.find(first["recipe"]).variants if figures else {}
    now, found = first["variant"], []
    for figure in figures:
        # a variant that changes nothing was measured with the official settings
        unchanged = figure.source in variants and not _changes(variants[figure.source])
        equal = figure.source == now or (now == recipes.OFFICIAL and unchanged)
        distances = {
            model: {"difference": r["score"] - figure.value, "within_noise": r["low"] <= figure.value <= r["high"]}
            for model, r in measured.items()
            if r["score"] is not None and r["low"] is not None
        }
        same = bool(equal and first["as_pinned"] and not first["subset"])
        found.append({**figure.model_dump(), "same_settings": same, "models": distances})
    return found


def _changes(variant: recipes.Variant) -> bool:
    return variant.shots is not None or bool(variant.settings.model_dump(exclude_defaults=True))


def grpo_evidence(training: Mapping[str, Result]) -> Result:
    """What GRPO's training says of itself: share of groups whose rewards differ, norm of the weight change."""
    own = training.get("grpo", {})
    return {key: own[key] for key in ("groups_differ", "weight_change") if own.get(key) is not None}


def remarks(rows: Sequence[Result], params: ReportParams) -> list[str]:
    """Sentences a reader needs before believing the numbers."""
    said = []
    for row in rows:
        name = row["benchmark"]
        if "absent" in row:
            said.append(f"{name}: not measured ({row['absent']}).")
            continue
        guessing = [model for model, score in row["scores"].items() if score["at_chance"]]
        if guessing:
            level = f"chance is {100 * row['chance']:.0f} %"
            said.append(f"{name}: {', '.join(guessing)} not above chance ({level}; the interval reaches it).")
        said += _overlap(name, row["scores"])
        if row["subset"]:
            said.append(f"{name}: a subset ({row['subset']}); not comparable with published figures.")
        if not row["as_pinned"]:
            said.append(f"{name}: settings are not those of its recipe; not comparable with published figures.")
        said += [_sentence(name, d) for d in row["differences"] if d["significant"]]
    for comparison in params.comparisons:
        shown = [d for row in rows for d in row["differences"] if d["model"] == comparison.model]
        shown = [d for d in shown if d["baseline"] == comparison.baseline]
        if shown and not any(d["significant"] for d in shown):
            said.append(f"{comparison.model} and {comparison.baseline} differ on no benchmark by more than noise.")
    return said


def _overlap(name: str, scores: Mapping[str, Result]) -> list[str]:
    seen = next((score["in_training"] for score in scores.values() if "in_training" in score), 0)
    without = [f"{m} {100 * s['score_unseen']:.1f}" for m, s in scores.items() if s.get("score_unseen") is not None]
    return (
        [f"{name}: {seen} questions occur in training by value; without them {', '.join(without)} %."] if seen else []
    )


def _sentence(name: str, d: Result) -> str:
    verb = "gains" if d["value"] > 0 else "loses"
    interval = f"95 % interval {100 * d['low']:+.1f} to {100 * d['high']:+.1f}"
    return f"{name}: {d['model']} {verb} {abs(100 * d['value']):.1f} points against {d['baseline']} ({interval})."


def _told(evidence: Result) -> list[str]:
    parts = []
    if "groups_differ" in evidence:
        parts.append(f"rewards differed in {100 * evidence['groups_differ']:.0f} % of groups")
    if "weight_change" in evidence:
        parts.append(f"the weights moved by {evidence['weight_change']:.3g} (norm)")
    return [f"GRPO: {', '.join(parts)}."] if parts else []
