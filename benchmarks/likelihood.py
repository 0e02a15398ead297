"""How fast likelihoods are at equal error beside ML-GSAI's estimate: four-option questions, one thread.

Error: the root mean square, over questions and pairs of options, of score differences against a truth from many looks;
flips: questions whose best option differs from the truth's. The oracle takes 128 samples, as LLaDA's evaluation does.

`python -m benchmarks.likelihood [quality | LOOKS]`: error alone, or rates alone with so many looks of ours.
"""

import math
import random
import sys
from dataclasses import dataclass
from itertools import combinations

import torch

from benchmarks import oracle
from benchmarks.sampling import reference_of
from benchmarks.timing import interleaved, machine, table
from benchmarks.trained import SPECIAL, texts, trained_model
from llada_core.estimators import Estimator
from llada_core.likelihood import Likelihood
from llada_core.modeling.predictor import MaskPredictor

QUESTIONS, TRUTH_QUESTIONS, TIMED_QUESTIONS = 200, 12, 2
TRUTH_LOOKS, SAMPLES, SEEDS = 1024, 128, 3
Question = tuple[list[int], list[list[int]]]


def questions(count: int, answer: tuple[int, int] | int, seed: int = 5) -> list[Question]:
    """Prompts of 20 to 40 tokens; the options are the true continuation and three with words of others in it."""
    rng, rows = random.Random(seed), texts(count, seed=seed, length=90).tolist()
    result = []
    for row in rows:
        cut = rng.randrange(20, 41)
        length = answer if isinstance(answer, int) else rng.randrange(answer[0], answer[1] + 1)
        true = row[cut : cut + length]
        options = [true]
        for _ in range(3):
            other = list(true)
            for place in rng.sample(range(length), max(1, length // 6)):
                other[place] = rng.choice(rng.choice(rows))
            options.append(other)
        result.append((row[:cut], options))
    return result


def pairs_of(items: list[Question]) -> list[tuple[list[int], list[int]]]:
    """All (prompt, option)."""
    return [(prompt, option) for prompt, options in items for option in options]


@dataclass(frozen=True)
class Quality:
    """Error of score differences and share of questions with another best option, against a truth."""

    error: float
    flips: float


def quality(scores: list[float], truth: list[float]) -> Quality:
    """Of four scores per question."""
    errors, flips = [], 0
    for at in range(0, len(truth), 4):
        own, true = scores[at : at + 4], truth[at : at + 4]
        errors += [(own[i] - own[j] - true[i] + true[j]) ** 2 for i, j in combinations(range(4), 2)]
        flips += own.index(max(own)) != true.index(max(true))
    return Quality(math.sqrt(sum(errors) / len(errors)), flips / (len(truth) / 4))


def main(parts: list[str] | None = None) -> None:
    """Prints error and flips by number of looks, then the rates at the number that is as good as the oracle's."""
    torch.set_num_threads(1)
    model = trained_model()
    model.fuse_for_inference()
    given = [int(part) for part in parts or [] if part.isdecimal()]
    looks = given[0] if given else looks_as_good(model)
    if parts == ["quality"]:
        return
    print(f"\nlikelihood: {machine()}", flush=True)
    reference, timed = reference_of(model), questions(TIMED_QUESTIONS, (20, 40))
    report(model, reference, timed, f"answers of 20-40 tokens, ours with {looks} looks", looks)
    report(model, reference, questions(TIMED_QUESTIONS, 1), "answers of one token", SAMPLES)


def looks_as_good(model: MaskPredictor) -> int:
    """The fewest of ours whose error and flips are no more than those of the oracle's samples; prints both."""
    few = pairs_of(questions(QUESTIONS, (20, 40))[:TRUTH_QUESTIONS])
    truth = Likelihood(model, samples=TRUTH_LOOKS, seed=999).scores(few)

    def measured(estimator: Estimator, samples: int) -> Quality:
        found = [
            quality(Likelihood(model, samples=samples, seed=seed, estimator=estimator).scores(few), truth)
            for seed in range(SEEDS)
        ]
        error = math.sqrt(sum(q.error**2 for q in found) / SEEDS)
        rows.append([estimator, str(samples), f"{error:.3f}", f"{sum(q.flips for q in found) / SEEDS:.3f}"])
        print(rows[-1], file=sys.stderr, flush=True)
        return Quality(error, sum(q.flips for q in found) / SEEDS)

    rows: list[list[str]] = []
    target, chosen = measured("stock", SAMPLES), SAMPLES
    for samples in (16, 24, 32, 48, 64, 96):
        found = measured("antithetic", samples)
        if found.error <= target.error and found.flips <= target.flips:
            chosen = samples
            break
    print(f"\ntruth: {len(few)} options, {TRUTH_LOOKS} looks each of ours\n")
    print(table(["estimator", "looks", "error of differences", "flips"], rows), flush=True)
    return chosen


def report(model, reference: oracle.Reference, items: list[Question], what: str, samples: int) -> None:  # noqa: ANN001
    """Times the oracle's 128 samples against ours on the same questions."""
    tensors = [(torch.tensor(p), torch.tensor(a)) for p, a in pairs_of(items)]

    def by_oracle() -> None:
        for prompt, answer in tensors:
            oracle.log_likelihood(reference, prompt, answer, samples=SAMPLES, batch=16, mask_id=SPECIAL.mask_id)

    timings = interleaved(
        {"oracle": by_oracle, "ours": lambda: Likelihood(model, samples=samples).scores(tensors)}, "oracle", 3
    )
    ours = timings["ours"]
    print(f"{what}: {ours.ratio:.1f} times the oracle's rate ({ours.spread}), {len(items)} questions", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
