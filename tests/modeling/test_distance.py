"""The norm of a weight change."""

import math

import torch

from llada_core.modeling import save_model
from llada_core.modeling.folder import weight_distance
from tests.tiny import tiny_pair


def test_the_distance_of_two_checkpoints(tmp_path):
    model, tokenizer = tiny_pair()
    save_model(model, tmp_path / "before", tokenizer)
    with torch.no_grad():
        moved = [p.add_(0.5).numel() for p in list(model.parameters())[:2]]
    save_model(model, tmp_path / "after", tokenizer)
    expected = math.sqrt(0.25 * sum(moved))
    assert math.isclose(weight_distance(tmp_path / "before", tmp_path / "after"), expected, rel_tol=1e-5)
    assert weight_distance(tmp_path / "after", tmp_path / "after") == 0.0
    assert weight_distance(tmp_path / "after", tmp_path) is None
