"""The stage `report`: all of reports/eval as one table, `reports/table.{json,md,png}`.

Knows folders; what stands in the table is llada_core.evaluation.report's.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llada_core.config.base import ConfigError
from llada_core.config.evaluation import ReportParams
from tasks.folders import read_json, safe, write_json, write_text
from tasks.program import Work, stage_program

Scores = dict[str, float]


def run(work: Work) -> None:
    """The stage's work, in the run's snapshot."""
    evaluate = work.params.evaluate
    if evaluate is None:
        raise ConfigError("report: params.yaml has no block 'evaluate', so there is nothing to report")
    order = [safe(model) for model in evaluate.models]
    write_report(
        Path("reports/eval"),
        evaluate.benchmarks,
        work.params.report or ReportParams(),
        Path("reports"),
        training=Path("reports/training"),
        models=order,
    )


def write_report(
    results: Path,
    benchmarks: Iterable[str],
    params: ReportParams,
    out: Path,
    *,
    training: Path | None = None,
    models: Iterable[str] = (),
) -> dict[str, Any]:
    """Writes table.json, table.md and table.png into `out` from a folder of results; returns the table.

    `training`: a folder with `<stage>.json`. `models` come first, in this order. Raises `ConfigError` for a result that
    is not there.
    """
    from llada_core.evaluation.render import markdown, picture
    from llada_core.evaluation.report import table

    found: dict[str, dict[str, Any]] = {}
    commits = set()
    questions: dict[str, dict[str, Scores]] = {}
    for name in benchmarks:
        path = results / f"{name}.json"
        if not path.exists():
            raise ConfigError(f"{path} is not there; run `python -m tasks.evaluate {name}`")
        content = read_json(path)
        commits.add(content.get("commit"))
        by_model = content["models"]
        order = [m for m in models if m in by_model] + [m for m in sorted(by_model) if m not in set(models)]
        found[name] = {model: by_model[model] for model in order}
        questions[name] = {model: scores_of(results / name / f"{model}.samples.jsonl") for model in order}
    said = {path.stem: read_json(path) for path in sorted(training.glob("*.json"))} if training else {}
    report = table(found, questions, params, said)
    report["commits"] = sorted(filter(None, commits))
    write_json(out / "table.json", report)
    scores = {name: {model: by_model[model].get("score") for model in by_model} for name, by_model in found.items()}
    write_json(out / "scores.json", scores)  # what `dvc metrics` shows and compares
    write_text(out / "table.md", markdown(report))
    picture(report, out / "table.png")
    return report


def scores_of(path: Path) -> Scores:
    """Question -> score, of one file of samples."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {str(record["id"]): float(record["score"]) for record in map(json.loads, lines)}


if __name__ == "__main__":
    stage_program("report", run)
