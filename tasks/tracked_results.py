"""What MLflow gets of an evaluation: every answer as a table, and each score beside the training's parameters.

Scores and parameters go to the pipeline's own run as well, so that comparing pipelines compares benchmarks. Knows
results as the stage `evaluate` writes them; who calls and when is tasks.tracking's.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from llada_core.files import read
from llada_core.settings import flat
from tasks.folders import hash_of, read_json, safe
from tasks.record.registry import lock_of
from tasks.record.runs import RunFolder, home

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

    from llada_core.evaluation.params import EvaluateParams
    from tasks.evaluate import Places


def send_results(client: "MlflowClient", run: RunFolder, run_id: str, parent: str) -> None:
    """Tables and scores of a finished run of `evaluate`; for other stages, nothing."""
    if run.stage.partition("@")[0] != "evaluate":
        return
    for out in (run.tree / out for out in run.request["outs"]):
        if out.is_dir():
            found = sorted(out.glob("*.samples.jsonl"))
            _log_tables(client, run_id, {path.name.removesuffix(".samples.jsonl"): path for path in found})
        elif out.suffix == ".json":
            result = read_json(out)
            scores = {m: r["score"] for m, r in result["models"].items() if r.get("score") is not None}
            _beside_parameters(client, parent, run.request["all_params"], result["benchmark"], scores)


def send_sweep(root: Path, model: str, params: "EvaluateParams", places: "Places", measured: Iterable[str]) -> bool:
    """What `llada eval` measured, as an MLflow run of its own: settings, scores, every answer, the report.

    The same measurement sent again adds nothing. False when MLflow does not take it (or is not wanted); nothing fails.
    """
    from tasks.record.registry import client
    from tasks.tracking import delivered, experiment_of

    def work() -> None:
        talk, name = client(root), safe(model)
        experiment, key = experiment_of(talk, root), hash_of([places.answers.name, model, params.limit])[:16]
        with FileLock(lock_of(home(root))):
            found = talk.search_runs([experiment], f"tags.`lladaflow.key` = '{key}'", max_results=1)
            tags = {"lladaflow.key": key}
            run = found[0] if found else talk.create_run(experiment, tags=tags, run_name=f"eval {name}")
        run_id = run.info.run_id
        for benchmark in measured:
            result = read_json(places.out / f"{benchmark}.json")["models"][name]
            scores = {name: result["score"]} if result.get("score") is not None else {}
            _beside_parameters(talk, run_id, {"model": model} | params.model_dump(mode="json"), benchmark, scores)
            _log_tables(talk, run_id, {benchmark: places.out / benchmark / f"{name}.samples.jsonl"})
        for file in sorted(places.out.glob("table.*")):
            talk.log_artifact(run_id, str(file))
        talk.set_terminated(run_id)

    return os.environ.get("LLADAFLOW_TRACKING") != "off" and delivered(work, f"llada eval of {model}")


def _log_tables(client: "MlflowClient", run_id: str, files: dict[str, Path]) -> None:
    logged = client.get_run(run_id).data.tags.get("mlflow.loggedArtifacts", "")
    for name, path in files.items():
        if f"samples/{name}.json" not in logged:  # a table that is logged again grows
            client.log_table(run_id, samples(path), f"samples/{name}.json")


def _beside_parameters(
    client: "MlflowClient", parent: str, params: dict[str, Any], benchmark: str, scores: dict[str, float]
) -> None:
    from mlflow.entities import Metric

    known = client.get_run(parent).data
    log_params(client, parent, {key: value for key, value in flat(params).items() if key not in known.params})
    names = {f"{benchmark}/{model}": score for model, score in scores.items()}
    points = [Metric(name, score, 0, 0) for name, score in names.items() if known.metrics.get(name) != score]
    client.log_batch(parent, metrics=points)


def log_params(client: "MlflowClient", run_id: str, values: dict[str, Any]) -> None:
    """Parameters in the portions and lengths that MLflow takes."""
    from mlflow.entities import Param

    entries = [Param(key, str(value)[:6000]) for key, value in values.items()]
    for start in range(0, len(entries), 100):
        client.log_batch(run_id, params=entries[start : start + 100])


def samples(path: Path) -> dict[str, list[Any]]:
    """The records of a file of samples as columns; what is no text or number is written as JSON."""
    records = list(read(path))
    names = dict.fromkeys(name for record in records for name in record)

    def plain(value: Any) -> Any:
        return value if isinstance(value, str | int | float) else json.dumps(value, ensure_ascii=False)

    return {name: [plain(record.get(name)) for record in records] for name in names}
