"""Any checkpoint against a list of benchmarks as a Prefect flow: each a job of its own, so many at once, a report last.

It happens in a workspace, by the stage `evaluate`; where a job runs, and how many share a benchmark, is params.yaml's
`launch`. What all of it costs is said before the first job starts; each job says how far it is.
"""

import json
import logging
import sys
import threading
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.futures import as_completed

from flows.pipeline import StageProcesses
from llada_core.evaluation import recipes
from llada_core.evaluation.params import ReportParams
from tasks.errors import StageError, one_line_errors
from tasks.folders import commit_of, read_json
from tasks.launch.launcher import launcher_for
from tasks.launch.plan_memory import peak_of
from tasks.launch.workspace import configure_without_git, open_workspace
from tasks.project import Params, Project, data_root
from tasks.record.tracking import send_pending
from tasks.work.evaluate import Places, answering, quiet_lm_eval
from tasks.work.measure import FAILURES, tell_costs
from tasks.work.report import Beside, write_report

# Half of its peak is what a forward of LLaDA-8B's shape reaches on a GPU of its kind (an H200: 54 to 56 %).
YARDSTICK = "H100"


@task(task_run_name="{stage}", cache_policy=NO_CACHE)
def measure(stage: str, processes: StageProcesses, room: threading.Semaphore) -> None:
    """One benchmark; its output (cost, progress, time left, samples a second) streams into this task's log."""
    said: list[str] = []

    def tell(line: str) -> None:
        get_run_logger().info(line)
        if line.startswith("error: "):
            said.append(line.removeprefix("error: "))

    with room:
        try:
            processes.run(stage, tell)
        except StageError as error:  # DVC's last words; what the stage itself said tells more
            raise StageError("; ".join(said) or str(error), error.status) from None


@flow(name="evaluate", flow_run_name="{model}", log_prints=True)
def evaluate(
    model: str,
    benchmarks: list[str] | None = None,
    table: str | None = None,
    limit: int | None = None,
    overrides: list[str] | None = None,
    at_once: int | None = None,
    costs: bool = True,
) -> dict[str, Any]:
    """Result or `{"error": why}` of each benchmark, or each column of a published table; a failure stops no other.

    `overrides`: as of `llada run`, such as `evaluate.run_code=true` or `launch.kind=slurm`. What each benchmark and all
    of them cost is said before the first job starts, from the model's config.json alone: a login node neither loads a
    model nor computes. `at_once` jobs run; None: two, or one where this machine's GPUs do the work, all of which a job
    takes.
    """
    asked = [*(benchmarks or []), *([column.recipe for column in recipes.table(table).columns] if table else [])]
    workspace = _workspace(model, asked, limit, overrides or [])
    configure_without_git(workspace.root)
    params = Params.parse(workspace.values, "params.yaml")
    processes = StageProcesses(workspace.root, confirmed=True)
    failed: dict[str, str] = {}
    try:
        if "prepare" in workspace.values["stages"]:
            processes.run("prepare", get_run_logger().info)
        if costs:
            _tell_costs(workspace, params, asked)
        launcher = launcher_for(params.launch.of("evaluate"))
        room = threading.Semaphore(at_once or (1 if launcher.here and launcher.has_gpu else 2))
        futures = {measure.submit(f"evaluate@{name}", processes, room): name for name in asked}
        for number, future in enumerate(as_completed(list(futures)), 1):
            future.wait()  # the state is that of the last look
            if future.state.is_failed():
                failed[futures[future]] = str(future.state.result(raise_on_failure=False))
            print(f"{number} of {len(asked)} benchmarks: {futures[future]} {failed.get(futures[future], 'done')}")
    except BaseException:
        processes.end_all()
        raise
    send_pending(workspace)
    return _report(workspace, asked, failed, model)


def _workspace(model: str, asked: list[str], limit: int | None, overrides: list[str]) -> Project:
    puzzles = [n for n in asked if not recipes.exists(n) and (Project.at().home / "data/eval" / f"{n}.jsonl").exists()]
    values = {
        "name": "evaluation",
        "stages": ["prepare"] * bool(puzzles) + ["evaluate"],
        "evaluate.models": [model],
        "evaluate.benchmarks": asked,
        "evaluate.limit": limit,
    }
    given = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    return open_workspace(Project.at(), None, [*given, *overrides], own=True)


def _tell_costs(workspace: Project, params: Params, asked: list[str]) -> None:
    from llada_core.training.progress import active_parameters, training_flops

    assert params.evaluate is not None
    base, gpu = workspace.home, params.launch.of("evaluate").gpu or YARDSTICK
    nothing = workspace.root / "reports"  # is written
    places = Places(data_root(params, base), workspace.root / "data" / "eval", nothing, nothing)
    quiet_lm_eval(harness=logging.WARNING)
    print(f"estimated from the model's shape, for one {gpu} at half of its bf16 peak (launch.gpu names another):")
    try:
        with answering(Path(params.evaluate.models[0].partition("=")[2]), params.evaluate, "meta") as answerer:
            rate = 0.5 * peak_of(gpu) / training_flops(active_parameters(answerer.model), 0.0, 1.0)
            tell_costs(answerer, asked, params.evaluate, places, print, rate)
    except FAILURES as error:
        print(f"what it costs is not known: {error}")


def _report(workspace: Project, asked: list[str], failed: dict[str, str], model: str) -> dict[str, Any]:
    reports = workspace.root / "reports"
    measured = [name for name in asked if name not in failed]
    text = "".join(f"- {name}: {why}\n" for name, why in failed.items())
    if measured:
        beside = Beside(commit=commit_of(Path.cwd()))
        write_report(reports / "eval", measured, ReportParams(comparisons=()), reports, beside)
        text = (reports / "table.md").read_text(encoding="utf-8") + text
    create_markdown_artifact(key="checkpoint", markdown=text, description=model)
    print(f"{text}\nresults are in {reports}")
    results = {name: next(iter(read_json(reports / "eval" / f"{name}.json")["models"].values())) for name in measured}
    return {name: results.get(name) or {"error": failed[name]} for name in asked}


if __name__ == "__main__":
    with one_line_errors():
        evaluate(sys.argv[1], sys.argv[2:])
