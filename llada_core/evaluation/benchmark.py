"""One benchmark with one model: from a name to a score with its interval, its settings and every answer."""

import json
import logging
import math
import random
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate

from llada_core.data.contamination import trained_on
from llada_core.evaluation import recipes, taskset
from llada_core.evaluation.answering import Responder
from llada_core.evaluation.harness import Cost, EstimatingLM, LladaLM
from llada_core.evaluation.params import BenchmarkSettings, EvaluateParams
from llada_core.evaluation.recipes import Recipe
from llada_core.evaluation.statistics import estimate, mean_of_means
from llada_core.settings import ConfigError, nearest

log = logging.getLogger(__name__)
OPTIONAL = "_published"  # puzzle files that `prepare` writes only where a data root holds the published set
SHOWN = 4000  # characters of a prompt kept with its answer: the end of it
Result = dict[str, Any]


@dataclass(frozen=True)
class Benchmark:
    """What is asked, and how answers are scored; `absent` says why there is nothing to ask.

    wordings: name -> a question's row to its text, where the benchmark has wordings of its own.
    """

    name: str  # as it was asked for
    recipe: Recipe
    tasks: taskset.Tasks
    settings: BenchmarkSettings  # the recipe's, with the caller's over them
    subset: str = ""
    absent: str = ""
    wordings: Mapping[str, Callable[[Mapping[str, Any]], str]] = field(default_factory=dict)

    @property
    def as_pinned(self) -> bool:
        """Whether the recipe's own settings are in force, so that its figures compare."""
        kind = self.recipe.kind
        return self.settings.that_matter(kind) == self.recipe.settings.that_matter(kind)

    @property
    def shown_settings(self) -> Result:
        """The settings that this kind of benchmark uses."""
        estimator = {} if self.recipe.kind == "generate" else {"estimator": self.settings.estimator or "auto"}
        return {**self.settings.that_matter(self.recipe.kind), **estimator}


def benchmark(name: str, params: EvaluateParams, *, root: Path | None, puzzles: Path) -> Benchmark:
    """The benchmark called `name`: a file of one's own, one of the folder `puzzles`, the published sudokus, or a recipe.

    Raises `ConfigError` for an unknown name, unreadable files, or programs to run without the opt-in.
    """
    own = params.overrides.get(name, BenchmarkSettings())
    mine = None if own.questions is None else Path(own.questions)
    rows = puzzles / f"{name}.jsonl" if mine is None else mine
    if rows.suffix == ".jsonl" and (rows.exists() or name.endswith(OPTIONAL)):
        return _puzzle_benchmark(name, own.over(params.puzzles), rows)
    if mine is None and not recipes.exists(name):
        known = [path.stem for path in puzzles.glob("*.jsonl")] + list(recipes.names())
        raise ConfigError(f"there is no benchmark {name!r}{nearest(name, known)}")
    recipe = recipes.find(name) if mine is None else recipes.read(mine)
    if recipe.runs_code and not params.run_code:
        raise ConfigError(f"{name} runs programs that the model writes (in a sandbox); allow it with run_code")
    local = recipe.local if taskset.local_files(recipe, root) else None
    tasks = taskset.tasks_of(recipe, root)
    return Benchmark(name, recipe, tasks, own.over(recipe.settings), local.subset if local else "")


def _puzzle_benchmark(name: str, settings: BenchmarkSettings, path: Path) -> Benchmark:
    pinned = {"definition": "puzzles", "version": 1.0, "kind": "generate", "metric": "correct,none", "shots": 0}
    recipe = Recipe.parse(
        {"name": name, "task": name, "chat": True, "chance": 0.0, "settings": settings, **pinned}, name
    )
    if not path.exists():
        absent = f"{path.name} was not made: no data root holds the published set"
        return Benchmark(name, recipe, {}, settings, absent=absent)
    rows = taskset.read_puzzles(path)
    return Benchmark(name, recipe, taskset.puzzles(name, rows), settings, wordings=taskset.puzzle_wordings(rows))


def chosen(asked: Benchmark, limit: int | None = None) -> dict[str, list[int]] | None:
    """The numbers of each task's questions that are asked where the settings ask for a share of them; None: all.

    Drawn with a fixed seed, so that two models answer the same ones; at least one of each task, at most `limit`.
    """
    share = asked.settings.share
    if share is None:
        return None
    sizes = {name: len(task.eval_docs) for name, task in asked.tasks["tasks"].items()}
    drawn = {name: random.Random(name).sample(range(n), max(1, round(share * n))) for name, n in sizes.items()}
    return {name: sorted(numbers[:limit]) for name, numbers in drawn.items()}


def requests_of(asked: Benchmark, lm: LladaLM, *, limit: int | None = None) -> dict[str, list[Instance]]:
    """What lm-eval would ask, by kind of request, rendered for this model's tokenizer."""
    found: dict[str, list[Instance]] = {}
    numbers = chosen(asked, limit)
    for name, task in asked.tasks["tasks"].items():
        with taskset.compiled_once():
            task.build_all_requests(
                limit=limit if numbers is None else None,
                samples=None if numbers is None else numbers[name],
                apply_chat_template=asked.recipe.chat,
                fewshot_as_multiturn=asked.recipe.turns,
                chat_template=lm.apply_chat_template if asked.recipe.chat else None,
                tokenizer_name=lm.tokenizer_name,
            )
        for instance in task.instances:
            found.setdefault(instance.request_type, []).extend([instance] * instance.repeats)
    return found


def answer(asked: Benchmark, lm: LladaLM, *, limit: int | None = None) -> None:
    """Has `lm` do its share of a benchmark's requests, those that `run` makes in the same order; scores nothing."""
    for kind, instances in requests_of(asked, lm, limit=limit).items() if not asked.absent else ():
        getattr(lm, kind)(instances)


def cost_of(asked: Benchmark, answerer: Responder, *, limit: int | None = None, rate: float | None = None) -> Cost:
    """What a benchmark costs at most, at `rate` tokens a second, or that of one measured forward; nothing is answered.

    With a rate the answerer's model may be one of shapes alone.
    """
    lm = EstimatingLM(answerer, rate)
    answer(asked, lm, limit=limit)
    return lm.cost


def run(
    asked: Benchmark, lm: LM, *, limit: int | None = None, trained: Collection[int] = ()
) -> tuple[Result, list[Result]]:
    """The result of a benchmark (JSON values, equal for equal inputs) and one record per question.

    trained: values of the questions that the run trained on (llada_core.data.contamination); a question among them is marked.
    """
    recipe = asked.recipe
    if asked.absent:
        return {"absent": asked.absent, "recipe": recipe.name}, []
    numbers = chosen(asked, limit)
    with taskset.compiled_once():
        outcome = evaluate(
            lm,
            asked.tasks,
            limit=limit if numbers is None else None,
            samples=numbers,
            bootstrap_iters=0,
            log_samples=True,
            apply_chat_template=recipe.chat,
            fewshot_as_multiturn=recipe.turns,
            confirm_run_unsafe_code=recipe.runs_code,
        )
    metric, _, read_by = recipe.metric.partition(",")
    told = [
        (task, s) for task, samples in sorted(outcome["samples"].items()) for s in samples if s["filter"] == read_by
    ]
    told.sort(key=lambda pair: (pair[0], pair[1]["doc_id"]))
    records, rows = [_record(task, s, metric) for task, s in told], [s for _, s in told]
    if recipe.definition == "puzzles":
        for record, row in zip(records, rows, strict=True):
            document = row["doc"]
            known = document["in_training"] or (bool(trained) and trained_on(_judged(document), trained))
            record |= {"id": document["id"], "in_training": known}
    elif trained:
        for record, (task, row) in zip(records, told, strict=True):
            value = taskset.question_value(asked.tasks["tasks"][task], row["doc"])
            record["in_training"] = value in trained
    in_all = sum(n["original"] for n in outcome["n-samples"].values())
    part = f"{len(rows)} of {in_all} questions" if len(rows) < in_all else ""
    subset = "; ".join(filter(None, [asked.subset, part]))
    return {
        "recipe": recipe.name,
        "variant": recipe.variant,
        "task": recipe.task,
        "metric": recipe.metric,
        **_scores(recipe, outcome, records),
        **_overlap(records),
        "chance": _chance(recipe, rows),
        "subset": subset,
        "shots": recipe.shots,
        "chat": recipe.chat,
        "settings": asked.shown_settings,
        **_noise(recipe, lm),
        "drift": taskset.drift(recipe, asked.tasks),
        "as_pinned": asked.as_pinned,
        "versions": {name: version(name).partition("+")[0] for name in ("lm-eval", "torch", "transformers")},
    }, records


def _judged(document: Mapping[str, Any]) -> Result:
    """A puzzle as a row has it, with what is compared as an object."""
    return {**document, "answer": json.loads(document["answer"])}


def _scores(recipe: Recipe, outcome: Mapping[str, Any], records: list[Result]) -> Result:
    aggregated = {**outcome["results"], **outcome.get("groups", {})}[recipe.task]
    score = float(aggregated[recipe.metric])
    also = {key: float(aggregated[key]) for key in recipe.also if key in aggregated}
    values = [record["score"] for record in records]
    result: Result = {"score": score, "n": len(values), "also": also, "stderr": None, "low": None, "high": None}
    if not all(isinstance(v, float) and math.isfinite(v) for v in values) or not math.isfinite(score):
        return result if math.isfinite(score) else {**result, "score": None}
    if recipe.kind == "rolling":
        return result
    if recipe.average == "tasks":
        by_task: dict[str, list[float]] = {}
        for record in records:
            by_task.setdefault(record["task"], []).append(record["score"])
        return {**result, **mean_of_means(list(by_task.values()))}
    measured = estimate(values)
    if not math.isclose(measured.value, score, abs_tol=1e-6):
        log.warning("%s: lm-eval aggregates to %.4f, the mean of questions is %.4f", recipe.name, score, measured.value)
        return result
    return {**result, "score": measured.value, "stderr": measured.stderr, "low": measured.low, "high": measured.high}


def _noise(recipe: Recipe, lm: LM) -> Result:
    """How far one estimate of a log-likelihood lies from its mean, in nats, where that was looked at."""
    error = lm.estimator_error() if recipe.kind == "likelihood" and isinstance(lm, LladaLM) else None
    return {} if error is None else {"estimator_error": round(error, 4)}


def _overlap(records: list[Result]) -> Result:
    """How many questions occur in training by value, and the score without them."""
    unseen = [record["score"] for record in records if not record.get("in_training")]
    if len(unseen) == len(records):
        return {}
    return {"in_training": len(records) - len(unseen), "score_unseen": sum(unseen) / len(unseen) if unseen else None}


def _record(task: str, sample: Mapping[str, Any], metric: str) -> Result:
    replies = [response[0] for response in sample["resps"]]
    generated = isinstance(replies[0], str)
    return {
        "task": task,
        "id": f"{task}/{sample['doc_id']}",
        "prompt": str(sample["arguments"][0][0])[-SHOWN:],
        "reply": replies[0] if generated else [_number(reply) for reply in replies],
        "read_as": sample["filtered_resps"][0] if generated else None,
        "target": str(sample["target"])[-SHOWN:],
        "score": _question_score(sample[metric]),
    }


def _number(reply: Any) -> float:
    return round(float(reply[0] if isinstance(reply, tuple | list) else reply), 6)


def _question_score(value: Any) -> float:
    """One question's score; of a text's (log-likelihood, length), the bits per unit of length."""
    if isinstance(value, tuple | list):
        return -float(value[0]) / float(value[1]) / math.log(2)
    return float(value)


def _chance(recipe: Recipe, rows: list[Mapping[str, Any]]) -> float | None:
    """What guessing scores: the recipe's figure, or the mean of one over the number of choices."""
    if recipe.chance is not None or recipe.kind != "likelihood":
        return recipe.chance
    return sum(1 / len(row["arguments"]) for row in rows) / len(rows)
