"""How fast likelihoods are at equal error beside ML-GSAI's estimate: four-option questions, one thread.

Error: the root mean square, over questions and pairs of options, of what chance does to score differences, taken from
how independent estimates of the same score differ: no truth is needed, and none errs. The means of both estimators stand
beside each other, so that a bias would show. Flips: questions whose best option is not that of all samples together. The
oracle takes 128 samples, as LLaDA's evaluation does: eight independent lattices of 16, whose mean errs by 1/sqrt(8).

`python -m benchmarks.likelihood [quality | SAMPLES]`: error alone, or rates alone with so many samples of ours.
"""

import math
import random
import sys
from itertools import combinations

import torch
from torch import Tensor

from benchmarks import oracle
from benchmarks.peers import reference_of
from benchmarks.timing import interleaved, machine, table
from benchmarks.trained import SHAPE, SPECIAL, texts, trained_model
from llada_core.likelihood import Likelihood
from llada_core.modeling.predictor import MaskPredictor
from llada_core.settings import Estimator

QUESTIONS, TIMED_QUESTIONS = 200, 2  # 200 should take about half an hour, by what 40 took
SAMPLES, LATTICE, REPEATS = 128, 16, 4
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


def estimates(
    model: MaskPredictor, items: list[Question], estimator: Estimator, num_samples: int, count: int
) -> Tensor:
    """(count, questions, 4) float64: independent estimates of every option's score."""
    pairs = pairs_of(items)
    found = [
        Likelihood(model, samples=num_samples, seed=seed, estimator=estimator).scores(pairs) for seed in range(count)
    ]
    return torch.tensor(found, dtype=torch.float64).view(count, -1, 4)


def error(scores: Tensor) -> float:
    """The root mean square error of an estimate's score differences, from (count, questions, 4) of them."""
    first, second = zip(*combinations(range(4), 2), strict=True)
    return math.sqrt((scores[..., first] - scores[..., second]).var(0).mean())


def flips(scores: Tensor, truth: Tensor) -> float:
    """Share of questions in which another option is best than in `truth` (questions, 4)."""
    return (scores.argmax(-1) != truth.argmax(-1)).double().mean().item()


def main(parts: list[str] | None = None) -> None:
    """Prints error and flips by number of samples, then the rates at the number that is as good as the oracle's."""
    torch.set_num_threads(1)
    model = trained_model()
    given = [int(part) for part in parts or [] if part.isdecimal()]
    num_samples = given[0] if given else samples_as_good(model, questions(QUESTIONS, (20, 40)))
    if parts == ["quality"]:
        return
    print(f"\nlikelihood: {machine()}", flush=True)
    reference, timed = reference_of(model, SHAPE), questions(TIMED_QUESTIONS, (20, 40))
    report(model, reference, timed, f"answers of 20-40 tokens, ours with {num_samples} samples", num_samples)
    report(model, reference, questions(TIMED_QUESTIONS, 1), "answers of one token", SAMPLES)


def samples_as_good(model: MaskPredictor, items: list[Question]) -> int:
    """The fewest of ours whose error and flips are no more than those of the oracle's samples; prints both."""
    joined = SAMPLES // LATTICE
    lattices = estimates(model, items, "stock", LATTICE, joined)
    stock, target, rows = lattices.mean(0), error(lattices) / math.sqrt(joined), []
    for num_samples in (8, 12, 16, 24, 32, 48, 64, 96, SAMPLES):
        ours = estimates(model, items, "antithetic", num_samples, REPEATS)
        truth = (joined * LATTICE * stock + REPEATS * num_samples * ours.mean(0)) / (
            joined * LATTICE + REPEATS * num_samples
        )
        apart = stock - ours.mean(0)
        rows.append(["antithetic", str(num_samples), f"{error(ours):.3f}", f"{flips(ours, truth):.3f}",
                     f"{apart.mean():+.2f} ± {1.96 * apart.std() / math.sqrt(apart.numel()):.2f}"])  # fmt: skip
        print(rows[-1], file=sys.stderr, flush=True)
        if error(ours) <= target and flips(ours, truth) <= flips(stock, truth):
            break
    rows.insert(0, ["stock", str(SAMPLES), f"{target:.3f}", f"{flips(stock, truth):.3f}", ""])
    print(f"\n{len(items)} questions of four options\n")
    print(table(["estimator", "samples", "error of differences", "flips", "stock's mean above ours"], rows), flush=True)
    return num_samples


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
