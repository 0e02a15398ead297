"""Outside of a run: any checkpoint on a list of benchmarks, and two evaluations side by side."""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from llada_core import files
from llada_core.evaluation.params import EvaluateParams, ReportParams
from llada_core.evaluation.statistics import paired
from llada_core.files import parsed, stem
from llada_core.modeling.folder import is_adapter
from llada_core.settings import ConfigError, flat, nearest
from tasks.folders import commit_of, content_hash, hash_of, read_json, safe, write_text
from tasks.own_code import questions
from tasks.project import Project, below
from tasks.record.registry import named, resolve, version_of
from tasks.record.runs import differences, find_run, rank
from tasks.work.evaluate import Places, answering, as_asked, measure, quiet_lm_eval

if TYPE_CHECKING:
    from llada_core.evaluation.answering import Responder
    from llada_core.evaluation.harness import Cost


Record = dict[str, Any]
NOT_SETTINGS = ("score", "n", "also", "stderr", "low", "high", "forwards_per_answer", "tokens_per_answer")


@dataclass(frozen=True)
class Measurement:
    """One model on one benchmark: its result, and its records by question."""

    result: Mapping[str, Any]
    records: Mapping[str, Record]


def compare(first: Measurement, second: Measurement) -> dict[str, Any]:
    """How `second` differs from `first`.

    `settings`: key -> (first, second); `questions`: how many only one side has, and how many read differently;
    `difference`: second minus first with its 95 % interval; `gained` and `lost`: the questions behind it.
    """
    common = sorted(first.records.keys() & second.records.keys())
    asked = [q for q in common if _question(first.records[q]) != _question(second.records[q])]
    report: dict[str, Any] = {
        "settings": _differences(first.result, second.result),
        "questions": {
            "common": len(common),
            "only_first": len(first.records) - len(common),
            "only_second": len(second.records) - len(common),
            "asked_differently": len(asked),
        },
        "other_answers": sum(first.records[q]["reply"] != second.records[q]["reply"] for q in common),
    }
    if common:
        scores = [(float(second.records[q]["score"]), float(first.records[q]["score"])) for q in common]
        found = paired([new for new, _ in scores], [old for _, old in scores])
        report["difference"] = {**asdict(found), "significant": found.significant}
        report["gained"] = [q for q, (new, old) in zip(common, scores, strict=True) if new > old]
        report["lost"] = [q for q, (new, old) in zip(common, scores, strict=True) if new < old]
    return report


def _question(record: Record) -> tuple[Any, Any]:
    return record["prompt"], record["target"]


def _differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    one, other = flat(first), flat(second)
    keys = sorted(key for key in one.keys() | other.keys() if key.partition(".")[0] not in NOT_SETTINGS)
    return {key: (one.get(key), other.get(key)) for key in keys if one.get(key) != other.get(key)}


RESULTS = Path("reports/eval")
BELOW = (".", "eval", "reports/eval", "reports", "tree/reports/eval")  # where a given folder may keep its results
SHOWN = 8  # questions named for each direction


def diff(first: str, second: str, project: Project | None = None) -> dict[str, dict[str, Any]]:
    """Benchmark -> comparison, for every benchmark both sides have; raises `ConfigError` if there is none."""
    (one, model), (other, other_model) = side(first, project), side(second, project)
    names = sorted(_benchmarks(one, model).keys() & _benchmarks(other, other_model).keys())
    if not names:
        measured = [", ".join(sorted(_benchmarks(*s))) or "nothing" for s in ((one, model), (other, other_model))]
        told_of = f"{first} was measured on {measured[0]}, {second} on {measured[1]}"
        raise ConfigError(f"{first} and {second} have no benchmark in common: {told_of}")
    found = {}
    for name in names:
        found[name] = compare(_load(one, name, model), _load(other, name, other_model))
        found[name]["code"] = _code(one / f"{name}.json", other / f"{name}.json", project or Project.at())
    return found


def side(text: str, project: Project | None = None) -> tuple[Path, str]:
    """The folder of results and the model that one side names; raises `ConfigError` with what there is."""
    if safe(text) in _known(RESULTS):
        return RESULTS, safe(text)
    for folder, model in _readings(text, project or Project.at()):
        if (place := _place(folder)) is None:
            continue
        known = _known(place)
        if safe(model) in known:
            return place, safe(model)
        if model:
            raise ConfigError(f"{place} has no results of {model!r}{nearest(model, known)}")
        if len(known) > 1:
            raise ConfigError(f"{place} has results of {', '.join(known)}; say of which: {place}:{known[0]}")
        return place, known[0]
    if known := _known(RESULTS):
        raise ConfigError(f"{RESULTS} has no results of {text!r}{nearest(text, known)}")
    raise ConfigError(
        f"{text}: no folder of results; write a side as FOLDER:MODEL, with a folder that `llada eval` or the stage "
        "evaluate has written"
    )


def _readings(text: str, project: Project) -> Iterator[tuple[Path, str]]:
    """What a side may mean, the longest folder first: names of folders and of models may have colons of their own."""
    ends = [len(text), *(at for at in range(len(text) - 1, 0, -1) if text[at] == ":")]
    yield from ((Path(text[:at]), text[at + 1 :]) for at in ends if Path(text[:at]).is_dir())
    with contextlib.suppress(ConfigError):
        yield find_run(project, text).path, ""


def _place(folder: Path) -> Path | None:
    """The folder itself, or the one below it, that holds results."""
    return next((folder / name for name in BELOW if _known(folder / name)), None)


def _known(folder: Path) -> list[str]:
    return sorted({model for models in _results(folder).values() for model in models})


def _results(folder: Path) -> dict[str, dict[str, Any]]:
    """Benchmark -> model -> result. Tables and other JSON that lies beside results is none."""
    read = {path.stem: read_json(path) for path in sorted(folder.glob("*.json"))}
    return {name: value["models"] for name, value in read.items() if isinstance(value, dict) and "benchmark" in value}


def told(comparisons: dict[str, dict[str, Any]]) -> str:
    """The comparison as lines of text."""
    lines = []
    for name, c in comparisons.items():
        d, q = c.get("difference"), c["questions"]
        lines.append(f"{name}: {q['common']} questions in common, {c['other_answers']} answered differently")
        if d is not None:
            p = "" if d["p_value"] is None else f", McNemar p = {d['p_value']:.3g}"
            interval = f"[{100 * d['low']:+.1f}, {100 * d['high']:+.1f}]"
            verdict = "a difference" if d["significant"] else "within noise"
            lines.append(
                f"  score {100 * d['value']:+.1f} points {interval} (+{d['gained']} −{d['lost']}{p}): {verdict}"
            )
            lines += [
                f"  {way}: {', '.join(c[way][:SHOWN])}{' ...' * (len(c[way]) > SHOWN)}" for way in ("gained", "lost")
            ]
        uneven = {k: v for k, v in q.items() if k != "common" and v}
        lines += [f"  questions {k.replace('_', ' ')}: {v}" for k, v in uneven.items()]
        lines += [f"  {key}: {old} -> {new}" for key, (old, new) in c["settings"].items()]
        lines += [f"  {line}" for line in c["code"]]
    return "\n".join(lines)


def _benchmarks(folder: Path, model: str) -> dict[str, Any]:
    found = {name: models[model] for name, models in _results(folder).items() if model in models}
    return {name: result for name, result in found.items() if "score" in result}


def _load(folder: Path, name: str, model: str) -> Any:
    return Measurement(_results(folder)[name][model], _records(folder / name / f"{model}.samples.jsonl"))


def _records(file: Path) -> dict[str, dict[str, Any]]:
    """Question -> record, without those whose score is no number; raises `ConfigError` that names a damaged line."""
    found = {}
    for number, line in enumerate(files.lines(file), 1):
        try:
            record = parsed(line, f"line {number}") if line.strip() else None
            if record is not None and math.isfinite(float(record["score"])):
                found[str(record["id"])] = record
        except (ValueError, KeyError, TypeError) as error:
            remedy = "remove the folder of this benchmark and measure it again"
            raise ConfigError(f"{file}, line {number}: no record of an answer ({error}); {remedy}") from None
    return found


def _code(one: Path, other: Path, project: Project) -> list[str]:
    """What differs between the runs that made two results, as far as their folders are still there."""
    keys = [read_json(path).get("run") for path in (one, other)]
    if None in keys or keys[0] == keys[1]:
        return []
    try:
        old, new = (find_run(project, key) for key in keys)
    except ConfigError:
        return [f"run {keys[0]} -> {keys[1]}"]
    return differences(new.request, old.request)


Result = dict[str, Any]
Tell = Callable[[str], object]
CODE = Path(__file__).parent
FAILURES = (ConfigError, ValueError, OSError, RuntimeError)  # of one benchmark, which stop no other


def sweep(
    model: str,
    benchmarks: Sequence[str],
    params: EvaluateParams,
    places: Places,
    *,
    device: str = "auto",
    tell: Tell = print,
) -> dict[str, Result]:
    """Any checkpoint (folder, alias, Hub name) against a list of benchmarks; one that fails does not stop the others.

    The model is loaded once, for all of them. Says what each and all cost before the first starts. Of several processes
    (`tasks.work.evaluate.sharing`) only the first tells, returns and writes more than answers. Returns a result, or `{"error": why}`, for each benchmark;
    results are also written as the stage writes them, with a report (table.json, table.md, table.png) of those that
    succeeded.
    """
    from tasks.work.report import Beside, write_report

    quiet_lm_eval(harness=logging.WARNING)
    results: dict[str, Result] = {}
    first = rank() == 0
    with answering(resolve(model), params, device) as answerer:
        failed = tell_costs(answerer, benchmarks, params, places, tell) if first else {}
        for name in benchmarks:
            if name in failed:
                results[name] = {"error": failed[name]}
                continue
            try:
                if line := measure(name, model, answerer, params, places):
                    results[name] = read_json(places.out / f"{name}.json")["models"][safe(model)]
                    tell(f"{name}: {line['score']} in {line['seconds']:.0f} s")
            except FAILURES as error:
                results[name] = {"error": " ".join(str(error).split())}
                if first:
                    tell(f"{name}: {results[name]['error']}")
    measured = [name for name, result in results.items() if "error" not in result]
    if measured and first:
        with FileLock(places.out / ".report.lock"):  # what is read last is what is written last
            write_report(places.out, measured, ReportParams(comparisons=()), places.out, Beside(commit=commit_of(CODE)))
    return results


def tell_costs(
    answerer: "Responder",
    benchmarks: Sequence[str],
    params: EvaluateParams,
    places: Places,
    tell: Tell,
    rate: float | None = None,
) -> dict[str, str]:
    """Says what each benchmark costs at most, and last what all cost together: at `rate` tokens a second, or that of one
    measured forward. Returns why a benchmark cannot be put, for those that cannot.
    """
    from llada_core.evaluation.harness import Cost

    costs, failed = costs_of(answerer, benchmarks, params, places, rate)
    for name in benchmarks:
        tell(f"{name}: {costs[name] if name in costs else failed[name]}")
    total = sum(costs.values(), Cost())
    tell(f"{len(costs)} of {len(benchmarks)} benchmarks, one after the other: {total}")
    return failed


def costs_of(
    answerer: "Responder",
    benchmarks: Sequence[str],
    params: EvaluateParams,
    places: Places,
    rate: float | None = None,
) -> "tuple[dict[str, Cost], dict[str, str]]":
    """What each benchmark costs at most, and why one cannot be put, for those that cannot."""
    from llada_core.evaluation.benchmark import benchmark, cost_of

    costs, failed = {}, {}
    for name in benchmarks:
        try:
            asked = benchmark(name, params, root=places.root, puzzles=places.puzzles)
            costs[name] = cost_of(asked, as_asked(answerer, asked), limit=params.limit, rate=rate)
        except FAILURES as error:
            failed[name] = " ".join(str(error).split())
    return costs, failed


def with_own_questions(files: Sequence[Path], places: Places) -> Places:
    """Places where files of questions and answers are benchmarks called by their stems; raises as `questions` does."""
    if not files:
        return places
    folder = places.out / "questions"
    for file in places.puzzles.glob("*.jsonl"):
        write_text(folder / file.name, file.read_text(encoding="utf-8"))
    for file in files:
        write_text(folder / f"{stem(file)}.jsonl", questions(file))
    return replace(places, puzzles=folder)


def sweep_places(model: str, params: EvaluateParams, home: Path, root: Path | None, out: Path) -> Places:
    """Places for `sweep`: answers are kept under what determines them (weights, code, settings).

    root: local benchmark files; None: LLADAFLOW_DATA_ROOT, else `params.root`, else the Hub.
    """
    from llada_core.evaluation.answering import ROOT, code_of_evaluation, whole_model

    folder = resolve(model)
    if not (folder / "config.json").is_file() and not is_adapter(folder):
        raise ConfigError(f"{folder}: no config.json there, so it is no model folder")
    settings = params.model_dump(mode="json", exclude={"benchmarks", "models", "root", "limit"})
    # An adapter made elsewhere may name its base by its place, where other weights may lie tomorrow.
    weights = [content_hash(part) for part in whole_model(str(folder))]
    code = {str(path.relative_to(ROOT)): content_hash(path) for path in code_of_evaluation()}
    key = hash_of([weights, code, settings])[:16]
    root = root or below(home, params.root)
    return Places(root, _puzzles_of(model, home), out, home / "runs" / f"answers-{key}")


def _puzzles_of(model: str, home: Path) -> Path:
    """The folder of this project's puzzles; where it has none, that of the run which trained the model."""
    own, there = home / "data" / "eval", trained_in(model) / "data" / "eval"
    return there if there.is_dir() and not own.is_dir() else own


def trained_in(model: str) -> Path:
    """The folder of the run that trained a model: the project, a workspace, or what lies around a folder from elsewhere."""
    folder = Path(model).expanduser()
    if not folder.is_dir() and (reference := named(model)):
        project = Project.at()
        return Path(version_of(project, *reference).tags.get("folder", project.root))
    return folder.resolve().parent.parent  # RUN/models/STAGE; of a folder as high as `/model` the file system itself
