"""What reaches MLflow: once, live, under one parent; a lost database or a dead server costs nothing."""

import json
import shutil
from pathlib import Path

import pytest

from llada_core.evaluation.params import EvaluateParams
from tasks.graph import load_stage
from tasks.project import Project
from tasks.record import tracking
from tasks.record.registry import client
from tasks.record.runs import RunFolder, open_run, stage_params
from tasks.record.tracking import send_sweep
from tasks.record.versions import restore_if_empty
from tests.tasks.test_registry import empty_database  # noqa: F401  (a fixture)
from tests.tasks.test_runs import finish, open_toy, program, the_run


@pytest.fixture
def tracked(project: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    shutil.copy(empty_database, project / "mlflow.db")
    monkeypatch.delenv("LLADAFLOW_TRACKING")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return project


def write(run: RunFolder, *lines: dict) -> None:
    with (run.path / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps({"time": 1000.0 + line.get("step", 0), **line}) + "\n" for line in lines)


def history(root: Path, run: RunFolder, key: str = "loss") -> list[tuple[int, float]]:
    run_id = json.loads((run.path / "mlflow.json").read_text())["run_id"]
    return sorted((point.step, point.value) for point in client(Project.at(root)).get_metric_history(run_id, key))


def test_each_point_arrives_once_and_a_resume_adds_nothing(tracked: Path) -> None:
    run = open_toy(tracked)
    write(run, {"step": 1, "loss": 3.0, "words": "no number"}, {"step": 2, "loss": 2.0})
    assert tracking.send([run])
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss"')  # half a line: the rest comes later
    tracking.send([run])
    assert history(tracked, run) == [(1, 3.0), (2, 2.0)]
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write(': 1.0, "time": 5}\n')
    write(
        run,
        {"step": 1, "event": "resumed", "back_to": 1},
        {"step": 2, "loss": 2.0, "time": 2000.0},
        {"step": 4, "loss": 0.5},
    )
    tracking.send([run])
    assert history(tracked, run) == [(1, 3.0), (2, 2.0), (3, 1.0), (4, 0.5)]
    write(run, {"step": 2, "event": "rolled back", "back_to": 2}, {"step": 3, "loss": 9.0})
    tracking.send([run])
    assert (3, 9.0) in history(tracked, run)


def test_a_cursor_lost_after_sending_adds_nothing(tracked: Path) -> None:
    run = open_toy(tracked)
    write(run, {"step": 1, "loss": 3.0})
    tracking.send([run])
    before = history(tracked, run)
    (run.path / "mlflow.json").unlink()
    tracking.send([run])
    assert history(tracked, run) == before


def test_one_parent_and_a_child_for_each_stage(tracked: Path) -> None:
    finish(program("tasks.pretrain"))
    finish(program("tasks.sft"))
    restore_if_empty(Project.at(tracked))
    tracking.send([the_run(tracked)], "over")
    talk = client(Project.at(tracked))
    runs = talk.search_runs([talk.get_experiment_by_name(tracking.EXPERIMENT).experiment_id])
    parents = [r for r in runs if "lladaflow.pipeline" in r.data.tags]
    assert [r.info.run_name for r in parents] == ["toy"]
    children = {r.info.run_name: r for r in runs if r.data.tags.get("mlflow.parentRunId") == parents[0].info.run_id}
    assert set(children) == {"pretrain (toy)", "sft (toy)"}
    assert parents[0].info.status == "FINISHED"
    assert parents[0].data.params["pretrain.learning_rate"] == "0.5"
    assert "launch.kind" not in parents[0].data.params
    assert parents[0].data.metrics["pretrain/loss"] == 0.25
    child = children["pretrain (toy)"]
    assert child.data.params["pretrain.max_steps"] == "4"
    assert child.data.metrics["loss"] == 0.25
    assert child.info.status == "FINISHED"
    assert child.inputs.dataset_inputs[0].dataset.name == "inputs"
    assert "params.yaml" in {file.path for file in talk.list_artifacts(child.info.run_id)}
    (tracked / "mlflow.db").unlink()
    shutil.rmtree(tracked / "mlartifacts")
    tracking.send_pending(Project.at(tracked), again=True)
    assert len(talk.search_runs([talk.get_experiment_by_name(tracking.EXPERIMENT).experiment_id])) == 3


def test_the_points_of_a_sweep_gather_under_one_run(tracked: Path) -> None:
    run = open_toy(tracked)
    rows = [
        {"folder": str(tracked), "score": 0.5, "overrides": "sft.max_steps=2"},
        {"folder": "/nowhere", "score": None, "overrides": "sft.max_steps=0"},
    ]
    for _ in range(2):
        assert tracking.gather(Project.at(tracked), "sweep of sft by loss", rows)
    talk = client(Project.at(tracked))
    [sweep] = [r for r in talk.search_runs(["1"]) if r.info.run_name == "sweep of sft by loss"]
    [point] = talk.search_runs(["1"], f"tags.`mlflow.parentRunId` = '{sweep.info.run_id}'")
    assert point.data.metrics == {"score": 0.5}
    assert point.data.tags["lladaflow.overrides"] == "sft.max_steps=2"
    [child] = talk.search_runs(["1"], f"tags.`mlflow.parentRunId` = '{point.info.run_id}'")
    assert child.data.tags["lladaflow.key"] == run.key


def test_a_dead_server_delays_and_does_not_fail(tracked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    finish(program("tasks.pretrain", MLFLOW_HTTP_REQUEST_MAX_RETRIES="0"))
    run = the_run(tracked)
    assert run.succeeded
    assert not tracking.send_pending(Project.at(tracked))
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert tracking.send_pending(Project.at(tracked))
    assert len(history(tracked, run)) == 4


def test_ten_thousand_metrics_go_in_few_requests(tracked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_toy(tracked)
    write(run, *({"step": step, **{f"m{i}": float(step) for i in range(10)}} for step in range(1000)))
    from mlflow.tracking import MlflowClient

    calls, real = [], MlflowClient.log_batch
    monkeypatch.setattr(
        MlflowClient,
        "log_batch",
        lambda self, *a, **k: (calls.append(len(k.get("metrics", ()))), real(self, *a, **k))[1],
    )
    tracking.send([run])
    assert sum(calls) == 10_000
    assert len([n for n in calls if n]) == 10


def test_an_evaluation_is_a_table_of_answers_and_scores_beside_the_training_parameters(tracked: Path) -> None:
    (tracked / "models/sft").mkdir(parents=True)
    (tracked / "models/sft/weights").touch()
    spec = (tracked / "dvc.yaml").read_text().replace('"reports/eval/${item}.json"', '"reports/eval/${item}", "reports/eval/${item}.json"')  # fmt: skip
    (tracked / "dvc.yaml").write_text(spec)
    params = stage_params(Project.at(tracked), [])
    run = open_run(Project.at(tracked), load_stage(Project.at(tracked), "evaluate@b1", params), params)
    folder = run.tree / "reports/eval"
    (folder / "b1").mkdir(parents=True)
    rows = [{"id": f"b1/{i}", "prompt": "1 + 1", "reply": str(i), "score": float(i == 2)} for i in range(3)]
    (folder / "b1/sft.samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "b1.json").write_text(json.dumps({"benchmark": "b1", "models": {"sft": {"score": 1 / 3, "n": 3}}}))
    run.succeed(1.0)
    tracking.send([run])
    (run.path / "mlflow.json").unlink()  # a sender that died before it noted that it was done
    tracking.send([run])
    talk = client(Project.at(tracked))
    child = talk.get_run(json.loads((run.path / "mlflow.json").read_text())["run_id"])
    table = json.loads(Path(talk.download_artifacts(child.info.run_id, "samples/sft.json")).read_text())
    assert [row[table["columns"].index("reply")] for row in table["data"]] == ["0", "1", "2"]
    parent = talk.get_run(child.data.tags["mlflow.parentRunId"]).data
    assert (parent.metrics["b1/sft"], parent.params["sft.max_steps"]) == (1 / 3, "3")
    assert "eval/b1" not in parent.metrics  # of the registered model, and this project registers none
    [measured] = talk.search_runs(["1"], f"tags.`lladaflow.model` = '{child.data.tags['mlflow.parentRunId']}/sft'")
    assert (measured.info.run_name, measured.data.metrics) == ("eval sft (toy)", {"eval/b1": 1 / 3})
    assert measured.info.status == "FINISHED"
    (run.path / "mlflow.json").unlink()
    request = run.request | {"all_params": run.request["all_params"] | {"register": {"model": "sft"}}}
    (run.path / "request.json").write_text(json.dumps(request))
    tracking.send([run])
    assert talk.get_run(child.data.tags["mlflow.parentRunId"]).data.metrics["eval/b1"] == 1 / 3


def test_a_pipeline_has_the_state_of_its_stages(tracked: Path) -> None:
    run = open_toy(tracked)
    write(run, {"step": 1, "loss": 3.0})
    talk = client(Project.at(tracked))

    def states() -> tuple[str, str]:
        child = talk.get_run(json.loads((run.path / "mlflow.json").read_text())["run_id"])
        return child.info.status, talk.get_run(child.data.tags["mlflow.parentRunId"]).info.status

    tracking.send([run], "live")
    assert states() == ("RUNNING", "RUNNING")
    tracking.send([run], "over")
    assert states() == ("FAILED", "FAILED")
    tracking.send([run])
    assert states() == ("FAILED", "FAILED")
    tracking.send([run], "live")
    assert states() == ("RUNNING", "RUNNING")
    (run.path / "CANCELLED").touch()
    tracking.send([run], "over")
    assert states() == ("KILLED", "KILLED")
    run.succeed(1.0)
    tracking.send([run], "over")
    assert states() == ("FINISHED", "FINISHED")


def test_names_of_runs_say_what_was_put_over_the_profile(tracked: Path) -> None:
    run, workspace = open_toy(tracked), tracked / "workspaces" / "toy-1"
    workspace.mkdir(parents=True)
    (workspace / "workspace.json").write_text(json.dumps({"home": str(tracked), "overrides": ["sft.max_steps=2"]}))
    (run.path / "request.json").write_text(json.dumps(run.request | {"root": str(workspace)}))
    tracking.send([run])
    names = {r.info.run_name for r in client(Project.at(tracked)).search_runs(["1"])}
    assert names == {"toy sft.max_steps=2", f"{run.stage} (toy sft.max_steps=2)"}


def test_an_evaluation_without_a_pipeline_is_a_run_of_its_own(tracked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tracked / "reports/checkpoints/a__b"
    (out / "sudoku").mkdir(parents=True)
    rows = [{"id": str(i), "reply": str(i), "score": float(i == 2)} for i in range(3)]
    (out / "sudoku/a__b.samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (out / "sudoku.json").write_text(json.dumps({"models": {"a__b": {"score": 1 / 3, "n": 3}}}))
    for name in ("table.json", "table.md", "table.png"):
        (out / name).write_text("a table")
    for _ in range(2):
        assert send_sweep(Project.at(tracked), "a/b", EvaluateParams(limit=3), out, ["sudoku"], key="answers-0")
    talk = client(Project.at(tracked))
    [run] = talk.search_runs([tracking.experiment_of(talk, Project.at(tracked))])
    assert (run.data.metrics, run.data.params["limit"], run.data.params["model"]) == (
        {"eval/sudoku": 1 / 3, "sudoku/a__b": 1 / 3},
        "3",
        "a/b",
    )
    assert run.info.status == "FINISHED"
    files = {file.path for file in talk.list_artifacts(run.info.run_id)}
    assert files == {"samples", "table.json", "table.md", "table.png"}
    table = json.loads(Path(talk.download_artifacts(run.info.run_id, "samples/sudoku.json")).read_text())
    assert [row[table["columns"].index("reply")] for row in table["data"]] == ["0", "1", "2"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert not send_sweep(Project.at(tracked), "a/b", EvaluateParams(), out, ["sudoku"], key="answers-0")
