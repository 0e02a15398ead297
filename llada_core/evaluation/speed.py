"""What faster sampler settings cost: accuracy and tokens a forward under several wordings, paired against exact.

Rankings of decoders flip with the prompt (arXiv:2606.29228), so the worst wording stands beside the mean.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from lm_eval.api.instance import Instance

from llada_core.evaluation.answering import AnswerStore, Responder
from llada_core.evaluation.benchmark import Benchmark, run
from llada_core.evaluation.harness import LladaLM
from llada_core.evaluation.params import BenchmarkSettings
from llada_core.evaluation.requests import DEFAULT_LENGTH, ChatText
from llada_core.evaluation.statistics import Difference, paired
from llada_core.files import hash_of
from llada_core.sampling.params import EDITING

EXACT = "exact"
SEQUENTIAL: dict[str, Any] = {
    "threshold": None,
    "factor": None,
    "entropy_bound": None,
    "rule": None,
    "cache": "none",
    "sampler": None,
}
SEQUENTIAL |= dict.fromkeys((*EDITING, "finish_block"))  # what is None counts as left out
USUAL = ("threshold=0.99", "threshold=0.9", "factor=0.5", "cache=prefix", "cache=dual", "cache=dual,threshold=0.9")
HALF = 0.5  # a wording counts where exact solves so much
ALPHA, FLOOR = 3.0, 0.05  # of accuracy under parallelism: how fast a lost point loses weight, and what is left out
Sampling = dict[str, Any]
Wording = Callable[[Mapping[str, Any], str], str]  # a question's row and its text, to the text that is asked


def wordings(asked: Benchmark) -> dict[str, Wording]:
    """Name -> wording: the benchmark's own, which its rows are asked in; else texts around its questions."""
    if asked.wordings:
        return {name: partial(_own, text_of) for name, text_of in asked.wordings.items()}
    around: dict[str, str] = yaml.safe_load(Path(__file__).with_name("speed_prompts.yaml").read_text(encoding="utf-8"))
    return {name: partial(_around, text) for name, text in around.items()}


def _own(text_of: Callable[[Mapping[str, Any]], str], row: Mapping[str, Any], question: str) -> str:
    return text_of(row)


def _around(text: str, row: Mapping[str, Any], question: str) -> str:
    return text.replace("{question}", question)


def settings_of(asked: Benchmark, texts: Sequence[str], *, by_blocks: bool = False) -> dict[str, Sampling]:
    """Name -> sampler settings: exact (a token a forward), then each text such as `threshold=0.9,cache=dual`.

    `usual` stands for a common set, without the dual cache for a model that attends `by_blocks` and has none; every one
    goes over exact's. Raises `ConfigError` for an unknown setting.
    """
    sampling = asked.settings.sampling
    exact = {**SEQUENTIAL, "steps": sampling.get("max_new_tokens", DEFAULT_LENGTH)}
    found = {EXACT: exact}
    usual = tuple(each for each in USUAL if not (by_blocks and "dual" in each))
    named = [each for given in texts for each in (usual if given == "usual" else (given,))]
    for text in dict.fromkeys(named):
        pairs = (part.partition("=") for part in text.split(","))
        given = {key.strip(): yaml.safe_load(value) for key, _, value in pairs}
        found[text] = BenchmarkSettings.parse({"sampling": {**exact, **given}}, f"--speed {text}").sampling
    return found


class RewordedLM(LladaLM):
    """Asks every question in another wording: that of the last message of a dialogue, or of the whole text."""

    def __init__(self, answerer: Responder, wording: Wording, store: AnswerStore | None = None) -> None:
        super().__init__(answerer, store)
        self.wording = wording

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        for request in requests:
            prompt, *rest = request.args
            request.arguments = (self._reworded(prompt, request.doc), *rest)
        return super().generate_until(requests)

    def _reworded(self, prompt: str, row: Mapping[str, Any]) -> str:
        if not isinstance(prompt, ChatText):
            return self.wording(row, prompt)
        *before, last = prompt.messages
        said = {**last, "content": self.wording(row, last["content"])}
        return self.apply_chat_template([*before, said]) + prompt.begun


@dataclass(frozen=True)
class Point:
    """One setting under one wording: scores by question, tokens and forwards of an answer, tokens a second."""

    scores: tuple[float, ...]
    tokens: float
    forwards: float
    tokens_per_second: float

    @property
    def accuracy(self) -> float:
        """The mean score."""
        return sum(self.scores) / len(self.scores)

    @property
    def parallelism(self) -> float:
        """Tokens a forward."""
        return self.tokens / self.forwards


def measured(
    asked: Benchmark,
    answerer: Responder,
    sampling: Sampling,
    wording: Wording,
    limit: int | None = None,
    *,
    kept: Path | None = None,
) -> Point:
    """One setting under one wording, a question at a time as the published speeds; what a folder `kept` holds of it is not
    asked again, and took the time that it took.
    """
    settings = BenchmarkSettings(sampling=sampling).over(asked.settings)
    options = replace(answerer.options, settings=settings, batch_size=1)
    lm = RewordedLM(replace(answerer, options=options), wording, AnswerStore(kept))
    _, records = run(replace(asked, settings=settings), lm, limit=limit)
    scores = tuple(float(record["score"]) for record in records)
    tokens, forwards = sum(lm.new_tokens), sum(lm.forwards)
    return Point(scores, tokens / len(scores), forwards / len(scores), tokens / max(lm.store.seconds, 1e-9))


def study(
    asked: Benchmark, answerer: Responder, texts: Sequence[str], limit: int | None = None, *, kept: Path | None = None
) -> dict[str, dict[str, Point]]:
    """Setting -> wording -> point; a wording in which exact solves less than half is asked of exact alone.

    kept: a folder of this model and benchmark, where finished answers are found again after an interruption.
    """
    chosen = settings_of(asked, texts, by_blocks=answerer.model.block_length is not None)
    found: dict[str, dict[str, Point]] = {name: {} for name in chosen}
    for name, wording in wordings(asked).items():
        for setting, sampling in chosen.items():
            own = None if kept is None else kept / hash_of([sampling, name])[:16]
            found[setting][name] = measured(asked, answerer, sampling, wording, limit, kept=own)
            if found[EXACT][name].accuracy < HALF:
                break
    return found


def accuracy_under_parallelism(points: Sequence[tuple[float, float]], best: float | None = None) -> float:
    """d3LLM's measure of (tokens a forward, accuracy of 0 to 1) pairs, in percent points times tokens a forward.

    The area under accuracy over parallelism, each accuracy weighted by exp(-3 (1 - accuracy / best)); what lies more
    than five points below the slowest is left out. best: the highest accuracy there is; None: of these points.
    """
    ordered = sorted(points)
    kept = [(rho, 100 * y) for rho, y in ordered if y >= ordered[0][1] - FLOOR]
    top = 100 * best if best is not None else max(y for _, y in kept)
    weighted = [(rho, y * min(1.0, math.exp(-ALPHA * (1 - y / top)))) if top else (rho, 0.0) for rho, y in kept]
    area = kept[0][0] * kept[0][1]
    for (before, lower), (rho, upper) in pairwise(weighted):
        area += (rho - before) * (lower + upper) / 2
    return area


def table(points: Mapping[str, Mapping[str, Point]]) -> list[dict[str, Any]]:
    """A row for each setting (setting -> wording -> point; `EXACT` is one): over the wordings in which exact solves half.

    `mean` and `worst` accuracy with the wording that is worst, `difference` from exact paired over all their questions,
    and whether no other setting is more accurate without fewer tokens a forward, or has more without being less
    accurate (`pareto`).
    """
    counted = [wording for wording, point in points[EXACT].items() if point.accuracy >= HALF]
    rows = [_row(name, by_wording, points[EXACT], counted) for name, by_wording in points.items()] if counted else []
    for row in rows:
        own = (row["tokens_per_forward"], row["mean"])
        others = [(o["tokens_per_forward"], o["mean"]) for o in rows]
        row["pareto"] = not any(o != own and o[0] >= own[0] and o[1] >= own[1] for o in others)
    return rows


def _row(name: str, own: Mapping[str, Point], exact: Mapping[str, Point], counted: Sequence[str]) -> dict[str, Any]:
    points = {wording: own[wording] for wording in counted}
    worst = min(points, key=lambda wording: points[wording].accuracy)
    scores = [score for point in points.values() for score in point.scores]
    reference = [score for wording in counted for score in exact[wording].scores]
    difference: Difference = paired(scores, reference)
    n = len(points)
    return {
        "setting": name,
        "wordings": list(counted),
        "mean": sum(p.accuracy for p in points.values()) / n,
        "worst": points[worst].accuracy,
        "worst_wording": worst,
        "tokens_per_forward": sum(p.tokens for p in points.values()) / sum(p.forwards for p in points.values()),
        "forwards": sum(p.forwards for p in points.values()) / n,
        "tokens_per_second": sum(p.tokens_per_second for p in points.values()) / n,
        "difference": difference.value,
        "low": difference.low,
        "high": difference.high,
    }


def picture(name: str, points: Mapping[str, Mapping[str, Point]], path: Path) -> None:
    """Accuracy over tokens a forward: every setting, its worst wording below it, those that no other beats in a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes, rows = figure.add_subplot(), table(points)
    best = sorted((row["tokens_per_forward"], 100 * row["mean"]) for row in rows if row["pareto"])
    axes.plot([x for x, _ in best], [y for _, y in best], color="black", linewidth=1, label="no other is better")
    for row in rows:
        x, mean, worst = row["tokens_per_forward"], 100 * row["mean"], 100 * row["worst"]
        axes.plot([x, x], [worst, mean], color="#1b6ca8", marker="o", markersize=4, linewidth=1)
        axes.annotate(row["setting"], (x, mean), fontsize=7, xytext=(5, 3), textcoords="offset points")
    axes.set_xlabel("tokens a forward")
    axes.set_ylabel("% right: mean over wordings, worst below")
    axes.set_title(name)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def as_values(
    name: str, points: Mapping[str, Mapping[str, Point]], settings: Mapping[str, Sampling] | None = None
) -> dict[str, Any]:
    """All that was measured, as JSON holds it: each wording with exact's share of right answers and whether it counts, the
    rows of `table` with their sampler settings where those are given, AUP, and every point with its scores."""
    rows = table(points)
    return {
        "benchmark": name,
        "wordings": {w: {"exact": p.accuracy, "counts": p.accuracy >= HALF} for w, p in points[EXACT].items()},
        "rows": [{**row, "sampling": (settings or {}).get(row["setting"])} for row in rows],
        "aup": _areas(rows),
        "points": {setting: {w: asdict(p) for w, p in own.items()} for setting, own in points.items()},
    }


def _areas(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Accuracy under parallelism of the means, and of the worst wording of each setting; nothing of no rows."""
    kinds = ("mean", "worst") if rows else ()
    return {key: accuracy_under_parallelism([(r["tokens_per_forward"], r[key]) for r in rows]) for key in kinds}


def told(name: str, points: Mapping[str, Mapping[str, Point]]) -> str:
    """The rows as Markdown, with accuracy under parallelism of the means, and of the worst wording of each setting."""
    counted = [w for w, point in points[EXACT].items() if point.accuracy >= HALF]
    left = [f"{w} {100 * p.accuracy:.0f} %" for w, p in points[EXACT].items() if w not in counted]
    lines = [f"{name}: wordings in which exact solves half: {', '.join(counted) or 'none'}"]
    lines += [f"not counted, by exact: {', '.join(left)}"] if left else []
    rows = table(points)
    if not rows:
        return "\n".join(lines)
    head = "| setting | mean % | worst % (wording) | against exact | tokens/forward | forwards | tokens/s |"
    lines += ["", head, "|---|---|---|---|---|---|---|"]
    for r in rows:
        against = f"{100 * r['difference']:+.1f} [{100 * r['low']:+.1f}, {100 * r['high']:+.1f}]"
        cells = [f"{r['setting']}{' *' if r['pareto'] else ''}", f"{100 * r['mean']:.1f}"]
        cells += [f"{100 * r['worst']:.1f} ({r['worst_wording']})", against, f"{r['tokens_per_forward']:.2f}"]
        lines.append("| " + " | ".join([*cells, f"{r['forwards']:.1f}", f"{r['tokens_per_second']:.0f}"]) + " |")
    areas = _areas(rows)
    lines += [
        "",
        f"* no other is better in accuracy or tokens a forward and as good in the other. AUP {areas['mean']:.1f} of the means, {areas['worst']:.1f} of the worst.",
    ]
    return "\n".join(lines)
