"""Two evaluations side by side (`llada diff A B`): settings, data, code and scores, question by question.

A side is `FOLDER:MODEL` with a folder of results such as reports/eval, or the name of a model in ./reports/eval. Knows
folders; the comparison is llada_core.evaluation.compare's.
"""

import json
from pathlib import Path
from typing import Any

from llada_core.config.base import ConfigError, nearest
from tasks.folders import read_json, safe
from tasks.request import differences
from tasks.runs import find_run

RESULTS = Path("reports/eval")
SHOWN = 8  # questions named for each direction


def diff(first: str, second: str, root: Path | None = None) -> dict[str, dict[str, Any]]:
    """Benchmark -> comparison, for every benchmark both sides have; raises `ConfigError` if there is none."""
    from llada_core.evaluation.compare import compare

    (one, model), (other, other_model) = side(first), side(second)
    names = sorted(_benchmarks(one, model).keys() & _benchmarks(other, other_model).keys())
    if not names:
        raise ConfigError(f"{first} and {second} have no benchmark in common")
    found = {}
    for name in names:
        found[name] = compare(_load(one, name, model), _load(other, name, other_model))
        found[name]["code"] = _code(one / f"{name}.json", other / f"{name}.json", root or Path.cwd())
    return found


def side(text: str) -> tuple[Path, str]:
    """The folder of results and the model that one side names; raises `ConfigError` with what there is."""
    folder, colon, model = text.rpartition(":")
    path = Path(folder) if colon else RESULTS
    if not path.is_dir():
        raise ConfigError(f"{path}: no folder of results; write a side as FOLDER:MODEL")
    known = sorted({name for file in path.glob("*.json") for name in read_json(file)["models"]})
    if safe(model) not in known:
        raise ConfigError(f"{path} has no results of {model!r}{nearest(model, known)}")
    return path, safe(model)


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
    found = {path.stem: read_json(path)["models"] for path in folder.glob("*.json")}
    return {name: models[model] for name, models in found.items() if "score" in models.get(model, {})}


def _load(folder: Path, name: str, model: str) -> Any:
    from llada_core.evaluation.compare import Side

    lines = (folder / name / f"{model}.samples.jsonl").read_text(encoding="utf-8").splitlines()
    records = {record["id"]: record for record in map(json.loads, lines)}
    return Side(read_json(folder / f"{name}.json")["models"][model], records)


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
