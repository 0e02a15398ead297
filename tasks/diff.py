"""Two evaluations side by side (`llada diff A B`): settings, data, code and scores, question by question.

A side is the name of a model in ./reports/eval, or FOLDER:MODEL with whatever folder a command of ours left results in:
of `llada eval`, a project or workspace, a run, their reports. FOLDER alone is enough where it holds one model, and a run's
key stands for its folder. Knows folders; the comparison is llada_core.evaluation.compare's.
"""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llada_core import files
from llada_core.files import parsed
from llada_core.settings import ConfigError, nearest
from tasks.folders import read_json, safe
from tasks.request import differences
from tasks.runs import find_run

RESULTS = Path("reports/eval")
BELOW = (".", "eval", "reports/eval", "reports", "tree/reports/eval")  # where a given folder may keep its results
SHOWN = 8  # questions named for each direction


def diff(first: str, second: str, root: Path | None = None) -> dict[str, dict[str, Any]]:
    """Benchmark -> comparison, for every benchmark both sides have; raises `ConfigError` if there is none."""
    from llada_core.evaluation.compare import compare

    (one, model), (other, other_model) = side(first, root), side(second, root)
    names = sorted(_benchmarks(one, model).keys() & _benchmarks(other, other_model).keys())
    if not names:
        measured = [", ".join(sorted(_benchmarks(*s))) or "nothing" for s in ((one, model), (other, other_model))]
        told_of = f"{first} was measured on {measured[0]}, {second} on {measured[1]}"
        raise ConfigError(f"{first} and {second} have no benchmark in common: {told_of}")
    found = {}
    for name in names:
        found[name] = compare(_load(one, name, model), _load(other, name, other_model))
        found[name]["code"] = _code(one / f"{name}.json", other / f"{name}.json", root or Path.cwd())
    return found


def side(text: str, root: Path | None = None) -> tuple[Path, str]:
    """The folder of results and the model that one side names; raises `ConfigError` with what there is."""
    if safe(text) in _known(RESULTS):
        return RESULTS, safe(text)
    for folder, model in _readings(text, root or Path.cwd()):
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


def _readings(text: str, root: Path) -> Iterator[tuple[Path, str]]:
    """What a side may mean, the longest folder first: names of folders and of models may have colons of their own."""
    ends = [len(text), *(at for at in range(len(text) - 1, 0, -1) if text[at] == ":")]
    yield from ((Path(text[:at]), text[at + 1 :]) for at in ends if Path(text[:at]).is_dir())
    with contextlib.suppress(ConfigError):
        yield find_run(root, text).path, ""


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
    from llada_core.evaluation.compare import Side

    return Side(_results(folder)[name][model], _records(folder / name / f"{model}.samples.jsonl"))


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


def _code(one: Path, other: Path, root: Path) -> list[str]:
    """What differs between the runs that made two results, as far as their folders are still there."""
    keys = [read_json(path).get("run") for path in (one, other)]
    if None in keys or keys[0] == keys[1]:
        return []
    try:
        old, new = (find_run(root, key) for key in keys)
    except ConfigError:
        return [f"run {keys[0]} -> {keys[1]}"]
    return differences(new.request, old.request)
