"""What MLflow is told of a run, and what an outage leaves to be told later."""

import json
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from filelock import FileLock

from llada_core.evaluation.params import EvaluateParams
from llada_core.files import complete, parsed, read
from llada_core.settings import flat
from tasks.folders import hash_of, read_json, safe, sqlite_file, write_json
from tasks.project import Project
from tasks.record.registry import artifacts, client, lock_of
from tasks.record.runs import RunFolder, all_runs

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient


def send_results(sender: "Sender", run_id: str, parent: str) -> None:
    """What a finished stage adds to its pipeline's run: its curves and where it ended, or tables and scores of `evaluate`.

    Every evaluated model is a run of its own below the pipeline's, with the same names of metrics (`eval/sudoku`); the
    pipeline carries those of the model that it registers, and for one release `sudoku/MODEL` of each.
    """
    client, run = sender.client, sender.run
    if run.stage.partition("@")[0] != "evaluate":
        final = client.get_run(run_id).data.metrics
        for key in CURVES & final.keys():
            _log_curve(client, run_id, key, parent, f"{run.stage}/{key}")
        _log_metrics(client, parent, {f"{run.stage}/{key}": value for key, value in final.items()})
        return
    asked = run.request["all_params"]
    listed = (asked.get("evaluate") or {}).get("models") or [""]
    chosen = (asked.get("register") or {}).get("model") or listed[-1].partition("=")[0]
    for out in (run.tree / out for out in run.request["outs"]):
        if out.is_dir():
            found = sorted(out.glob("*.samples.jsonl"))
            _log_tables(client, run_id, {path.name.removesuffix(".samples.jsonl"): path for path in found})
        elif out.suffix == ".json":
            result = read_json(out)
            scores = {m: r["score"] for m, r in result["models"].items() if r.get("score") is not None}
            _log_metrics(client, parent, {f"{result['benchmark']}/{model}": score for model, score in scores.items()})
            for model, score in scores.items():
                tags = {"lladaflow.model": f"{parent}/{model}", "mlflow.parentRunId": parent}
                with FileLock(run.path.parent / ".mlflow.lock"):  # benchmarks that end together make it once
                    own = sender.found_or_made(f"eval {model} ({run.title})", "lladaflow.model", tags)
                for place in (own, parent) if model == safe(chosen) else (own,):
                    _log_metrics(client, place, {f"eval/{result['benchmark']}": score})
                client.set_terminated(own)


def send_sweep(
    project: Project, model: str, params: EvaluateParams, results: Path, measured: Iterable[str], *, key: str
) -> bool:
    """What `llada eval` measured, as an MLflow run of its own: settings, scores, every answer, the report.

    `results`: the folder with them; `key`: what tells weights, code and settings. The same measurement sent again adds
    nothing. False when MLflow does not take it (or is not wanted); nothing fails.
    """

    def work() -> None:
        talk, name = client(project), safe(model)
        experiment, own = experiment_of(talk, project), hash_of([key, model, params.limit])[:16]
        with FileLock(lock_of(project.home)):
            found = talk.search_runs([experiment], f"tags.`lladaflow.key` = '{own}'", max_results=1)
            tags = {"lladaflow.key": own}
            run = found[0] if found else talk.create_run(experiment, tags=tags, run_name=f"eval {name}")
        run_id = run.info.run_id
        for benchmark in measured:
            result = read_json(results / f"{benchmark}.json")["models"][name]
            _log_new_params(talk, run_id, {"model": model} | params.model_dump(mode="json"))
            if result.get("score") is not None:
                names = (f"eval/{benchmark}", f"{benchmark}/{name}")
                _log_metrics(talk, run_id, dict.fromkeys(names, result["score"]))
            _log_tables(talk, run_id, {benchmark: results / benchmark / f"{name}.samples.jsonl"})
        for file in sorted(results.glob("table.*")):
            talk.log_artifact(run_id, str(file))
        talk.set_terminated(run_id)

    return os.environ.get("LLADAFLOW_TRACKING") != "off" and delivered(work, f"llada eval of {model}")


def _log_tables(client: "MlflowClient", run_id: str, files: dict[str, Path]) -> None:
    logged = client.get_run(run_id).data.tags.get("mlflow.loggedArtifacts", "")
    for name, path in files.items():
        if f"samples/{name}.json" not in logged:  # a table that is logged again grows
            client.log_table(run_id, samples(path), f"samples/{name}.json")


def _log_new_params(client: "MlflowClient", run_id: str, params: dict[str, Any]) -> None:
    known = client.get_run(run_id).data.params
    log_params(client, run_id, {key: value for key, value in flat(params).items() if key not in known})


def _log_metrics(client: "MlflowClient", run_id: str, values: dict[str, float]) -> None:
    """Metrics without a step, each once."""
    from mlflow.entities import Metric

    known = client.get_run(run_id).data.metrics
    client.log_batch(run_id, metrics=[Metric(key, v, 0, 0) for key, v in values.items() if known.get(key) != v])


CURVES = {"loss", "nll", "reward", "rollout_correct", "validation_nll", "validation_loss", "validation_correct"}
POINTS = 1000  # of a curve in its pipeline's run, whose stage has them all


def _log_curve(client: "MlflowClient", run_id: str, key: str, to: str, name: str) -> None:
    """A metric of a run with its steps as one of another, unless that has it: two pipelines then show theirs in one chart."""
    from mlflow.entities import Metric

    points = sorted(client.get_metric_history(run_id, key), key=lambda point: point.step)
    if len(points) < 2 or client.get_run(to).data.metrics.get(name) == points[-1].value:
        return
    kept = [*points[: -1 : -(-len(points) // POINTS)], points[-1]]
    for start in range(0, len(kept), BATCH):
        some = kept[start : start + BATCH]
        client.log_batch(to, metrics=[Metric(name, point.value, point.timestamp, point.step) for point in some])


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


EXPERIMENT = "lladaflow"
FIRST_SECONDS, EVERY_SECONDS = 5.0, 10.0  # a stage that is over sooner is sent with the next one
BATCH = 1000  # metrics in one request: MLflow's limit
ARTIFACTS = ("tree/params.yaml", "job.sh", "samples.jsonl")
_log = logging.getLogger(__name__)


@contextmanager
def forwarding(run: RunFolder) -> Iterator[None]:
    """Send what the run writes while the block runs, and what was left over at its end."""
    if os.environ.get("LLADAFLOW_TRACKING") == "off":
        yield
        return
    over = threading.Event()
    thread = threading.Thread(target=_keep_sending, args=(run, over), name="mlflow", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=60.0)


def _keep_sending(run: RunFolder, over: threading.Event) -> None:
    if over.wait(FIRST_SECONDS) and not (run.path / "metrics.jsonl").exists():
        return
    while not over.wait(EVERY_SECONDS):
        send([run], "live")
    send([run], "over")


def send_pending(project: Project, *, again: bool = False) -> bool:
    """Send every run of this folder that MLflow does not have whole yet (`again`: or may have lost).

    False when MLflow does not answer.
    """
    pending = [run for run in _made_in(project, project.root.resolve()) if again or not _cursor(run).get("done")]
    return not pending or os.environ.get("LLADAFLOW_TRACKING") == "off" or send(pending[::-1])


def _made_in(project: Project, folder: Path) -> Iterator[RunFolder]:
    """The runs of a folder that make something: a trial has nothing to tell."""
    yield from (run for run in all_runs(project) if run.root.resolve() == folder and run.request["outs"])


State = Literal["live", "over", "unknown"]
"""Of whoever sends a run: a job of it is at work, it has just ended, or nobody knows."""


def send(runs: list[RunFolder], state: State = "unknown") -> bool:
    """Send what is new in these runs; False when MLflow does not answer."""

    def send_all() -> None:
        for run in runs:
            Sender(run).send(state)

    return delivered(send_all, runs[0].key)


def delivered(work: Callable[[], None], what: str) -> bool:
    """Whether MLflow took what `work` sends; what it does not take is told in a line."""
    for name, value in (("REQUEST_MAX_RETRIES", "1"), ("REQUEST_TIMEOUT", "10")):
        os.environ.setdefault(f"MLFLOW_HTTP_{name}", value)
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        work()
    except (MlflowException, RequestException, SQLAlchemyError, OSError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        _log.warning("MLflow does not take what %s measured (%s); it is kept and sent later", what, reason)
        return False
    return True


def gather(project: Project, name: str, rows: list[dict[str, Any]]) -> bool:
    """Put the pipeline runs of several folders under one parent, each with its score; False when MLflow is silent."""
    runs = [next(_made_in(project, Path(row["folder"])), None) for row in rows]
    first = next((run for run in runs if run is not None), None)
    if first is None or os.environ.get("LLADAFLOW_TRACKING") == "off":
        return False

    def gather_all() -> None:
        sender = Sender(first)
        key = hash_of([name, sorted(row["folder"] for row in rows)])[:16]
        found = sender.find(f"tags.`lladaflow.sweep` = '{key}'")
        parent = found or sender.create(name, {"lladaflow.sweep": key})
        for run, row in ((run, row) for run, row in zip(runs, rows, strict=True) if run is not None):
            child = sender.client.get_run(Sender(run).send()).data.tags["mlflow.parentRunId"]
            tags = {"mlflow.parentRunId": parent, "lladaflow.overrides": row["overrides"]}
            for tag, value in tags.items():
                sender.client.set_tag(child, tag, value)
            if row["score"] is not None:
                sender.client.log_metric(child, "score", row["score"], timestamp=0, step=0)
        sender.client.set_terminated(parent)

    return delivered(gather_all, name)


def mlflow_link(project: Project) -> str:
    """Where a person looks at it: the server's address, or how to start one on the project's database."""
    uri = project.tracking_uri
    return uri if uri.startswith("http") else f"`make ui` in {project.home}"


def experiment_of(client: "MlflowClient", project: Project) -> str:
    """The id of the project's experiment; made if need be, with its files beside `root`'s runs where there is no server."""
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
    if found := client.get_experiment_by_name(name):
        return found.experiment_id
    local = not client.tracking_uri.startswith("http")
    folder = artifacts(project.home.resolve()).as_uri()
    with FileLock(lock_of(project.home)):
        found = client.get_experiment_by_name(name)
        return found.experiment_id if found else client.create_experiment(name, folder if local else None)


class Sender:
    """Sends one run folder; `cursor` remembers what arrived."""

    def __init__(self, run: RunFolder) -> None:
        self.run, self.request = run, run.request
        self.client: MlflowClient = client(Project.at(run.path.parents[1]))
        self.cursor = _cursor(run)

    def send(self, state: State = "unknown") -> str:
        """Everything new; returns the id of the stage's MLflow run."""
        with FileLock(self.run.path / ".mlflow.lock"):
            self.cursor = _cursor(self.run)
            ended, known = self.run.succeeded, self._known()
            if not known:
                self.cursor = {"run_id": self._child(), "uri": self._address, "at": 0, "steps": {}}
                self._describe()
            self._metrics()
            run_id: str = self.cursor["run_id"]
            if ended and not self.cursor.get("done"):
                self._finish()
            elif not ended and state == "over":
                self.client.set_terminated(run_id, "KILLED" if (self.run.path / "CANCELLED").exists() else "FAILED")
                self._settle()
            elif not ended and state == "live" and not (known and self._status == "RUNNING"):
                self.client.update_run(run_id, status="RUNNING")
                self._settle()
            return run_id

    @property
    def _status(self) -> str:
        return str(self.client.get_run(self.cursor["run_id"]).info.status)

    def _settle(self) -> None:
        """The pipeline's run is running, failed or stopped as long as one of its stages is, else finished."""
        parent = self._parent()
        below = self.client.search_runs([self._experiment], f"tags.`mlflow.parentRunId` = '{parent}'")
        states = {run.info.status for run in below}
        now = next((state for state in ("RUNNING", "FAILED", "KILLED") if state in states), "FINISHED")
        if now == "RUNNING":
            self.client.update_run(parent, status=now)
        else:
            self.client.set_terminated(parent, now)

    def _known(self) -> bool:
        """Whether the run that the cursor names is in this database (it may have been lost)."""
        if self.cursor.get("uri") != self._address:
            return False
        return bool(self.find(f"attributes.run_id = '{self.cursor['run_id']}'"))

    @property
    def _address(self) -> str:
        """Where MLflow keeps its records, told so that it stays true when the project moves."""
        file = sqlite_file(self.client.tracking_uri)
        home = self.run.path.parents[1]
        return file.name if file and file.parent == home else self.client.tracking_uri

    def find(self, condition: str) -> str | None:
        """The MLflow run that meets a condition."""
        found = self.client.search_runs([self._experiment], condition, max_results=1)
        return found[0].info.run_id if found else None

    @property
    def _experiment(self) -> str:
        return experiment_of(self.client, Project.at(self.run.path.parents[1]))

    def _child(self) -> str:
        with FileLock(self.run.path.parent / ".mlflow.lock"):
            tags = {"lladaflow.key": self.run.key, "mlflow.parentRunId": self._parent()}
            return self.found_or_made(f"{self.run.stage} ({self.run.title})", "lladaflow.key", tags)

    def found_or_made(self, name: str, key: str, tags: dict[str, str]) -> str:
        """The run whose tag `key` is that of `tags`, else a new one."""
        return self.find(f"tags.`{key}` = '{tags[key]}'") or self.create(name, tags)

    def _parent(self) -> str:
        params = {k: v for k, v in self.request["all_params"].items() if k != "launch"}
        key = self.request.get("pipeline") or hash_of([params, self.request["source"]])[:16]
        if found := self.find(f"tags.`lladaflow.pipeline` = '{key}'"):
            return found
        made = self.create(self.run.title, {"lladaflow.pipeline": key, "lladaflow.root": str(self.run.root)})
        log_params(self.client, made, flat(params))
        return made

    def create(self, name: str, tags: dict[str, str]) -> str:
        """A new MLflow run; returns its id."""
        return self.client.create_run(self._experiment, tags=tags, run_name=name).info.run_id

    def _describe(self) -> None:
        from mlflow.entities import Dataset, DatasetInput, RunTag

        run_id = self.cursor["run_id"]
        log_params(self.client, run_id, flat(self.request["params"]))
        tags = [RunTag(f"input.{path}", digest) for path, digest in self.request["inputs"].items()]
        tags += [RunTag("lladaflow.folder", str(self.run.path)), RunTag("lladaflow.stage", self.run.stage)]
        self.client.log_batch(run_id, tags=tags)
        data = [
            DatasetInput(Dataset(name=path, digest=digest[:16], source_type="local", source=json.dumps({"uri": path})))
            for path, digest in self.request["inputs"].items()
        ]
        self.client.log_inputs(run_id, datasets=data)

    def _metrics(self) -> None:
        path = self.run.path / "metrics.jsonl"
        if not path.exists():
            return
        with path.open("rb") as stream:
            stream.seek(self.cursor["at"])
            text = stream.read()
        text = text[: text.rfind(b"\n") + 1]
        batch = self._new_points([parsed(line, str(path)) for line in complete(text) if line.startswith(b"{")])
        for start in range(0, len(batch), BATCH):
            self.client.log_batch(self.cursor["run_id"], metrics=batch[start : start + BATCH])
        self.cursor["at"] += len(text)
        write_json(self.run.path / "mlflow.json", self.cursor)

    def _new_points(self, lines: list[dict[str, Any]]) -> list[Any]:
        """A resumed run measures some steps again, with the same values: only a roll-back makes them new."""
        from mlflow.entities import Metric

        points, steps = [], self.cursor["steps"]
        for line in lines:
            if line.get("event") == "rolled back":
                steps.update({key: min(step, line["back_to"]) for key, step in steps.items()})
            for key, value in line.items():
                number = isinstance(value, int | float) and not isinstance(value, bool) and key not in ("step", "time")
                if number and line["step"] > steps.get(key, -1):
                    points.append(Metric(key, float(value), int(line["time"] * 1000), line["step"]))
                    steps[key] = line["step"]
        return points

    def _finish(self) -> None:
        run_id = self.cursor["run_id"]
        self.client.set_tag(run_id, "lladaflow.job", self.run.job_name)
        ended = read_json(self.run.path / "SUCCESS")
        self.client.log_metric(run_id, "seconds", ended["seconds"], timestamp=int(ended["time"] * 1000), step=0)
        paths = [self.run.path / name for name in ARTIFACTS]
        paths += [self.run.tree / out for out in self.request["outs"] if out.startswith("reports/")]
        for path in paths:
            if path.is_file():
                self.client.log_artifact(run_id, str(path))
        send_results(self, run_id, self._parent())
        self.client.set_terminated(run_id)
        self._settle()
        self.cursor["done"] = True
        write_json(self.run.path / "mlflow.json", self.cursor)


def _cursor(run: RunFolder) -> dict[str, Any]:
    path = run.path / "mlflow.json"
    return read_json(path) if path.exists() else {}
