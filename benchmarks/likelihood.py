"""How fast likelihoods are at equal error beside ML-GSAI's estimate: four-option questions, one thread.

Error: the root mean square, over questions and pairs of options, of score differences against a truth from many looks;
flips: questions whose best option differs from the truth's. The oracle takes 128 samples, as LLaDA's evaluation does.
"""

import math
import random
import time
from dataclasses import dataclass
from itertools import combinations

import torch

from benchmarks import oracle
from benchmarks.sampling import reference_of
from benchmarks.timing import interleaved, table
from benchmarks.trained import SPECIAL, texts, trained_model
from llada_core.likelihood import Likelihood

QUESTIONS, TRUTH_QUESTIONS, TRUTH_LOOKS, SAMPLES = 200, 24, 1024, 128
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


def main() -> None:
    """Prints the tables."""
    torch.set_num_threads(1)
    model = trained_model()
    model.fuse_for_inference()
    reference, items = reference_of(model), questions(QUESTIONS, (20, 40))
    few = pairs_of(items[:TRUTH_QUESTIONS])
    began = time.process_time()
    truth = Likelihood(model, samples=TRUTH_LOOKS, seed=999).scores(few)
    print(f"\nlikelihood: truth of {len(few)} options from {TRUTH_LOOKS} looks in {time.process_time() - began:.0f} s")
    stock = [
        quality(Likelihood(model, samples=SAMPLES, seed=s, estimator="stock").scores(few), truth) for s in range(2)
    ]
    target = math.sqrt(sum(q.error**2 for q in stock) / len(stock))
    rows, chosen = (
        [["stock", str(SAMPLES), f"{target:.3f}", f"{sum(q.flips for q in stock) / len(stock):.3f}"]],
        SAMPLES,
    )
    for samples in (16, 24, 32, 48, 64, 96, 128):
        found = [quality(Likelihood(model, samples=samples, seed=s).scores(few), truth) for s in range(4)]
        error = math.sqrt(sum(q.error**2 for q in found) / len(found))
        rows.append(["ours", str(samples), f"{error:.3f}", f"{sum(q.flips for q in found) / len(found):.3f}"])
        if error <= target:
            chosen = samples
            break
    print(table(["estimator", "looks", "error of differences", "flips"], rows), flush=True)
    timed = items[:8]
    report(model, reference, timed, f"answers of 20-40 tokens, ours with {chosen} looks", chosen)
    report(model, reference, questions(8, 1), "answers of one token", SAMPLES)


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
    main()
