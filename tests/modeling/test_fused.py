"""Projections as one product: the same numbers, the same files, no more memory; and never stale."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from llada_core.modeling import load_model, load_to_answer, save_model
from llada_core.modeling.adapters import add_lora, merge_adapter
from llada_core.modeling.attention import BlockCausal
from llada_core.modeling.families import FAMILIES, LoraParams
from llada_core.modeling.fused import FusableModule, fuse_projections
from llada_core.modeling.predictor import KVCache
from llada_core.sampling import SamplingParams, generate
from tests.tiny import tiny_model

# name -> kind, settings of the tiny model, products that a model of two layers is to have
FUSED = {
    "llada": ("llada", {}, 4),
    "tied": ("llada", {"weight_tying": True}, 4),
    "normed and grouped": ("llada", {"qk_norm": True, "n_kv_heads": 2}, 4),
    "llada_blocks": ("llada_blocks", {"block_length": 4}, 4),
    "llada_moe": ("llada_moe", {}, 2),
    "llada2": ("llada2", {"block_length": 4}, 2),  # published with one projection: its dense layer and a shared expert
    "llada2 tied": ("llada2", {"block_length": 4, "weight_tying": True, "n_kv_heads": 2}, 2),
}


def products(model):
    return sum(len(module._fused) for module in model.modules() if isinstance(module, FusableModule))


def calls(model):
    """Logits of every way to ask: plain, ragged, by cached windows, by blocks."""
    ids, model = torch.randint(5, 110, (3, 12), generator=torch.Generator().manual_seed(1)), model.eval()
    how = {} if model.block_length is None else {"block_causal": BlockCausal(model.block_length)}
    ragged = (torch.arange(12) < torch.tensor([[12], [7], [4]])).long()
    cache, at = model.new_cache(3, 12), torch.arange(4, 8).expand(3, -1)
    found = [model(ids, **how).logits, model(ids, ragged, **how).logits]
    found.append(model(ids, cache=cache, slots=torch.arange(12).expand(3, -1), **how).logits)
    found.append(model(ids[:, 4:8], ragged, cache=cache, slots=at, positions=torch.arange(5), **how).logits)
    return found


@torch.no_grad()
@pytest.mark.parametrize("name", FUSED)
def test_fused_equals_plain(name):
    kind, changes, expected = FUSED[name]
    model = tiny_model(kind, **changes).double()
    plain = calls(model)
    fuse_projections(model)
    assert products(model) == expected
    for ours, theirs in zip(calls(model), plain, strict=True):
        assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llada", "llada_moe", "llada2"])
def test_it_is_one_product(kind):
    """The widths that a fused model multiplies by."""
    model, seen = tiny_model(kind), []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
                seen.append(args[-1].shape[1])
            return func(*args, **(kwargs or {}))

    fuse_projections(model)
    with Products():
        model(torch.full((1, 6), 9))
    assert seen.count(3 * 32) == 2
    assert seen.count(128) == {"llada": 2, "llada_moe": 0, "llada2": 1}[kind]
    assert 64 not in seen, "gate and up were multiplied one by one"


@pytest.mark.parametrize("kind", ["llada", "llada_moe", "llada2"])
def test_what_answers_is_fused_and_saved_as_published(kind, tmp_path):
    model = tiny_model(kind)
    save_model(model, tmp_path / "plain")
    model = load_to_answer(tmp_path / "plain", device="cpu")
    assert products(model) == FUSED[kind][2]
    assert model.state_dict().keys() == load_model(tmp_path / "plain", device="cpu").state_dict().keys()
    save_model(model, tmp_path / "again")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "again")]
    assert weights[0] == weights[1]
    prompt, params = [[7, 8, 9]], SamplingParams(max_new_tokens=8, block_length=4, steps=8)
    plain = load_model(tmp_path / "plain", device="cpu")
    assert torch.equal(generate(model, prompt, params).tokens, generate(plain, prompt, params).tokens)


def test_training_steps_change_both_ways_to_multiply():
    """Weights that change between calls: gradients reach the layers, and the product sees what a step made of them."""
    model = tiny_model().double()
    plain = copy.deepcopy(model)
    fuse_projections(model)
    ids = torch.randint(5, 110, (2, 9))
    for one in (model, plain):
        optimiser = torch.optim.AdamW(one.parameters(), lr=1e-2)
        for _ in range(2):
            optimiser.zero_grad()
            one(ids).logits.square().mean().backward()
            optimiser.step()
    assert products(model) == 4
    assert model.blocks[0].q_proj.weight.grad.abs().sum() > 0
    with torch.no_grad():
        assert_close(model(ids).logits, plain(ids).logits, atol=1e-12, rtol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("change", ["loaded", "assigned", "cast", "copied", "set by hand"])
def test_the_product_is_never_stale(change):
    model, other = tiny_model(), tiny_model(seed=5)
    fuse_projections(model)
    if change == "copied":
        model = copy.deepcopy(model)
        assert products(model) == 0
    if change == "cast":
        model = model.double()
        assert products(model) == 4
        other = other.double()
    if change in ("set by hand", "copied", "cast"):
        for own, new in zip(model.parameters(), other.parameters(), strict=True):
            own.copy_(new)
    else:
        model.load_state_dict(other.state_dict(), assign=change == "assigned")
    ids = torch.randint(5, 110, (2, 9))
    assert_close(model(ids).logits, other(ids).logits)


@torch.no_grad()
def test_an_adapter_takes_the_layers_apart():
    model = tiny_model()
    fuse_projections(model)
    add_lora(model, LoraParams(r=2, alpha=4))
    assert products(model) == 0
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.fill_(0.3)
    ids = torch.randint(5, 110, (2, 9))
    adapted = model(ids).logits
    merge_adapter(model)
    fuse_projections(model)
    assert_close(model(ids).logits, adapted, atol=1e-4, rtol=1e-4)


def test_layers_that_are_not_plain_stay_apart():
    class Quantised(nn.Linear):
        pass

    model = tiny_model()
    model.blocks[0].k_proj = Quantised(32, 32, bias=False)
    model.blocks[1].up_proj.to("meta")
    fuse_projections(model)
    assert [sorted(block._fused) for block in model.blocks] == [["ff_proj"], ["q_proj"]]


def test_memory_of_eight_billion_weights_while_they_are_fused():
    """One product more at most, and nothing once it is done; shapes alone are held here."""
    family = FAMILIES["llada"]
    config = family.config_class.for_model(**{**family.published.config, "n_layers": 3})
    with FakeTensorMode():
        model = family.network_class(config).requires_grad_(False)
        with MemTracker() as tracker:
            tracker.track_external(model)

            def held(which):
                return tracker.get_tracker_snapshot(which)[torch.device("cpu")]["Total"]

            before = held("current")
            fuse_projections(model)
            assert products(model) == 6
            largest = 4 * 2 * config.mlp_hidden_size * config.d_model
            assert held("peak") - before <= largest + 1e6
            assert abs(held("current") - before) <= 1e6


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llada", "llada_moe", "llada2"])
def test_what_is_cached_is_attended_to_where_it_lies(kind, monkeypatch):
    """No tensor as large as a layer's keys is made, and no mask where nothing is hidden."""
    model, rows, slots = tiny_model(kind, **({"block_length": 32} if kind == "llada2" else {})), 2, 96
    fuse_projections(model)
    cache: KVCache = model.new_cache(rows, slots)
    size, made, masks = cache.keys[0].untyped_storage().nbytes(), [], []
    kept = {x.untyped_storage().data_ptr() for x in (*cache.keys, *cache.values, *model.parameters())}
    kept |= {table.untyped_storage().data_ptr() for table in model.tables.upto(128, torch.device("cpu"))}
    attend = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *x, **how: (masks.append(how["attn_mask"]), attend(*x, **how))[1]
    )

    class Large(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple) else (out,):
                if isinstance(x, torch.Tensor) and x.untyped_storage().nbytes() >= size:
                    made.extend([str(func)] if x.untyped_storage().data_ptr() not in kept else [])
            return out

    how = {"block_causal": BlockCausal(32)} if kind == "llada2" else {}
    ids = torch.randint(5, 110, (rows, 8))
    with Large():
        model(ids, torch.ones(rows, slots), positions=torch.arange(2), cache=cache, slots=torch.arange(88, 96).expand(rows, -1), **how)  # fmt: skip
    assert made == []
    assert masks == [None, None]
