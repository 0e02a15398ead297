"""A report for people: Markdown and a picture. Knows the report's values; computes nothing."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

Result = dict[str, Any]


def markdown(report: Result) -> str:
    """The report as Markdown: a table in percent, then the remarks and what the figures come from."""
    models = report["models"]
    pairs = list(dict.fromkeys((d["model"], d["baseline"]) for row in report["rows"] for d in row["differences"]))
    sources = list(dict.fromkeys(r["source"] for row in report["rows"] for r in row.get("references", [])))
    head = ["benchmark", "n", "chance", *models, *(f"{a} − {b}" for a, b in pairs), *sources]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in report["rows"]:
        lines.append("| " + " | ".join(_cells(row, models, pairs, sources)) + " |")
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
    told = (r for row in report["rows"] for r in row.get("references", []))
    lines += list(dict.fromkeys(f"- {r['source']}: {r['model']}, {r['where']}" for r in told))
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
    if rows:
        axes.legend(
            ncols=min(4, len(models) + len(marks)), loc="upper center", bbox_to_anchor=(0.5, 1.12), frameon=False
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, metadata={"Software": None})
