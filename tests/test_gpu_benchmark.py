"""The measurements for a GPU at toy size, so that they can be run on one at any time."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_cells, peers
from benchmarks.oracle import Reference

PARTS = ("checks", "sampling", "compiled", "moe", "blocks", "training", "loading")


@pytest.mark.slow
def test_every_part_runs_at_toy_size_and_keeps_its_figures(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # kernels would take half a minute
    out = tmp_path / "gpu.json"
    gpu.main(["--toy", "--out", str(out)])
    found = json.loads(out.read_text())
    assert {name for name in found if isinstance(found[name], list)} == set(PARTS)
    assert not [row for part in PARTS for row in found[part] if "error" in row]
    assert "these figures say nothing" in capsys.readouterr().out
    assert all(row["worst_logit"] < 1e-4 for row in found["checks"])
    assert {row["who"] for row in found["sampling"]} == {"ours", "ML-GSAI's algorithm", "Fast-dLLM's algorithm"}
    assert all(row["ms_step"] > 0 for part in ("sampling", "compiled", "moe", "blocks") for row in found[part])
    assert {row["who"] for row in found["compiled"]} == {"ours", "ours, compiled"}
    assert all(row["tok_s_at_5"] > row["tok_s_at_2.5"] > row["tok_s_at_1"] > 0 for row in found["blocks"])
    assert all(row["tok_s"] > 0 for row in found["training"])
    assert any("by blocks" in row["what"] for row in found["training"])


def test_the_peers_steps_write_what_the_whole_canvas_says() -> None:
    size = gpu_cells.size_of(toy=True)
    model = gpu_cells.random_model(size.dense, size, torch.float32)
    prompts = gpu.prompts_of(size, 2, 20)
    exact = peers.exact_step(model, size.dense, prompts, 64, 32)()[:, 20:52]
    refresh, step = peers.window_step(model, size.dense, prompts, 64, 32)
    assert torch.equal(refresh(), exact)
    assert torch.equal(step(), exact)  # a cache made from this very canvas changes nothing
    assert ((exact != model.special_tokens.mask_id).sum(1) == 1).all()


def test_a_cell_that_fails_is_told_and_stops_no_other() -> None:
    def fails() -> dict[str, float]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    assert gpu_cells.surviving(fails, "cpu") == {"error": "CUDA out of memory. Tried to allocate 2 GiB."}


def test_a_rate_counts_the_dear_first_step_of_each_block() -> None:
    assert gpu.rate(first=0.02, later=0.01, rows=2, per_forward=1.0) == 2 * 32 / (0.02 + 31 * 0.01)


def test_the_oracle_with_a_cache_is_the_oracle_without() -> None:
    size = gpu_cells.size_of(toy=True)
    model = gpu_cells.random_model(size.dense, size, torch.float32)
    reference: Reference = peers.reference_of(model, size.dense)
    tokens, kept = gpu.prompts_of(size, 2, 24), []
    whole = reference.cached(tokens, kept, 0)
    torch.testing.assert_close(reference.cached(tokens[:, 8:16], kept, 8), whole[:, 8:16])


def test_a_floor_asks_the_head_for_the_block_alone() -> None:
    size = gpu_cells.size_of(toy=True)
    model = gpu_cells.random_model(size.dense, size)
    floor = gpu.Floor(bytes_per_second=1e30, flops_per_second=1.0)  # products alone
    head = model.vocab_rows * size.dense.d_model
    body = gpu.active_parameters(model) - head
    assert floor.step(model, rows=2, positions=100) == 2 * 2 * (body * 100 + head * gpu.BLOCK)
    assert floor.step(model, rows=2, positions=8) == 2 * 2 * (body * 8 + head * 8)
