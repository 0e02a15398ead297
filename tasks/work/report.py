"""The stage `report`: all of reports/eval as one table, `reports/table.{json,md,png}`."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llada_core.evaluation.params import ReportParams
from llada_core.files import read
from llada_core.settings import ConfigError
from tasks.folders import commit_of, read_json, safe, write_json, write_text
from tasks.record.runs import StageContext

Scores = dict[str, float]


@dataclass(frozen=True)
class Beside:
    """What a report says beside its results; `training`: a folder with `<stage>.json`; `models` come first."""

    training: Path | None = None
    models: tuple[str, ...] = ()
    commit: str = ""


def run(work: StageContext) -> None:
    """The stage's work, in the run's snapshot."""
    evaluate = work.params.evaluate
    if evaluate is None:
        raise ConfigError("report: params.yaml has no block 'evaluate', so there is nothing to report")
    order = [safe(model.partition("=")[0]) for model in evaluate.models]  # `label=folder` stands as its label
    write_report(
        Path("reports/eval"),
        evaluate.benchmarks,
        work.params.report or ReportParams(),
        Path("reports"),
        Beside(Path("reports/training"), tuple(order), commit_of(work.run.root)),
    )


def write_report(
    results: Path,
    benchmarks: Iterable[str],
    params: ReportParams,
    out: Path,
    beside: "Beside | None" = None,
) -> dict[str, Any]:
    """Writes table.json, table.md and table.png into `out` from a folder of results; returns the table.

    Raises `ConfigError` for a result that is not there.
    """
    from llada_core.evaluation.report import markdown, picture, table

    beside = beside or Beside()
    found: dict[str, dict[str, Any]] = {}
    questions: dict[str, dict[str, Scores]] = {}
    for name in benchmarks:
        path = results / f"{name}.json"
        if not path.exists():
            raise ConfigError(f"{path} is not there; run `python -m tasks.evaluate {name}`")
        content = read_json(path)
        by_model = content["models"]
        order = sorted(by_model, key=lambda m: (*(m != first for first in beside.models), m))
        found[name] = {model: by_model[model] for model in order}
        questions[name] = {model: scores_of(results / name / f"{model}.samples.jsonl") for model in order}
    said = {path.stem: read_json(path) for path in sorted(beside.training.glob("*.json"))} if beside.training else {}
    files = {name: results / name / "speed.json" for name in found}  # where `evaluate.speed` asked for it
    speeds = {name: read_json(file) for name, file in files.items() if file.exists()}
    report = table(found, questions, params, said, speeds)
    report["commit"] = beside.commit
    write_json(out / "table.json", report)
    scores = {name: {model: by_model[model].get("score") for model in by_model} for name, by_model in found.items()}
    write_json(out / "scores.json", scores)  # what `dvc metrics` shows and compares
    write_text(out / "table.md", markdown(report))
    picture(report, out / "table.png")
    return report


def scores_of(path: Path) -> Scores:
    """Question -> score, of one file of samples."""
    records = read(path) if path.exists() else []
    return {str(record["id"]): float(record["score"]) for record in records}
