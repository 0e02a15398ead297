"""Any checkpoint (folder, registry alias, Hub name) against a list of benchmarks, as a Prefect flow."""

from pathlib import Path
from typing import Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact

from llada_core.config.evaluation import EvaluateParams
from tasks.folders import safe
from tasks.runs import home
from tasks.sweep import sweep, sweep_places


@flow(name="evaluate", flow_run_name="{model}", log_prints=True)
def evaluate(model: str, benchmarks: list[str], limit: int | None = None, batch_size: int = 32) -> dict[str, Any]:
    """Scores of one checkpoint; a benchmark that fails does not stop the others. Results go to reports/checkpoints."""
    params = EvaluateParams(benchmarks=tuple(benchmarks), limit=limit, batch_size=batch_size)
    base = home(Path.cwd())
    root = Path(params.root) if params.root else None
    places = sweep_places(model, params, base, root, base / "reports" / "checkpoints" / safe(model))
    results = sweep(model, benchmarks, params, places)
    rows = [
        f"| {name} | {line.get('score', line.get('error', line.get('absent')))} |" for name, line in results.items()
    ]
    table = "\n".join(["| benchmark | score |", "|---|---|", *rows])
    create_markdown_artifact(key="checkpoint", markdown=table, description=model)
    return results
