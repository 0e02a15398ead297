"""Any checkpoint against a list of benchmarks: costs told first, one failure does not stop the others, a report at the end.

Knows folders and names; how one benchmark is measured is tasks.evaluate's.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llada_core.evaluation.params import EvaluateParams, ReportParams
from llada_core.modeling.folder import is_adapter
from llada_core.settings import ConfigError
from tasks.evaluate import Places, answering, as_asked, below, measure, quiet_lm_eval
from tasks.folders import commit_of, content_hash, hash_of, read_json, safe
from tasks.program import rank
from tasks.registry import resolve

if TYPE_CHECKING:
    from llada_core.evaluation.answering import Answerer

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
    (`tasks.shards.sharing`) only the first tells, returns and writes more than answers. Returns a result, or `{"error": why}`, for each benchmark;
    results are also written as the stage writes them, with a report (table.json, table.md, table.png) of those that
    succeeded.
    """
    from tasks.report import Beside, write_report

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
        write_report(places.out, measured, ReportParams(comparisons=()), places.out, Beside(commit=commit_of(CODE)))
    return results


def tell_costs(
    answerer: "Answerer",
    benchmarks: Sequence[str],
    params: EvaluateParams,
    places: Places,
    tell: Tell,
    rate: float | None = None,
) -> dict[str, str]:
    """Says what each benchmark costs at most, and last what all cost together: at `rate` tokens a second, or that of one
    measured forward. Returns why a benchmark cannot be put, for those that cannot.
    """
    from llada_core.evaluation.benchmark import benchmark, cost_of
    from llada_core.evaluation.harness import Cost

    failed, total = {}, Cost()
    for name in benchmarks:
        try:
            asked = benchmark(name, params, root=places.root, puzzles=places.puzzles)
            cost = cost_of(asked, as_asked(answerer, asked), limit=params.limit, rate=rate)
        except FAILURES as error:
            failed[name] = " ".join(str(error).split())
            tell(f"{name}: {failed[name]}")
        else:
            total += cost
            tell(f"{name}: {cost}")
    tell(f"{len(benchmarks) - len(failed)} of {len(benchmarks)} benchmarks, one after the other: {total}")
    return failed


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
    return Places(root, home / "data" / "eval", out, home / "runs" / f"answers-{key}")
