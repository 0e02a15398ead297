"""Proof of scoring without a model: `python -m tests.evaluation.gold [--limit N] [--shift N] [RECIPE ...]`.

Feeds reference answers through the whole harness on real files (LLADAFLOW_DATA_ROOT or ../shared/data) and prints a
line per recipe; without a limit that is every question. Seconds are of the processor, programs in the sandbox included.
"""

import argparse
import os
from pathlib import Path

from llada_core.evaluation import recipes, taskset
from llada_core.evaluation.benchmark import Benchmark, run
from llada_core.settings import ConfigError
from tests.evaluation.scripted import GoldLM
from tests.tiny import tiny_tokenizer

# LLaDA 1.5's recipes ask Instruct's questions; a likelihood of text has no right answer.
PROVABLE = [n for n in recipes.names() if not n.startswith(("llada15", "llada2")) and recipes.find(n).kind != "rolling"]
PROVABLE += [f"{n}.opencompass" for n in PROVABLE if "opencompass" in recipes.find(n).variants]


def prove(name, root, *, limit=None, shift=0, batch_size=32, steps=1):
    """The result and records of a recipe whose every answer is the reference."""
    recipe = recipes.find(name)
    tasks = taskset.tasks_of(recipe, root)
    lm = GoldLM(tiny_tokenizer(), recipe, tasks, batch_size=batch_size, shift=shift, steps=steps)
    return run(
        Benchmark(name, recipe, tasks, recipe.settings, recipe.local.subset if recipe.local else ""), lm, limit=limit
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("recipes", nargs="*", default=PROVABLE)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--shift", type=int, default=0)
    given = parser.parse_args()
    here = Path(__file__).resolve().parents[2]
    root = Path(os.environ.get("LLADAFLOW_DATA_ROOT") or here.parent / "shared" / "data")
    for name in given.recipes:
        start = sum(os.times()[:4])
        try:
            result, _ = prove(name, root, limit=given.limit, shift=given.shift)
            told = f"{result['score']:.4f} on {result['n']} questions; {result['also']}"
        except ConfigError as error:
            told = str(error)
        print(f"{name:24} {sum(os.times()[:4]) - start:7.1f} s  {told}", flush=True)


if __name__ == "__main__":
    main()
