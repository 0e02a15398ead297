"""A sampler study: accuracy against tokens a second over `steps x block x rule x cache`, with the Pareto front drawn.

Any model with any benchmark that generates; the settings are put over those of its recipe. Processor seconds of one
thread are the measure, so that a busy machine tells the same story.

`python -m benchmarks.pareto MODEL_FOLDER [BENCHMARK] [LIMIT] [PICTURE]`
"""

import itertools
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.champion import recipe
from benchmarks.timing import table
from llada_core.evaluation.answering import Responder, Response
from llada_core.evaluation.benchmark import Benchmark, benchmark, run
from llada_core.evaluation.harness import LladaLM
from llada_core.evaluation.params import BenchmarkSettings, EvaluateParams
from llada_core.evaluation.requests import GenerationRequest
from tasks.project import below
from tasks.work.evaluate import answering, quiet_lm_eval

SHARES = (1, 2, 4)  # of the length: steps and blocks
RULES: dict[str, dict[str, Any]] = {
    "threshold 0.9": {"threshold": 0.9},
    "threshold 0.99": {"threshold": 0.99},
    "factor 0.5": {"factor": 0.5},
    "entropy bound 0.1": {"remasking": "entropy", "entropy_bound": 0.1},
}
CACHES = ("none", "prefix", "dual")
PUZZLES = BenchmarkSettings(sampling=asdict(recipe()))
COLOURS = {"none": "#1b6ca8", "prefix": "#d1761b", "dual": "#3d8b4f"}


@dataclass(frozen=True)
class Point:
    """One setting and what it scored."""

    rule: str
    block: int
    cache: str
    score: float
    low: float
    high: float
    speed: float  # tokens of answers a second
    forwards: float  # an answer took part in


def settings(length: int) -> dict[tuple[str, int, str], dict[str, Any]]:
    """Every setting of the study, by rule, block length and cache; several tokens a step are a rule of their own."""
    rules = {f"{length // share} steps": {"steps": length // share} for share in SHARES} | RULES
    blocks = [length // share for share in SHARES if length % share == 0]
    found = {}
    for (rule, values), block, cache in itertools.product(rules.items(), blocks, CACHES):
        if values.get("steps", length) % (length // block) == 0:
            found[rule, block, cache] = {"steps": length, **values, "block_length": block, "cache": cache}
    return found


@dataclass(frozen=True)
class Clocked(Responder):
    """An answerer that adds up the processor seconds of its generation."""

    seconds: list[float] = field(default_factory=list)

    def generate(self, asked: list[GenerationRequest]) -> list[Response]:
        """As its parent."""
        began = time.process_time()
        answers = super().generate(asked)
        self.seconds.append(time.process_time() - began)
        return answers


def measured(asked: Benchmark, answerer: Responder, limit: int | None) -> tuple[dict[str, Any], float, float]:
    """A benchmark's result, tokens a second and forwards of an answer."""
    clocked = Clocked(answerer.model, answerer.tokenizer, replace(answerer.options, settings=asked.settings))
    lm = LladaLM(clocked)
    result, _ = run(asked, lm, limit=limit)
    return result, sum(lm.new_tokens) / sum(clocked.seconds), sum(lm.forwards) / len(lm.forwards)


def front(points: list[Point]) -> list[Point]:
    """The points that no other beats in score and speed, the fastest first."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (-p.speed, -p.score)):
        if not best or point.score > best[-1].score:
            best.append(point)
    return best


def study(folder: Path, name: str, limit: int | None, params: EvaluateParams) -> list[Point]:
    """Every setting on one benchmark; a first, unmeasured run warms up."""
    own = folder.parents[1]
    asked = benchmark(name, params, root=below(own, params.root), puzzles=own / "data" / "eval")
    length = int(str(asked.settings.sampling["max_new_tokens"]))
    points = []
    with answering(folder, params) as answerer:
        measured(asked, answerer, 8)
        for (rule, block, cache), values in settings(length).items():
            over = BenchmarkSettings(sampling=values).over(asked.settings)
            result, speed, forwards = measured(replace(asked, settings=over), answerer, limit)
            low, high = result["low"], result["high"]
            points.append(Point(rule, block, cache, result["score"], low, high, speed, forwards))
            print(points[-1], file=sys.stderr, flush=True)
    return points


def told(points: list[Point], best: list[Point]) -> str:
    """The front as a table, and the exact setting that it is compared with."""
    exact = points[0]
    rows = [
        [p.rule, str(p.block), p.cache, f"{100 * p.score:.1f} [{100 * p.low:.1f}, {100 * p.high:.1f}]",
         f"{p.forwards:.1f}", f"{p.speed:.0f}", f"{p.speed / exact.speed:.1f}"]
        for p in dict.fromkeys([exact, *best[::-1]])
    ]  # fmt: skip
    return table(["rule", "block", "cache", "% right", "forwards", "tokens/s", "times the first"], rows)


def picture(points: list[Point], best: list[Point], title: str, path: Path) -> None:
    """All settings as points, the front as a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 5.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot([p.speed for p in best], [100 * p.score for p in best], color="black", linewidth=1, zorder=1)
    for cache in CACHES:
        own = [p for p in points if p.cache == cache]
        label = f"cache: {cache}" + (" (approximate)" if cache != "none" else "")
        axes.scatter([p.speed for p in own], [100 * p.score for p in own], s=22, color=COLOURS[cache], label=label)
    for p in best:
        axes.annotate(f"{p.rule}, block {p.block}", (p.speed, 100 * p.score), fontsize=7, xytext=(6, 3),
                      textcoords="offset points")  # fmt: skip
    axes.set_xlim(right=3 * best[0].speed)
    axes.set_xscale("log")
    axes.set_xlabel("tokens a second, one thread")
    axes.set_ylabel("% right")
    axes.set_title(title)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main(folder: Path, name: str = "sudoku", limit: int = 200, path: Path | None = None) -> None:
    """Runs the study, prints the front and draws the picture."""
    torch.set_num_threads(1)
    quiet_lm_eval()
    params = EvaluateParams(batch_size=32, puzzles=PUZZLES)
    points = study(folder, name, limit, params)
    best = front(points)
    if path:
        picture(points, best, f"{name}, {limit} questions, {len(points)} settings", path)
    print(f"\n{name}, {limit} questions, {len(points)} settings\n\n{told(points, best)}")


if __name__ == "__main__":
    given = sys.argv[1:]
    main(
        Path(given[0]).resolve(),
        given[1] if len(given) > 1 else "sudoku",
        int(given[2]) if len(given) > 2 else 200,
        Path(given[3]) if len(given) > 3 else None,
    )
