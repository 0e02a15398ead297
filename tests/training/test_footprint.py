"""The memory of a training step, from the step run without memory: as a GPU measured it, and what each setting changes."""

import sys

import pytest
import torch

from llada_core.modeling.families import LoraParams, ModelParams
from llada_core.modeling.pretrained import empty_model
from llada_core.sampling.params import SamplingParams
from llada_core.tokenizer import SpecialTokens
from llada_core.training.footprint import case_of, footprint
from llada_core.training.params import (
    BlockParams,
    BlockPhase,
    DistributionParams,
    GRPOParams,
    PreferenceParams,
    PretrainParams,
    SFTParams,
)
from llada_core.training.train import prepare_weights
from tasks.launch.plan_memory import copies_of, cut, unknown_step
from tests.tiny import TINY_BACKBONES

GIB = 2**30


def shape(vocabulary, kind="llada", **values):
    special = SpecialTokens(mask_id=vocabulary - 1, eos_id=0, pad_id=0)
    return empty_model(ModelParams(kind=kind, **{"max_sequence_length": 4096, **values}), vocabulary, special)


def step(model, params, rows, length, **more):
    """The fullest moment of each part of a step, in bytes by purpose."""
    prepare_weights(model, params)
    return footprint(model, params, rows, length, **more)


def fullest(found):
    return max(sum(parts.values()) for parts in found.values())


# One H200, bf16 autocast, uncompiled, in GiB. The first two were measured while all chunks of the logits were kept until
# the backward pass, up to 3 GiB that are freed now.
MEASURED = [
    (67, 8, {"vocabulary": 126464, "d_model": 4096, "n_heads": 32, "mlp_hidden_size": 12288}, (4, 4096), False),
    (53, 16, {"vocabulary": 126464, "d_model": 2048, "n_heads": 16, "mlp_hidden_size": 5632}, (8, 2048), False),
    (28, 24, {"vocabulary": 32000, "d_model": 1024, "n_heads": 16, "mlp_hidden_size": 2816}, (16, 1024), True),
]


@pytest.mark.parametrize(("wanted", "depth", "values", "tokens", "accumulates"), MEASURED)
def test_what_a_gpu_measured(wanted, depth, values, tokens, accumulates):
    params = PretrainParams(max_steps=1, precision="bf16", batch_size=32)
    few, more = (
        fullest(step(shape(n_layers=layers, **values), params, *tokens, accumulates=accumulates)) for layers in (2, 4)
    )
    found = (more + (more - few) / 2 * (depth - 4)) / GIB
    print(wanted, round(found, 1))
    assert found == pytest.approx(wanted, rel=0.12)


class OwnParams(SFTParams):
    """A stage of one's own."""

    OBJECTIVE = "tests.training.test_footprint.objective"


def objective():
    """Not run: only its module is looked at."""


def twice_as_wide(params, model, rows, length):
    """A step that holds rows of twice the length."""
    return case_of(SFTParams(max_steps=1))(params, model, rows, 2 * length)


def test_an_objective_of_ones_own_says_what_its_step_holds(monkeypatch):
    own, usual = OwnParams(max_steps=1, precision="bf16"), SFTParams(max_steps=1, precision="bf16")
    with pytest.raises(ValueError, match=r"test_footprint\.objective does not say what a step of it holds"):
        tiny(own)
    assert unknown_step(own) == "tests.training.test_footprint.objective"
    monkeypatch.setattr(sys.modules[__name__], "fullest_step", twice_as_wide, raising=False)
    assert unknown_step(own) is unknown_step(usual) is None
    assert fullest(tiny(own)) == fullest(tiny(usual, length=128)) > fullest(tiny(usual))


def test_a_trajectory_holds_a_copy_for_each_step_of_a_block():
    """A rollout of 32 tokens in blocks of 8: at most eight canvases of a row, noisy and clean; merged steps are fewer."""
    held = {}
    for merge in (1, 2, 4):
        sampling = SamplingParams(max_new_tokens=32, block_length=8, steps=32)
        params = GRPOParams(
            max_steps=1, beta=0.0, likelihood="trajectory", merge_steps=merge, prompts=2, sampling=sampling
        )
        assert params.mask_copies == 8 // merge
        model = shape(n_layers=2, kind="llada_blocks", block_length=8, **TINY)
        held[merge] = tiny(params, rows=params.mask_copies, model=model)["forward"]["activations"]
    assert held[1] > 1.7 * held[2] > 1.7 * 1.7 * held[4]


TINY = {"vocabulary": 500, "d_model": 64, "n_heads": 4, "mlp_hidden_size": 128}
PRETRAIN = PretrainParams(max_steps=1, precision="bf16")


def tiny(params=PRETRAIN, layers=2, rows=4, length=64, model=None, **more):
    return step(model or shape(n_layers=layers, **TINY), params, rows, length, **more)


def test_memory_is_a_line_in_the_number_of_layers():
    whole = shape(n_layers=6, **TINY)
    by_depth = {n: tiny(model=cut(shape(n_layers=6, **TINY), n)) for n in (2, 4)} | {6: tiny(model=whole)}
    for part in ("forward", "backward", "update"):
        few, more, all_of_them = (sum(by_depth[n][part].values()) for n in (2, 4, 6))
        assert more + (more - few) == pytest.approx(all_of_them, rel=0.01), part


def test_each_setting_takes_and_saves_what_it_should():
    model = shape(n_layers=2, **TINY)
    trained = 4 * sum(p.numel() for p in model.parameters())
    plain = tiny(model=model)
    assert plain["forward"]["weights"] == trained
    assert plain["update"]["optimiser"] == pytest.approx(2 * trained, rel=0.01)
    assert plain["forward"]["gradients"] == 0
    assert tiny(accumulates=True)["forward"]["gradients"] == trained
    light = tiny(PretrainParams(max_steps=1, precision="bf16", activation_checkpointing=True))
    assert light["forward"]["activations"] < plain["forward"]["activations"] / 1.5
    sharded = tiny(PretrainParams(max_steps=1, distribution=DistributionParams(kind="fsdp")), ranks=8)
    assert sharded["update"]["optimiser"] == pytest.approx(2 * trained / 8, rel=0.05)
    assert not torch.distributed.is_initialized()
    adapters = tiny(SFTParams(max_steps=1, lora=LoraParams(r=2)))
    assert adapters["update"]["optimiser"] < trained / 10
    muon = tiny(PretrainParams(max_steps=1, optimiser="muon"))
    assert muon["forward"]["optimiser"] < 2 * trained


@pytest.mark.parametrize("kind", ["grpo", "elbo", "preference"])
def test_a_reference_is_a_copy_or_an_adapter_that_is_off(kind):
    sampling = {"max_new_tokens": 32, "block_length": 32, "steps": 32}

    def params(**changes):
        if kind == "preference":
            return PreferenceParams(max_steps=1, mask_samples=2, **changes)
        likelihood = {"likelihood": "elbo", "mask_samples": 2} if kind == "elbo" else {}
        return GRPOParams.model_validate({"max_steps": 1, "sampling": sampling} | likelihood | changes, strict=False)

    model = shape(n_layers=2, **TINY)
    trained = 4 * sum(p.numel() for p in model.parameters())
    assert tiny(params(), model=model)["backward"]["weights"] == 2 * trained
    assert tiny(params(lora=LoraParams(r=2)))["backward"]["weights"] < 1.2 * trained


def test_adapters_of_experts_take_their_own_and_no_copy_of_the_tables():
    values = TINY | {"num_experts": 8, "experts_per_token": 1, "expert_hidden_size": 256}
    found, trained = {}, {}
    for experts in (False, True):
        params = SFTParams(max_steps=1, precision="bf16", lora=LoraParams(r=1, experts=experts))
        model = shape(n_layers=2, kind="llada_moe", **values)
        found[experts] = step(model, params, 1, 8)
        trained[experts] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    added, without, having = trained[True] - trained[False], *found.values()
    assert added == 2 * 8 * (64 + 512 + 256 + 64)
    assert having["update"]["weights"] - without["update"]["weights"] == 4 * added
    assert having["update"]["optimiser"] - without["update"]["optimiser"] == pytest.approx(8 * added, rel=0.01)
    table_weights = 2 * 8 * 3 * 256 * 64
    assert fullest(having) - fullest(without) < table_weights, "not a byte for each"


@pytest.mark.parametrize("kind", ["llada_moe", *TINY_BACKBONES])
def test_every_backbone(kind):
    if kind == "llada_moe":
        model = shape(n_layers=2, kind=kind, num_experts=4, experts_per_token=2, expert_hidden_size=16, **TINY)
    else:
        model = shape(500, kind="masked_lm", backbone={"model_type": kind, **TINY_BACKBONES[kind]})
    found = tiny(model=model)
    assert found["forward"]["activations"] > 4 * 64 * 500 * 4  # at least its logits


@pytest.mark.parametrize("kind", ["llada_blocks", "llada2"])
def test_rows_by_blocks_are_fed_twice_and_complementary_ones_twice_again(kind):
    """What is kept of a pass grows with what is fed; heads see hidden positions alone, which are no more than before."""
    values = TINY | {"num_experts": 8, "expert_hidden_size": 32}
    found, fed = {}, {}
    for name, settings in {
        "whole": {"blocks": BlockParams(length=64)},
        "blocks": {"blocks": BlockParams(length=8)},
        "phases": {"blocks": BlockParams(length=64, phases=(BlockPhase(steps=1, length=8),))},
        "pairs": {"blocks": BlockParams(length=8), "complementary": True},
    }.items():
        params = SFTParams(max_steps=1, precision="bf16", router_balance=0, router_z=0, **settings)
        model = shape(n_layers=4, kind=kind, **values)
        fed[name] = copies_of(model, params, 64)
        found[name] = step(model, params, 4, 64)["forward"]["activations"]
    assert fed == {"whole": 1, "blocks": 2, "phases": 2, "pairs": 4}
    assert found["phases"] == found["blocks"]
    assert 1.6 < found["blocks"] / found["whole"] < 2.1
    assert 1.6 < found["pairs"] / found["blocks"] < 2.1
