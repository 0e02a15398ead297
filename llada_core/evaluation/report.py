"""Results as one table, as Markdown and as a picture."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llada_core.evaluation import recipes
from llada_core.evaluation.params import Comparison, ReportParams
from llada_core.evaluation.statistics import paired

# It says by itself what the numbers do not carry: scores at chance, subsets, settings that are not the recipe's.

Result = dict[str, Any]


def markdown(report: Result) -> str:
    """The report as Markdown: a table in percent, then the remarks and what the figures come from."""
    models = report["models"]
    pairs = list(dict.fromkeys((d["model"], d["baseline"]) for row in report["rows"] for d in row["differences"]))
    sources = list(dict.fromkeys(r["source"] for row in report["rows"] for r in row.get("references", [])))
    written = [_parallel(score) or 0 for row in report["rows"] for score in row["scores"].values()]
    more = ["tokens a forward"] if max(written, default=0) > 1 else []
    head = ["benchmark", "n", "chance", *models, *more, *(f"{a} − {b}" for a, b in pairs), *sources]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in report["rows"]:
        cells, after = _cells(row, models, pairs, sources), 3 + len(models)
        cells[after:after] = [_tokens(row, models) for _ in more]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "Percent, with 95 % intervals; differences are paired, in points, bold where the interval excludes zero.",
    ]
    if any(row.get("subset") or row.get("as_pinned") is False for row in report["rows"]):
        lines.append("† a subset, or settings other than the recipe's: not comparable with published figures.")
    if sources:
        lines.append("Behind a published figure: what each model lies above it, bold where that is more than noise.")
    lines += ["", *(f"- {remark}" for remark in report["remarks"])]
    lines += [f"- {text}" for text in _settings(report)]
    told = [r for row in report["rows"] for r in row.get("references", [])]
    lines += list(dict.fromkeys(f"- {r['source']}: {r['model']}, {r['where']}" for r in told))
    lines += _not_the_same(report)
    lines += _speeds(report)
    if report["curves"]:
        lines += ["", "Training curves:", "", *(f"![{stage}](training/{stage}.png)" for stage in report["curves"])]
    return "\n".join(lines).rstrip() + "\n"


def _cells(row: Result, models: Sequence[str], pairs: Sequence[tuple[str, str]], sources: Sequence[str]) -> list[str]:
    mark = " †" if row.get("subset") or row.get("as_pinned") is False else ""
    if "absent" in row:
        return [row["benchmark"], *["–"] * (2 + len(models) + len(pairs) + len(sources))]
    n = next(iter(row["scores"].values()))["n"]
    differences = {(d["model"], d["baseline"]): d for d in row["differences"]}
    figures = {r["source"]: r for r in row["references"]}
    return [
        row["benchmark"] + mark,
        str(n),
        "–" if row["chance"] is None else f"{100 * row['chance']:.0f}",
        *(_score(row["scores"].get(model), row["metric"]) for model in models),
        *(_difference(differences.get(pair)) for pair in pairs),
        *(_figure(figures[s], models) if s in figures else "–" for s in sources),
    ]


def _parallel(score: Result) -> float | None:
    """Tokens a forward: of an answer up to its end, by the forwards that it took part in; None where none was written."""
    forwards = score.get("forwards_per_answer")
    return score["tokens_per_answer"] / forwards if forwards else None


def _tokens(row: Result, models: Sequence[str]) -> str:
    """Tokens a forward of each model, and behind them what is published beside the row's figures."""
    own = [_parallel(row["scores"].get(model, {})) for model in models]
    published = [
        (r["source"], r["tokens_per_forward"]) for r in row.get("references", []) if r.get("tokens_per_forward")
    ]
    text = " / ".join("–" if value is None else f"{value:.2f}" for value in own)
    return text + (f" ({', '.join(f'{source} {value:.2f}' for source, value in published)})" if published else "")


def _figure(figure: Result, models: Sequence[str]) -> str:
    found = [figure["models"][model] for model in models if model in figure["models"]]
    texts = (f"{100 * d['difference']:+.1f}" for d in found)
    marked = [t if d["within_noise"] else f"**{t}**" for t, d in zip(texts, found, strict=True)]
    return f"{100 * figure['value']:.1f}" + (f" ({', '.join(marked)})" if marked else "")


def _settings(report: Result) -> list[str]:
    """Which settings, versions and code the scores come from; benchmarks with the same are told together."""
    told: dict[str, list[str]] = {}
    for row in (row for row in report["rows"] if "absent" not in row):
        how = {"shots": row["shots"], "chat": row["chat"], **row["settings"]}
        told.setdefault(", ".join(f"{k} {v}" for k, v in how.items()), []).append(row["benchmark"])
    versions: Result = next((row["versions"] for row in report["rows"] if row.get("versions")), {})
    code = ", ".join([*(f"{k} {v}" for k, v in versions.items()), f"commit {(report.get('commit') or 'unknown')[:12]}"])
    return [f"{', '.join(names)}: {how}" for how, names in told.items()] + ([code] if versions else [])


def _not_the_same(report: Result) -> list[str]:
    """Which figures were measured otherwise than the row beside them, and in what."""
    told: dict[str, list[str]] = {}
    for row in report["rows"]:
        for figure in row.get("references", []):
            if figure["differs"]:
                how = "; ".join(f"{part} ({why})" for part, why in figure["differs"].items())
                told.setdefault(f"not measured as {figure['source']} was: {how}", []).append(row["benchmark"])
    return [f"- {', '.join(names)} {how}" for how, names in told.items()]


def _speeds(report: Result) -> list[str]:
    """What faster settings cost each model, where `evaluate.speed` asked for it: a row for each setting and model."""
    head = "| benchmark | setting | model | % right | against exact | tokens/forward | forwards | tokens/s |"
    rows = []
    for name, by_model in report.get("speed", {}).items():
        models = [m for m in report["models"] if by_model.get(m)]
        for setting in dict.fromkeys(r["setting"] for m in models for r in by_model[m]):
            for model, r in ((m, r) for m in models for r in by_model[m] if r["setting"] == setting):
                against = f"{100 * r['difference']:+.1f} [{100 * r['low']:+.1f}, {100 * r['high']:+.1f}]"
                cells = [name, setting, model, f"{100 * r['mean']:.1f}", against, f"{r['tokens_per_forward']:.2f}"]
                rows.append("| " + " | ".join([*cells, f"{r['forwards']:.1f}", f"{r['tokens_per_second']:.0f}"]) + " |")
    if not rows:
        return []
    said = "What faster settings cost, a question at a time; % right is the mean over the wordings in which exact (a token a forward, no cache) solves half."
    return ["", said, "", head, "|---" * 8 + "|", *rows]


def _score(score: Result | None, metric: str) -> str:
    if score is None or score["score"] is None:
        return "–"
    if metric.startswith(("bits_per_byte", "word_perplexity", "byte_perplexity")):
        return f"{score['score']:.3f}"
    if score["low"] is None:
        return f"{100 * score['score']:.1f}"
    return f"{100 * score['score']:.1f} [{100 * score['low']:.1f}, {100 * score['high']:.1f}]"


def _difference(d: Result | None) -> str:
    if d is None:
        return "–"
    text = f"{100 * d['value']:+.1f} [{100 * d['low']:+.1f}, {100 * d['high']:+.1f}]"
    return f"**{text}**" if d["significant"] else text


def picture(report: Result, path: Path) -> None:
    """Bars with intervals, one group for each benchmark; the same report gives the same file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in report["rows"] if any(s["low"] is not None for s in row["scores"].values())]
    models = report["models"]
    figure = Figure(figsize=(max(6.0, 1.3 * len(rows) * max(1, len(models) / 2)), 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    width = 0.8 / max(1, len(models))
    for number, model in enumerate(models):
        places, heights, errors = [], [], []
        for i, row in enumerate(rows):
            score = row["scores"].get(model)
            if score is not None and score["low"] is not None:
                places.append(i + (number - (len(models) - 1) / 2) * width)
                heights.append(100 * score["score"])
                errors.append((100 * (score["score"] - score["low"]), 100 * (score["high"] - score["score"])))
        if places:
            axes.bar(places, heights, width, yerr=list(zip(*errors, strict=True)), capsize=3, label=model[-40:])
    marks = dict(zip(dict.fromkeys(r["source"] for row in rows for r in row["references"]), "D^vsPX", strict=False))
    for source, mark in marks.items():
        points = [
            (i, 100 * r["value"]) for i, row in enumerate(rows) for r in row["references"] if r["source"] == source
        ]
        axes.plot(
            [p[0] for p in points], [p[1] for p in points], mark, markersize=5, color="black", zorder=3, label=source
        )
    for i, row in enumerate(rows):
        if row["chance"]:
            axes.hlines(100 * row["chance"], i - 0.45, i + 0.45, colors="black", linestyles="dotted")
    axes.set_xticks(range(len(rows)), [row["benchmark"] for row in rows], rotation=20 if len(rows) > 5 else 0)
    axes.set_ylabel("% right, 95 % intervals (dotted: chance)")
    axes.set_ylim(0, 105)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(
            ncols=min(4, len(models) + len(marks)), loc="upper center", bbox_to_anchor=(0.5, 1.12), frameon=False
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, metadata={"Software": None})


Scores = Mapping[str, float]  # question -> score


def table(
    results: Mapping[str, Mapping[str, Result]],
    questions: Mapping[str, Mapping[str, Scores]],
    params: ReportParams,
    training: Mapping[str, Result] | None = None,
    speeds: Mapping[str, Mapping[str, Sequence[Result]]] | None = None,
) -> Result:
    """The report as JSON values.

    results: benchmark -> model -> result. questions: the same, question by question. training: stage -> its last
    metrics, for what GRPO's own numbers say. speeds: benchmark -> model -> rows of `speed.table`.
    """
    rows = [_row(name, by_model, questions.get(name, {}), params) for name, by_model in results.items()]
    models = list(dict.fromkeys(model for by_model in results.values() for model in by_model))
    evidence = grpo_evidence(training or {})
    said = remarks(rows, params) + _told(evidence)
    found = {"models": models, "rows": rows, "grpo": evidence, "remarks": said, "curves": sorted(training or {})}
    return found | ({"speed": dict(speeds)} if speeds else {})


def _row(name: str, by_model: Mapping[str, Result], questions: Mapping[str, Scores], params: ReportParams) -> Result:
    measured = {model: result for model, result in by_model.items() if "absent" not in result}
    if not measured:
        return {"benchmark": name, "absent": next(iter(by_model.values()))["absent"], "scores": {}, "differences": []}
    first = next(iter(measured.values()))
    kept = (
        "recipe",
        "variant",
        "metric",
        "chance",
        "subset",
        "shots",
        "chat",
        "settings",
        "as_pinned",
        "versions",
        "drift",
    )
    scores = {
        model: {key: value for key, value in result.items() if key not in kept} | {"at_chance": at_chance(result)}
        for model, result in measured.items()
    }
    return {
        "benchmark": name,
        **{key: first[key] for key in kept if key in first},
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
    """Published figures of the row's recipe, with how far each model is from them and whether that is noise.

    `differs`: part of the measurement (prompt, shots, filter, metric, settings, questions, version) -> how it is not the
    figure's; `same_settings` is true where there is none.
    """
    found = []
    for figure in recipes.figures(first["recipe"]):
        distances = {
            model: {"difference": r["score"] - figure.value, "within_noise": r["low"] <= figure.value <= r["high"]}
            for model, r in measured.items()
            if r["score"] is not None and r["low"] is not None
        }
        differs = _differs(first, figure.source)
        row = {**figure.model_dump(), "same_settings": not differs, "differs": differs, "models": distances}
        found.append(row)
    return found


def _differs(first: Result, source: str) -> dict[str, str]:
    recipe = recipes.find(first["recipe"])
    if source not in (recipe.variant, *recipe.variants):
        return {"settings": "no recipe repeats its own"}
    published = recipe.of(source)
    departures = recipe.of(first["variant"]).departures(published)
    found: dict[str, str] = {str(part): how for part, how in departures.items()}
    known = published.measured_with
    if first.get("drift") and known is not None and not (known.differs or known.same):
        found["version"] = "; ".join(first["drift"])
    if not first["as_pinned"]:
        found["settings"] = "not the recipe's"
    return found | ({"questions": first["subset"]} if first["subset"] else {})


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
        said += [f"{name}: {line}." for line in row.get("drift") or ()]
        said += _estimated(name, row)
        if not row["as_pinned"]:
            said.append(f"{name}: settings are not those of its recipe; not comparable with published figures.")
        said += [_sentence(name, d) for d in row["differences"] if d["significant"]]
    for comparison in params.comparisons:
        shown = [d for row in rows for d in row["differences"] if d["model"] == comparison.model]
        shown = [d for d in shown if d["baseline"] == comparison.baseline]
        if shown and not any(d["significant"] for d in shown):
            said.append(f"{comparison.model} and {comparison.baseline} differ on no benchmark by more than noise.")
    return said


def _estimated(name: str, row: Result) -> list[str]:
    """Which estimator gave the log-likelihoods, and how far one of them is off where that was looked at."""
    if row["settings"].get("estimator") == "confidence":
        return [f"{name}: answers scored by confidence, token by token, surest first; that is no likelihood."]
    errors = [s["estimator_error"] for s in row["scores"].values() if s.get("estimator_error") is not None]
    if not errors:
        return []
    how = f"{row['settings'].get('estimator', 'auto')}, {row['settings'].get('samples', 'default')} samples"
    return [f"{name}: log-likelihoods by {how}; one is off by {max(errors):.2f} nats (root mean square)."]


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
