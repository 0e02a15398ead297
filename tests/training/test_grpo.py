"""Policy optimisation from prompts to a better policy, on a reward that a tiny model can earn."""

import json

import pytest
import torch
from datasets import Dataset

from llada_core.config.sampling import SamplingParams
from llada_core.config.training import GRPOParams
from llada_core.training.metrics import read_metrics
from llada_core.training.stages import Place, train
from tests.tiny import tiny_pair

SAMPLING = SamplingParams(max_new_tokens=6, block_length=6, steps=3, temperature=1.0)


def likes_low_ids(task, text, answer):
    """More of the letters a to m, more reward."""
    return sum("a" <= c <= "m" for c in text.lower()) / 6


def write_prompts(folder):
    """data/grpo as `prepare` writes it."""
    for part, count in (("train", 24), ("validation", 6)):
        rows = {
            "prompt_ids": [[10 + i, 20, 30][: 2 + i % 2] for i in range(count)],
            "task": ["sudoku"] * count,
            "answer": [json.dumps({"puzzle": "1" * 16})] * count,
            "prompt": [""] * count,
        }
        Dataset.from_dict(rows).save_to_disk(folder / "grpo" / part)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return write_prompts(tmp_path_factory.mktemp("data"))


def run(data, folder, follow=None, **changes):
    values = {
        "max_steps": 8,
        "prompts": 4,
        "generations": 4,
        "sampling": SAMPLING,
        "learning_rate": 3e-3,
        "log_every": 1,
        "save_every": 4,
        "samples": 0,
        "beta": 0.0,
        "reward": "tests.training.test_grpo.likes_low_ids",
    }
    model, tokenizer = tiny_pair()
    receipt = train(GRPOParams(**{**values, **changes}), model, tokenizer, Place(data, folder), seed=1, follow=follow)
    return receipt, model


VARIANTS = {
    "d1": {"beta": 0.04, "iterations": 2},
    "elbo": {"likelihood": "elbo", "mask_samples": 2, "iterations": 2},
    "espo": {"likelihood": "elbo", "ratio": "sequence", "mask_samples": 2, "iterations": 2, "beta": 0.01},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_reward_rises(data, tmp_path, variant):
    receipt, _ = run(data, tmp_path, max_steps=60, **VARIANTS[variant])
    rewards = [line["reward"] for line in read_metrics(tmp_path / "metrics.jsonl") if "reward" in line]
    print(rewards)
    assert sum(rewards[-5:]) > 1.3 * sum(rewards[:5])
    assert receipt.flops > 6 * receipt.parameters * receipt.tokens


@pytest.mark.parametrize("stop", [3, 4])
def test_a_stop_in_the_middle_of_a_rollout_changes_nothing(data, tmp_path, stop):
    def ask(line):
        if line["step"] == stop:
            (tmp_path / "cut" / "STOP").touch()

    changes = {"iterations": 3, "beta": 0.04, "sync_every": 2}
    _, whole = run(data, tmp_path / "whole", **changes)
    receipt, _ = run(data, tmp_path / "cut", follow=ask, **changes)
    assert receipt.steps == stop
    receipt, cut = run(data, tmp_path / "cut", **changes)
    assert receipt.finished
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), cut.parameters(), strict=True))


def test_it_ends_once_validation_has_stopped_rising(data, tmp_path):
    receipt, _ = run(data, tmp_path, max_steps=60, learning_rate=1e-9, validate_every=2, validation_rows=4, patience=2)
    assert receipt.finished
    assert receipt.steps == 6  # the first validation is the best so far, two more are not better
