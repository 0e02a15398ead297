"""Flows on the toy project: run, skipped, failed and tried again; a part of the graph; a sweep; prefect.yaml."""

import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from llada_core.settings import ConfigError
from tasks.errors import StageError
from tests.tasks.conftest import project  # noqa: F401  (a fixture)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[None]:
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=600):
        yield


def states(flow_run_id: str) -> dict[str, str]:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    with get_client(sync_client=True) as client:
        runs = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id])))
    return {run.name: run.state.name for run in runs}


def run_pipeline(**parameters: object) -> tuple[dict[str, str], str]:
    from flows.pipeline import pipeline

    state = pipeline(return_state=True, **parameters)
    return states(state.state_details.flow_run_id), state.name


def test_the_pipeline_walks_dvcs_graph(project: Path) -> None:  # noqa: F811
    assert run_pipeline(upto="sft") == ({"pretrain": "Completed", "sft": "Completed"}, "Completed")
    assert (project / "models/sft/weights").read_text() == "hello pretrain 4 first sft 3 first"
    assert run_pipeline(upto="sft") == ({"pretrain": "Skipped", "sft": "Skipped"}, "Completed")
    (project / "mistake-sft-2").touch()
    tasks, name = run_pipeline(upto="sft", overrides=["sft.max_steps=9"])
    assert name == "Completed"  # the request for a mistake lies in the checkout, the run in its workspace
    assert tasks == {"pretrain": "Completed", "sft": "Completed"}


@pytest.mark.slow
def test_a_mistake_fails_at_once_and_a_crash_is_tried_again(project: Path) -> None:  # noqa: F811
    from flows.pipeline import run_stage

    quick = run_stage.retry_delay_seconds
    run_stage.retry_delay_seconds = 0
    try:
        for step in (1, 2):  # one more than the job's own restarts
            (project / f"die-pretrain-{step}").touch()
        assert run_pipeline(upto="sft") == ({"pretrain": "Completed", "sft": "Completed"}, "Completed")
        (project / "mistake-pretrain-1").touch()
        (project / "inputs/text").write_text("other")
        tasks, name = run_pipeline(upto="sft", confirmed=True)
        assert (tasks["pretrain"], name) == ("Failed", "Failed")
    finally:
        run_stage.retry_delay_seconds = quick


@pytest.mark.slow
def test_a_sweep_ranks_its_points(project: Path) -> None:  # noqa: F811
    from flows.sweep import points, sweep

    source = project / "tasks/sft.py"
    report = 'Path("reports/training").mkdir(parents=True); '
    report += 'Path("reports/training/sft.json").write_text(json.dumps({"loss": 1 / step}))'
    source.write_text(source.read_text().replace("    return 7200.0", f"    {report}\n    return 1.0"))
    spec = yaml.safe_load((project / "dvc.yaml").read_text())
    spec["stages"]["sft"]["metrics"] = ["reports/training/sft.json"]
    (project / "dvc.yaml").write_text(yaml.safe_dump(spec))
    rows = sweep("sft", {"sft.max_steps": [2, 3], "sft.batch_size": [8]}, "training/sft:loss")
    assert [row["score"] for row in rows] == [1 / 3, 1 / 2]
    with pytest.raises(StageError, match=r"no point has training/sft:los: .*workspaces/toy-.*/reports"):
        sweep("sft", [["sft.max_steps=2"]], "training/sft:los")
    with pytest.raises(ConfigError, match="no stage 'sfd'; did you mean 'sft'"):
        sweep("sfd", [["sft.max_steps=2"]], "training/sft:loss")
    assert points([["a=1"], ["a=2", "b=1"]]) == [["a=1"], ["a=2", "b=1"]]
    assert points({"a": [1, 2], "b": ["x"]}) == [["a=1", 'b="x"'], ["a=2", 'b="x"']]


def test_parts_of_a_graph() -> None:
    from flows.pipeline import part_of

    graph = {"a": set(), "b": {"a"}, "c@1": {"b"}, "c@2": {"b"}, "d": {"c@1", "c@2"}}
    assert set(part_of(graph, "b", "c")) == {"b", "c@1", "c@2"}
    assert part_of(graph, "c@1", None) == {"c@1": set(), "d": {"c@1"}}
    with pytest.raises(ValueError, match="no stage 'e'"):
        part_of(graph, "e", None)


def test_every_deployment_names_a_flow_and_its_parameters() -> None:
    for deployment in yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]:
        file, _, name = deployment["entrypoint"].partition(":")
        flow = getattr(importlib.import_module(file.removesuffix(".py").replace("/", ".")), name)
        assert set(deployment.get("parameters", {})) <= set(inspect.signature(flow.fn).parameters)


EVALUATE = '''\
"""A toy evaluation: scores 1, fails for the benchmark `broken`, and notes how many are at work at once."""
import json, os, time
from pathlib import Path
from tasks.launch.program import StageContext, stage_program

SCORE = {"score": 1.0, "n": 2, "low": 0.3, "high": 1.0, "recipe": "sudoku", "variant": "official", "metric": "acc,none",
         "chance": 0.0, "subset": "", "shots": 0, "chat": True, "settings": {}, "as_pinned": True, "versions": {}}

def work(w: StageContext) -> None:
    if w.item == "broken":
        raise ValueError("its files are damaged")
    Path("reports/eval").mkdir(parents=True, exist_ok=True)
    label = w.params.evaluate.models[0].partition("=")[0]
    Path(f"reports/eval/{w.item}.json").write_text(json.dumps({"benchmark": w.item, "models": {label: SCORE}}))

if __name__ == "__main__":
    stage_program("evaluate", work)
'''


@pytest.mark.slow
def test_a_checkpoint_against_benchmarks_of_which_one_is_broken(project: Path) -> None:  # noqa: F811
    from flows.evaluate import evaluate

    (project / "tasks/evaluate.py").write_text(EVALUATE)
    spec = yaml.safe_load((project / "dvc.yaml").read_text())
    spec["stages"]["evaluate"]["foreach"] = "${evaluate.benchmarks}"
    spec["stages"]["evaluate"]["do"]["deps"] = ["tasks/evaluate.py", "models/sft"]
    (project / "dvc.yaml").write_text(yaml.safe_dump(spec))
    (project / "given").mkdir()
    (project / "given/weights").write_text("from elsewhere")
    found = evaluate("given", ["first", "broken", "second"], overrides=["evaluate.batch_size=1"], at_once=1)
    assert {name: line.get("score") for name, line in found.items()} == {"first": 1.0, "broken": None, "second": 1.0}
    assert "its files are damaged" in found["broken"]["error"]
    (workspace,) = (project / "workspaces").glob("evaluation-*")
    assert "| second | 2 | 0 | 100.0" in (workspace / "reports/table.md").read_text()
    assert len(list((project / "runs").glob("evaluate-*/SUCCESS"))) == 2
