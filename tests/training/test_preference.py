"""Preference tuning: the bounds are unbiased, sharing masks lowers their variance, and preferences are learned."""

import copy
from pathlib import Path

import torch
from datasets import Dataset

from llada_core.likelihood import log_likelihood
from llada_core.training.params import PreferenceParams
from llada_core.training.preference import Preference, pairs_of
from llada_core.training.progress import read_metrics
from llada_core.training.train import RunPaths, train
from tests.tiny import tiny_model, tiny_pair

ROWS = {"prompt_ids": [[10, 11, 12], [20, 21]], "chosen_ids": [[30, 31, 32, 33], [40, 41, 42, 43]],
        "rejected_ids": [[50, 51, 52, 53], [60, 61, 62]]}  # fmt: skip


def write_pairs(folder: Path) -> Path:
    """Chosen answers go up, rejected ones go down."""
    for part, count in (("train", 32), ("validation", 8)):
        starts = range(10, 10 + count)
        rows = {"prompt_ids": [[s] for s in starts], "chosen_ids": [[s + 1, s + 2, s + 3] for s in starts],
                "rejected_ids": [[s - 1, s - 2][: 1 + s % 2] for s in starts]}  # fmt: skip
        Dataset.from_dict(rows).save_to_disk(folder / "preference" / part)
    return folder


def objective(model, **changes):
    params = PreferenceParams(**{"max_steps": 1, "batch_size": 2, "mask_samples": 4, "beta": 1.0, **changes})
    table = Dataset.from_dict(ROWS)
    return Preference(model, table, table, params, seed=0)


def batch(step, copies=1):
    return pairs_of(Dataset.from_dict(ROWS), [0, 1] * copies, list(range(2 * copies)), 120, step)


def test_the_bound_is_unbiased():
    model = tiny_model()
    drawn = objective(model, mask_samples=8)
    with torch.no_grad():
        found = torch.stack([drawn.bound(model, batch(step, 64), 10).view(2, 64, 2) for step in range(12)])
    mean, error = found.mean((0, 2)), found.std((0, 2)) / (12 * 64) ** 0.5
    for side, name in enumerate(("chosen_ids", "rejected_ids")):
        for row in range(2):
            exact = log_likelihood(model, ROWS["prompt_ids"][row], ROWS[name][row], estimator="exact")
            assert abs(float(mean[side, row]) - exact) < 4 * float(error[side, row]) < 0.2 * abs(exact)


def test_shared_masks_keep_the_mean_and_lower_the_variance():
    torch.manual_seed(0)
    reference = tiny_model()
    policy = copy.deepcopy(reference)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * parameter.std() * torch.randn_like(parameter)) if parameter.ndim > 1 else None
    scores = {}
    for shared in (True, False):
        drawn = objective(reference, shared_masks=shared)
        with torch.no_grad():
            scores[shared] = torch.cat([drawn.score(policy, batch(step, 16)).view(16, 2) for step in range(12)])
    count = len(scores[True])
    error = (scores[False].var(0) / count).sqrt()
    assert ((scores[True].mean(0) - scores[False].mean(0)).abs() < 4 * error).all()
    assert (scores[True].var(0) < scores[False].var(0) / 4).all()


def test_preferences_are_learned(tmp_path):
    data = write_pairs(tmp_path / "data")
    params = PreferenceParams(max_steps=40, batch_size=8, mask_samples=2, learning_rate=1e-3, log_every=4, beta=0.5,
                              warmup=0, samples=1, save_every=100)  # fmt: skip
    model, tokenizer = tiny_pair()
    train(params, model, tokenizer, RunPaths(data, tmp_path / "run"), seed=1)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    found = [line["preferred"] for line in lines if "preferred" in line]
    assert found[-1] > 0.9
    assert lines[-1]["validation_preferred"] > 0.8
