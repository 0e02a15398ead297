"""What MLflow gets of an evaluation: every answer as a table, and each score beside the training's parameters.

Scores and parameters go to the pipeline's own run as well, so that comparing pipelines compares benchmarks. Knows
results as the stage `evaluate` writes them; who calls and when is tasks.tracking's.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.folders import read_json
from tasks.runs import RunFolder, flat

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient


def send_results(client: "MlflowClient", run: RunFolder, run_id: str, parent: str) -> None:
    """Tables and scores of a finished run of `evaluate`; for other stages, nothing."""
    if run.stage.partition("@")[0] != "evaluate":
        return
    logged = client.get_run(run_id).data.tags.get("mlflow.loggedArtifacts", "")
    for out in (run.tree / out for out in run.request["outs"]):
        if out.is_dir():
            for path in sorted(out.glob("*.samples.jsonl")):
                name = f"samples/{path.name.removesuffix('.samples.jsonl')}.json"
                if name not in logged:  # a table that is logged again grows
                    client.log_table(run_id, samples(path), name)
        elif out.suffix == ".json":
            result = read_json(out)
            scores = {m: r["score"] for m, r in result["models"].items() if r.get("score") is not None}
            _beside_parameters(client, parent, run.request["all_params"], result["benchmark"], scores)


def _beside_parameters(
    client: "MlflowClient", parent: str, params: dict[str, Any], benchmark: str, scores: dict[str, float]
) -> None:
    from mlflow.entities import Metric, Param

    known = client.get_run(parent).data
    values = {key: str(value)[:6000] for key, value in flat(params).items() if key not in known.params}
    entries = [Param(key, value) for key, value in values.items()]
    for start in range(0, len(entries), 100):
        client.log_batch(parent, params=entries[start : start + 100])
    names = {f"{benchmark}/{model}": score for model, score in scores.items()}
    points = [Metric(name, score, 0, 0) for name, score in names.items() if known.metrics.get(name) != score]
    client.log_batch(parent, metrics=points)


def samples(path: Path) -> dict[str, list[Any]]:
    """The records of a file of samples as columns; what is no text or number is written as JSON."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    names = dict.fromkeys(name for record in records for name in record)

    def plain(value: Any) -> Any:
        return value if isinstance(value, str | int | float) else json.dumps(value, ensure_ascii=False)

    return {name: [plain(record.get(name)) for record in records] for name in names}
