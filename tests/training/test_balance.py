"""Balancing without a loss: the bias follows the load of all ranks and micro-batches, is stored, and is never optimised."""

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from llada_core.modeling import load_model
from llada_core.training.accelerator import Ranks, optimiser_for
from llada_core.training.balance import RouterBalance
from llada_core.training.params import PretrainParams, SFTParams
from llada_core.training.progress import read_metrics
from llada_core.training.train import RunPaths, train
from tests.tiny import tiny_model, tiny_pair
from tests.training.data import write_data
from tests.training.test_ranks import launch, plan, same

RATE = 0.01


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


def run(data, folder, follow=None, kind="llada2", **changes):
    values = {"max_steps": 8, "batch_size": 8, "learning_rate": 3e-3, "log_every": 1, "save_every": 4, "warmup": 2, "samples": 0}  # fmt: skip
    params = SFTParams(**{**values, "router_bias_rate": RATE, "router_balance": 0.0, "router_z": 0.0, **changes})
    model, tokenizer = tiny_pair(kind)
    train(params, model, tokenizer, RunPaths(data, folder, folder / "model"), seed=1, follow=follow)
    return model


def biases(model):
    return torch.stack([block.mlp.expert_bias for block in model.blocks if hasattr(block.mlp, "expert_bias")])


def test_one_update_is_the_sign_of_the_load_error_of_real_tokens():
    """Against the chosen experts of every token, counted one by one."""
    model = tiny_model("llada2").train()
    balance = RouterBalance(model, RATE)
    ids = torch.randint(5, 110, (3, 10), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(10) < torch.tensor([[10], [6], [3]])).long()
    chosen = {name: [] for name in balance.routers}
    for name, router in balance.routers.items():
        router.register_forward_hook(lambda _m, _x, out, name=name: chosen[name].append(out[1].experts))
    model(ids, mask)
    model(ids[:1], None)
    with torch.no_grad():
        model(ids)  # nobody learns from this
    model.eval()(ids)
    expected = {}
    for name, (one, other, *_) in chosen.items():
        tokens = [*one.view(3, 10, -1)[mask.bool()].flatten().tolist(), *other.flatten().tolist()]
        load = torch.tensor([tokens.count(e) for e in range(4)], dtype=torch.float64)
        expected[name] = RATE * (load.mean() - load).sign().float(), load
    uneven = balance.step(Ranks())
    for name, router in balance.routers.items():
        torch.testing.assert_close(router.expert_bias, expected[name][0])
        assert not router.load.any()
    shares = [float(load.max() / load.mean()) for _, load in expected.values()]
    assert float(uneven) == pytest.approx(sum(shares) / len(shares))
    assert any(bias.any() for bias, _ in expected.values())


@pytest.mark.parametrize("asked", [torch.tensor([0, 4, 17, 25]), None])
def test_of_a_last_layer_that_finishes_few_positions_those_count(asked):
    model = tiny_model("llada2").train()
    balance = RouterBalance(model, RATE)
    mask = (torch.arange(10) < torch.tensor([[10], [6], [3]])).long()
    model(torch.full((3, 10), 9), mask, positions=asked)
    (router,) = balance.routers.values()
    assert int(router.load.sum()) == 2 * (19 if asked is None else 2)


def test_recomputed_activations_count_once():
    loads = []
    for again in (False, True):
        model = tiny_model("llada2").train()
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        balance = RouterBalance(model, RATE)
        model(torch.arange(5, 25).view(2, 10)).logits.sum().backward()
        loads.append(torch.stack([router.load for router in balance.routers.values()]))
    assert torch.equal(*loads)
    assert int(loads[0].sum()) == 2 * 20 * len(loads[0])


def test_no_optimiser_has_it():
    model = tiny_model("llada2")
    balance = RouterBalance(model, RATE)
    for name in ("adamw", "muon"):
        optimiser = optimiser_for(model, PretrainParams(max_steps=1, optimiser=name))
        held = {id(p) for group in optimiser.param_groups for p in group["params"]}
        assert not held & {id(bias) for bias in balance.state.values()}
    assert not any(bias.requires_grad for bias in balance.state.values())


def test_a_run_moves_the_bias_exports_it_and_tells_how_even_loads_are(data, tmp_path):
    model = run(data, tmp_path)
    steps = biases(model) / RATE
    torch.testing.assert_close(steps, steps.round(), atol=1e-4, rtol=0)
    assert steps.abs().max() > 0
    assert torch.equal(biases(load_model(tmp_path / "model")), biases(model))
    told = [line["router_imbalance"] for line in read_metrics(tmp_path / "metrics.jsonl") if "router_imbalance" in line]
    assert len(told) == 8
    assert all(1 <= value <= 2 for value in told)


def test_loads_become_more_even_than_without(data, tmp_path):
    """The same data and seed, for long enough that the bias can reach what the router prefers."""
    last = []
    for name, rate in (("still", 1e-9), ("balanced", 0.02)):
        run(data, tmp_path / name, max_steps=60, router_bias_rate=rate, learning_rate=1e-3)
        lines = [
            x["router_imbalance"] for x in read_metrics(tmp_path / name / "metrics.jsonl") if "router_imbalance" in x
        ]
        last.append(sum(lines[-10:]) / 10)
    assert last[1] < 0.95 * last[0], last


def test_a_stopped_run_goes_on_bit_by_bit(data, tmp_path):
    run(data, tmp_path / "whole")
    run(data, tmp_path / "cut", lambda line: (tmp_path / "cut" / "STOP").touch() if line["step"] == 5 else None)
    run(data, tmp_path / "cut")
    one, other = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_two_ranks_sharded_or_not_are_one(data, tmp_path):
    """Loads of all ranks, in micro-batches of four; bias by bias, beside the weights."""
    settings = {"model": "llada2", "max_steps": 5, "router_bias_rate": RATE}
    launch(tmp_path, 1, [plan(data, tmp_path, "alone", **settings)])
    launch(tmp_path, 2, [plan(data, tmp_path, kind, kind=kind, **settings) for kind in ("ddp", "fsdp")])
    alone = load_model(tmp_path / "alone" / "model")
    assert biases(alone).any()
    for kind in ("ddp", "fsdp"):
        same(tmp_path / kind, tmp_path / "alone")
        assert torch.equal(biases(load_model(tmp_path / kind / "model")), biases(alone))


def test_what_cannot_be_balanced_is_refused_in_one_line(data, tmp_path):
    for kind in ("llada", "llada_moe"):
        with pytest.raises(ValueError, match=r"router_bias_rate 0\.01: no router of .* has a bias"):
            run(data, tmp_path, kind=kind)
    with pytest.raises(ValidationError, match="leave out one of router_bias_rate and lora"):
        SFTParams(max_steps=1, router_bias_rate=0.01, lora={"r": 2})
    assert "router_bias_rate" not in SFTParams(max_steps=1).determining()
