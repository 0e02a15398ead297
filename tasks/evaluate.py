"""The stage `evaluate`: one benchmark with every model of the run; and a list of benchmarks with any one checkpoint.

What is written is equal for equal inputs; how long it took goes to the run's metrics. Knows folders and names; how a
benchmark is put and scored is llada_core.evaluation's.
"""

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llada_core.config.base import ConfigError
from llada_core.config.evaluation import EvaluateParams, ReportParams
from llada_core.config.params import TRAINING_STAGES, Params
from tasks.folders import content_hash, hash_of, read_json, safe, write_json, write_text
from tasks.program import Work, stage_program
from tasks.registry import resolve

if TYPE_CHECKING:
    from llada_core.evaluation.answering import Answerer
    from llada_core.evaluation.run import Benchmark

Result = dict[str, Any]
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Places:
    """Where an evaluation finds and leaves things: local benchmark files (None: the Hub), puzzle files, results,
    and finished answers, which a killed evaluation takes up again."""

    root: Path | None
    puzzles: Path
    out: Path
    answers: Path


def run(work: Work) -> None:
    """The stage's work, in the run's snapshot."""
    params = work.params.evaluate
    assert params is not None
    if work.item is None:
        raise ConfigError(f"evaluate: say which benchmark; this run has: {', '.join(params.benchmarks)}")
    quiet_lm_eval()
    home = work.run.path.parents[1]
    places = Places(data_root(work.params, home), Path("data/eval"), Path("reports/eval"), work.run.path / "answers")
    models = {name: Path("models") / name for name in params.models if (Path("models") / name).is_dir()}
    for name in params.models:
        if name not in models and name not in TRAINING_STAGES:
            models[name] = resolve(name)
    if not models:
        raise ConfigError(f"none of the models to evaluate is there: {', '.join(params.models)}")
    timings = {}
    for name, folder in models.items():
        with answering(folder, params) as answerer:
            timings[name] = measure(work.item, name, answerer, params, places)
    if _rank() == 0:
        path = places.out / f"{work.item}.json"
        write_json(path, read_json(path) | {"run": work.run.key})
        for step, (name, line) in enumerate(timings.items()):
            record = {f"{name}/{key}": value for key, value in line.items()} | {"step": step, "time": time.time()}
            _append(work.run.path / "metrics.jsonl", record)


def sweep(
    model: str, benchmarks: Iterable[str], params: EvaluateParams, places: Places, *, tell: Tell = print
) -> dict[str, Result]:
    """Any checkpoint (folder, alias, Hub name) against a list of benchmarks; one that fails does not stop the others.

    Says what each costs before it starts. Returns a result, or `{"error": why}`, for each benchmark; results are also
    written as the stage writes them, with a report (table.json, table.md, table.png) of those that succeeded.
    """
    from llada_core.evaluation.run import benchmark, cost_of
    from tasks.report import write_report

    quiet_lm_eval(harness=logging.WARNING)
    results: dict[str, Result] = {}
    with answering(resolve(model), params) as answerer:
        for name in benchmarks:
            try:
                asked = benchmark(name, params, root=places.root, puzzles=places.puzzles)
                tell(f"{name}: {cost_of(asked, _as_asked(answerer, asked), limit=params.limit)}")
                line = measure(asked, model, answerer, params, places)
                if _rank() == 0:
                    results[name] = _sign(places.out / f"{name}.json")["models"][safe(model)]
                    tell(f"{name}: {line['score']} in {line['seconds']:.0f} s")
            except (ConfigError, ValueError, OSError, RuntimeError) as error:
                results[name] = {"error": " ".join(str(error).split())}
                tell(f"{name}: {results[name]['error']}")
    measured = [name for name, result in results.items() if "error" not in result]
    if measured and _rank() == 0:
        write_report(places.out, measured, ReportParams(comparisons=()), places.out)
    return results


def _sign(path: Path) -> Result:
    """Notes the commit of the code in a file of results; returns its content."""
    import llada_core

    command = ["git", "-C", str(Path(llada_core.__file__).parent), "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    values = read_json(path) | {"commit": done.stdout.strip() or "no git"}
    write_json(path, values)
    return values


def measure(
    name: "str | Benchmark", model: str, answerer: "Answerer", params: EvaluateParams, places: Places
) -> Result:
    """One benchmark with one model: writes `<out>/<benchmark>.json` and `<out>/<benchmark>/<model>.samples.jsonl`.

    Returns what is not the same every time: seconds, questions and tokens per second.
    """
    from llada_core.evaluation.harness import LladaLM
    from llada_core.evaluation.run import benchmark
    from llada_core.evaluation.run import run as run_benchmark
    from llada_core.evaluation.worklist import AnswerStore, Shard

    asked = benchmark(name, params, root=places.root, puzzles=places.puzzles) if isinstance(name, str) else name
    store = AnswerStore(places.answers / safe(model) / asked.name, Shard.of_process())
    lm = LladaLM(_as_asked(answerer, asked), store)
    result, records = run_benchmark(asked, lm, limit=params.limit)
    if _rank() != 0:
        return {}
    if lm.forwards:
        result["forwards_per_answer"] = round(sum(lm.forwards) / len(lm.forwards), 2)
        result["tokens_per_answer"] = round(sum(lm.new_tokens) / len(lm.new_tokens), 2)
    path = places.out / f"{asked.name}.json"
    known = read_json(path)["models"] if path.exists() else {}
    samples = "".join(_json_line(record) for record in records)
    write_text(places.out / asked.name / f"{safe(model)}.samples.jsonl", samples)
    write_json(path, {"benchmark": asked.name, "models": known | {safe(model): result}})
    seconds = max(store.seconds, 1e-9)
    line = {"score": result.get("score"), "seconds": store.seconds, "questions_per_second": len(records) / seconds}
    return line | ({"tokens_per_second": sum(lm.new_tokens) / seconds} if lm.new_tokens else {})


@contextmanager
def answering(folder: Path, params: EvaluateParams) -> Iterator["Answerer"]:
    """A model and its tokenizer, loaded; their memory is given back at the end."""
    import torch

    from llada_core.evaluation.answering import Answerer, Options
    from llada_core.evaluation.arguments import AUTO_BATCH, load
    from llada_core.tokenizer import Tokenizer

    size = AUTO_BATCH if params.batch_size == "auto" else int(params.batch_size)
    answerer = Answerer(load(str(folder), params.dtype), Tokenizer.load(folder), Options(batch_size=size))
    yield answerer
    del answerer
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def data_root(params: Params, home: Path) -> Path | None:
    """The folder with local benchmark files: LLADAFLOW_DATA_ROOT, evaluate.root or data.root, relative to `home`."""
    own = params.evaluate.root if params.evaluate else None
    return _below(home, own or (params.data.root if params.data else None))


def _below(home: Path, given: str | None) -> Path | None:
    given = os.environ.get("LLADAFLOW_DATA_ROOT") or given
    return home / Path(given).expanduser() if given else None


def sweep_places(model: str, params: EvaluateParams, home: Path, root: Path | None, out: Path) -> Places:
    """Places for `sweep`: answers are kept under what determines them (weights, code, settings).

    root: local benchmark files; None: LLADAFLOW_DATA_ROOT, else `params.root`, else the Hub.
    """
    import llada_core

    settings = params.model_dump(mode="json", exclude={"benchmarks", "models", "root", "limit"})
    key = hash_of([content_hash(resolve(model)), content_hash(Path(llada_core.__file__).parent), settings])[:16]
    root = root or _below(home, params.root)
    return Places(root, home / "data" / "eval", out, home / "runs" / f"answers-{key}")


def quiet_lm_eval(*, harness: int = logging.INFO) -> None:
    """lm-eval warns of what recipes do on purpose; what our harness says is shown from the level `harness` on."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    logging.getLogger("llada_core.evaluation").setLevel(harness)


def _as_asked(answerer: "Answerer", asked: "Benchmark") -> "Answerer":
    return replace(answerer, options=replace(answerer.options, settings=asked.settings))


def _json_line(record: Result) -> str:
    return json.dumps(record, sort_keys=True, ensure_ascii=False) + "\n"


def _append(path: Path, record: Result) -> None:
    with path.open("a", encoding="utf-8") as stream:
        stream.write(_json_line(record))


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


if __name__ == "__main__":
    stage_program("evaluate", run, sys.argv[1:])
