"""A network packed for inference computes what its modules do, whatever has happened to them since."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from llada_core.modeling import packed
from llada_core.modeling.adapters import add_lora, merge_adapter
from llada_core.modeling.architecture import LoraParams
from llada_core.modeling.packed import Product
from tests.tiny import tiny_model

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN")
TOKENS = torch.randint(0, 120, (3, 9), generator=torch.Generator().manual_seed(1))
PER_QUERY = torch.rand(3, 9, 9, generator=torch.Generator().manual_seed(2)) < 0.8
VISIBLE = torch.arange(9) < torch.tensor([9, 7, 4])[:, None]
POSITIONS = torch.tensor([0, 3, 10, 20, 21])
EVEN = torch.tensor([0, 3, 12, 10, 20, 21])  # two of each row
GIVEN = [
    {},
    {"attention_mask": VISIBLE},
    {"positions": POSITIONS},
    {"positions": EVEN},
    {"positions": EVEN[[0, 2, 4]], "attention_mask": VISIBLE},
    {"positions": EVEN[[2, 0, 4, 5, 1, 3]]},
    {"positions": EVEN, "attention_mask": PER_QUERY},
]


@pytest.fixture(autouse=True)
def any_processor(monkeypatch):
    """oneDNN on every maker's processor."""
    monkeypatch.setattr(packed, "prefers_onednn", lambda: True)


def with_norms(model):
    """Norms that do something."""
    for name, weight in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(weight, 0.5, 2.0)
    return model


def logits(model, **given):
    with torch.no_grad():
        return model(TOKENS, **given).logits


def packs(model):
    """Whether the next forward goes through the packed weights."""
    return model._packed_for(torch.zeros(1, 1, 32, dtype=model.dtype)) is not None


@pytest.mark.parametrize("changes", [{}, {"n_kv_heads": 2}, {"weight_tying": True}], ids=str)
@pytest.mark.parametrize("given", GIVEN, ids=lambda g: str([*g]))
def test_the_same_logits(changes, given):
    model = with_norms(tiny_model(**changes))
    plain = logits(model, **given)
    model.fuse_for_inference()
    assert packs(model)
    assert_close(logits(model, **given), plain, atol=1e-5, rtol=1e-5)
    assert logits(model, positions=POSITIONS[:0]).shape == (0, 136)


def test_the_same_logits_from_a_cache():
    model, found = with_norms(tiny_model()), []
    for fused in (False, True):
        if fused:
            model.fuse_for_inference()
        cache, slots = model.new_cache(3, 9), torch.arange(4, 7).expand(3, 3)
        logits(model, cache=cache)
        with torch.no_grad():
            found.append(model(TOKENS[:, 1:4], cache=cache, slots=slots).logits)
    assert_close(found[1], found[0], atol=1e-5, rtol=1e-5)


def test_hidden_states_and_gradients_come_from_the_modules():
    model = tiny_model()
    model.fuse_for_inference()
    assert len(model(TOKENS, output_hidden_states=True).hidden_states) == 3
    model(TOKENS).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    "name", ["attn_norm", "ff_norm", "q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out"]
)
def test_every_change_of_a_weight_is_followed(name):
    model = tiny_model()
    layer = getattr(model.model.transformer.blocks[1], name)
    for change in (lambda: layer.weight.mul_(2), lambda: replace(layer)):
        model.fuse_for_inference()
        before = logits(model)
        with torch.no_grad():
            change()
        after = logits(model)
        assert not torch.equal(before, after)
        model._packed = None
        assert_close(after, logits(model), atol=1e-5, rtol=1e-5)


def replace(layer):
    layer.weight = nn.Parameter(torch.randn_like(layer.weight))


def test_the_head_too_and_weights_loaded_again():
    model = tiny_model()
    model.fuse_for_inference()
    model.load_state_dict(tiny_model(seed=1).state_dict())
    assert_close(logits(model), logits(tiny_model(seed=1)), atol=1e-5, rtol=1e-5)
    model.fuse_for_inference()
    with torch.no_grad():
        model.model.transformer.ff_out.weight.mul_(2)
    assert_close(logits(model), 2 * logits(tiny_model(seed=1)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("change", ["twice replaced", "there and back", "its data", "another block", "another head"])
def test_no_change_hides(change):
    model, other = tiny_model(), tiny_model(seed=1)
    body, layer = model.model.transformer, model.model.transformer.blocks[1].q_proj
    model.fuse_for_inference()
    if change == "twice replaced":  # the third may lie where the first did
        replace(layer), replace(layer)
    elif change == "there and back":
        model.to(torch.bfloat16).to(torch.float32)
    elif change == "its data":
        layer.weight.data = torch.randn_like(layer.weight)
    elif change == "another block":
        body.blocks[1] = other.model.transformer.blocks[1]
    else:
        body.ff_out = other.model.transformer.ff_out
    assert not packs(model)
    assert model._packed is None  # what is outdated costs no memory


def test_an_adapter_added_later_counts():
    model = tiny_model()
    model.fuse_for_inference()
    add_lora(model, LoraParams(r=2, alpha=4, targets="all-linear"))
    assert not packs(model)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    adapted = logits(model)
    merge_adapter(model)
    assert_close(logits(model), adapted, atol=1e-4, rtol=1e-4)


def test_copies_and_training_start_without():
    model = tiny_model()
    model.fuse_for_inference()
    assert not packs(copy.deepcopy(model))
    assert packs(model)
    assert not packs(model.train())


def test_what_cannot_be_packed_is_left_alone(monkeypatch):
    for other in (tiny_model("llada_moe"), tiny_model(qk_norm=True), tiny_model().to("meta")):
        other.fuse_for_inference()
        assert other._packed is None
    model = tiny_model()
    model.fuse_for_inference()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not packs(model)
        assert logits(model).dtype == torch.bfloat16
    monkeypatch.setattr(packed, "prefers_onednn", lambda: False)
    model.fuse_for_inference()
    assert model._packed is None


def test_bfloat16():
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("no bf16 products on this processor")
    model = tiny_model().to(torch.bfloat16)
    plain = logits(model)
    model.fuse_for_inference()
    assert packs(model)
    assert_close(logits(model), plain, atol=5e-2, rtol=5e-2)


def test_a_product_of_stacked_weights_with_what_is_added():
    a, b = nn.Linear(8, 4), nn.Linear(8, 2)
    x, added = torch.randn(2, 5, 8), torch.randn(2, 5, 6)
    with torch.no_grad():
        wanted = torch.cat([a(x), b(x)], -1) + added
        assert_close(Product(a, b)(x, added), wanted, atol=1e-5, rtol=1e-5)
