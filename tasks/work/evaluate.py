"""The stage `evaluate`: one benchmark with every model of the run.

What is written is equal for equal inputs; how long it took goes to the run's metrics.
"""

import gc
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from llada_core.data.contamination import saved_values
from llada_core.evaluation.params import EvaluateParams
from llada_core.files import line_of
from llada_core.settings import ConfigError, while_imported
from tasks.folders import read_json, safe, write_json, write_text
from tasks.project import data_root, visible_gpus
from tasks.record.runs import StageContext, verify_inputs

if TYPE_CHECKING:
    from llada_core.evaluation.answering import Responder
    from llada_core.evaluation.benchmark import Benchmark


Result = dict[str, Any]


@dataclass(frozen=True)
class Places:
    """Where an evaluation finds and leaves things: local benchmark files (None: the Hub), puzzle files, results,
    and finished answers, which a killed evaluation takes up again."""

    root: Path | None
    puzzles: Path
    out: Path
    answers: Path
    trained: Path | None = None  # the folder with the values of questions that this run's models were trained on


def run(work: StageContext) -> None:
    """The stage's work, in the run's snapshot."""
    params = work.params.evaluate
    assert params is not None
    if work.item is None:
        raise ConfigError(f"evaluate: say which benchmark; this run has: {', '.join(params.benchmarks)}")
    quiet_lm_eval()
    verify_inputs(work)
    own = work.run.whole.path
    root = data_root(work.params, own.parents[1])
    puzzles = Path("data/eval")
    places = Places(root, puzzles, Path("reports/eval"), own / "answers", trained=puzzles)
    models = {name: Path("models") / name for name in params.models if (Path("models") / name).is_dir()}
    models |= {label: Path(folder) for label, sign, folder in (name.partition("=") for name in params.models) if sign}
    if not models:
        raise ConfigError(f"none of the models to evaluate is there: {', '.join(params.models)}")
    with while_imported():
        import llada_core.evaluation.benchmark  # noqa: F401 - lm-eval, which measuring imports

    timings = {}
    program = [sys.executable, "-m", "tasks.evaluate", work.item]
    with sharing(_processes(work, list(models.values())), program, {"LLADAFLOW_RUN": str(work.run.path)}):
        for name, folder in models.items():
            with answering(folder, params) as answerer:
                timings[name] = measure(work.item, name, answerer, params, places)
                if timings[name] and params.speed is not None and params.speed.asks(work.item, name):
                    measure_speed(work.item, name, answerer, params, places)
    if any(timings.values()):
        path = places.out / f"{work.item}.json"
        write_json(path, read_json(path) | {"run": work.run.key})
        for step, (name, line) in enumerate(timings.items()):
            record = {f"{safe(name)}/{key}": value for key, value in line.items()} | {"step": step, "time": time.time()}
            _append(work.run.path / "metrics.jsonl", record)


def _processes(work: StageContext, folders: list[Path]) -> int:
    """One a GPU of this machine, or `launch.cpu_processes`, unless `launch.processes` says another number (whose ranks
    the launcher starts)."""
    assert work.params.evaluate is not None
    launch = work.params.launch.of("evaluate")
    if launch.processes:
        return 1
    found = processes(folders, work.params.evaluate)
    return found if visible_gpus() else max(found, launch.cpu_processes)


def processes(folders: list[Path], params: EvaluateParams, device: str = "auto") -> int:
    """How many processes of this machine measure these models best."""
    from llada_core.evaluation.answering import processes

    return processes(folders, params.dtype, device, params.bits)


@contextmanager
def sharing(count: int, program: Sequence[str], environment: Mapping[str, str] | None = None) -> Iterator[None]:
    """Has `count` - 1 more processes of this machine run `program` while the block does the first one's share.

    Each is numbered as a launcher would number it (RANK, LOCAL_RANK, WORLD_SIZE), this one as 0, and takes the GPU of
    its number. They need no launcher, since they meet in files alone: one that dies ends no other, and what it leaves
    is done by this one. Those that still run when the block ends are ended.
    """
    if count == 1 or "RANK" in os.environ:
        yield
        return
    common = {"WORLD_SIZE": str(count)}
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))}

    def numbered(rank: int) -> dict[str, str]:
        return {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}

    others = [
        subprocess.Popen(program, env={**os.environ, **threads, **(environment or {}), **numbered(rank)})
        for rank in range(1, count)
    ]
    os.environ.update(numbered(0))
    try:
        yield
    finally:
        for name in numbered(0):
            del os.environ[name]
        for process in others:
            process.terminate()
        for process in others:
            process.wait()


def measure(name: str, model: str, answerer: "Responder", params: EvaluateParams, places: Places) -> Result:
    """One benchmark with one model: writes `<out>/<benchmark>.json` and `<out>/<benchmark>/<model>.samples.jsonl`.

    Returns what is not the same every time: seconds, questions and tokens per second. Only the first of several
    processes and jobs scores, writes and returns; the others answer their share.
    """
    from llada_core.evaluation.answering import AnswerStore, Shard
    from llada_core.evaluation.benchmark import answer, benchmark
    from llada_core.evaluation.benchmark import run as run_benchmark
    from llada_core.evaluation.harness import LladaLM

    asked = benchmark(name, params, root=places.root, puzzles=places.puzzles)
    store = AnswerStore(places.answers / safe(model) / asked.name, Shard.of_process())
    lm = LladaLM(as_asked(answerer, asked), store)
    if store.shard.rank != 0:
        answer(asked, lm, limit=params.limit)
        return {}
    trained = saved_values(places.trained) if places.trained is not None else frozenset()
    result, records = run_benchmark(asked, lm, limit=params.limit, trained=trained)
    if params.bits is not None:
        result["bits"] = params.bits
    if lm.forwards:
        result["forwards_per_answer"] = round(sum(lm.forwards) / len(lm.forwards), 2)
        result["tokens_per_answer"] = round(sum(lm.new_tokens) / len(lm.new_tokens), 2)
    path = places.out / f"{asked.name}.json"
    samples = "".join(map(line_of, records))
    write_text(places.out / asked.name / f"{safe(model)}.samples.jsonl", samples)
    with FileLock(places.out / f".{asked.name}.lock"):  # another evaluation may add its model's result
        known = read_json(path)["models"] if path.exists() else {}
        write_json(path, {"benchmark": asked.name, "models": known | {safe(model): result}})
    seconds = max(store.seconds, 1e-9)
    line = {"score": result.get("score"), "seconds": store.seconds, "questions_per_second": len(records) / seconds}
    return line | ({"tokens_per_second": sum(lm.new_tokens) / seconds} if lm.new_tokens else {})


def measure_speed(name: str, model: str, answerer: "Responder", params: EvaluateParams, places: Places) -> None:
    """What `params.speed` costs one model on one benchmark: its rows in `<out>/<benchmark>/speed.json`, by model.

    Raises `ConfigError` for a benchmark that is not answered in words. These rows hold times, so that they differ from
    run to run.
    """
    from llada_core.evaluation.benchmark import benchmark
    from llada_core.evaluation.speed import study, table

    assert params.speed is not None
    asked = benchmark(name, params, root=places.root, puzzles=places.puzzles)
    if asked.recipe.kind != "generate":
        raise ConfigError(f"evaluate.speed: {name} writes nothing; name benchmarks that are answered in words")
    limit, kept = params.speed.limit or params.limit, speed_answers(places, model, asked.name)
    points = study(asked, answerer, params.speed.settings, limit, kept=kept)
    path = places.out / asked.name / "speed.json"
    known = read_json(path) if path.exists() else {}
    write_json(path, known | {safe(model): table(points)})


def speed_answers(places: Places, model: str, benchmark: str) -> Path:
    """The folder with what an interrupted look at faster settings has answered, beside the ordinary answers."""
    return places.answers / safe(model) / benchmark / "speed"


@contextmanager
def answering(folder: Path, params: EvaluateParams, device: str = "auto") -> Iterator["Responder"]:
    """A model and its tokenizer, loaded (device "meta": its shapes alone); their memory is given back at the end."""
    import torch

    from llada_core.evaluation.answering import AUTO_BATCH, Responder, ResponderOptions, load
    from llada_core.tokenizer import Tokenizer

    size = AUTO_BATCH if params.batch_size == "auto" else int(params.batch_size)
    model = load(str(folder), params.dtype, device, params.bits)
    answerer = Responder(model, Tokenizer.load(folder), ResponderOptions(batch_size=size, compiled=params.compile))
    del model
    compiles = params.compile != "off" and device != "meta"
    if compiles:
        print(answerer.engine.told(), file=sys.stderr)
    yield answerer
    if compiles:
        print(answerer.engine.spent(), file=sys.stderr)
    del answerer
    gc.collect()  # an engine knows itself as one of those that share its queue
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def quiet_lm_eval(*, harness: int = logging.INFO) -> None:
    """lm-eval warns of what recipes do on purpose; what our harness says is shown from the level `harness` on."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    logging.getLogger("llada_core.evaluation").setLevel(harness)


def as_asked(answerer: "Responder", asked: "Benchmark") -> "Responder":
    """The answerer with a benchmark's settings."""
    return replace(answerer, options=replace(answerer.options, settings=asked.settings))


def _append(path: Path, record: Result) -> None:
    with path.open("a", encoding="utf-8") as stream:
        stream.write(line_of(record))
