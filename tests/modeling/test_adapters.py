"""Low-rank adapters: which layers, stored and loaded in peft's format, switched off, merged."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from llada_core import settings
from llada_core.modeling import add_lora, load_model, merge_adapter, save_model
from llada_core.modeling.adapters import adapter_off, linear_layers, load_adapter, save_adapter
from llada_core.modeling.block import Experts, LowRank, stack_product
from llada_core.modeling.families import LoraParams
from tests.tiny import TINY_BACKBONES, tiny_model

KINDS = ["llada", "llada_moe", "experts", *TINY_BACKBONES]
TOKENS = torch.randint(0, 120, (2, 9), generator=torch.Generator().manual_seed(0))


def plain(kind="llada"):
    """A model without an adapter; "experts" is a sparse one whose experts are to have one too."""
    return tiny_model("llada_moe" if kind == "experts" else kind, **({"n_kv_heads": 2} if kind == "llada" else {}))


def adapted(kind="llada", seed=0, **params):
    """A model whose adapter does something, as after training."""
    model = plain(kind)
    add_lora(model, LoraParams(r=4, alpha=8, experts=kind == "experts", **params))
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.1)
    return model


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def test_all_linear_is_every_linear_layer_of_the_blocks_and_neither_head_nor_router():
    short = {name.rpartition(".")[2] for name in linear_layers(tiny_model())}
    assert short == {"q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out"}
    assert len(linear_layers(tiny_model())) == 14
    assert {n.rpartition(".")[2] for n in linear_layers(tiny_model("llada_moe"))} == {
        "q_proj", "k_proj", "v_proj", "attn_out"
    }  # fmt: skip
    model = adapted()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 28
    assert all(".lora_" in name and ".blocks." in name for name in trained)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_changes_nothing_and_trains(kind):
    model = plain(kind)
    before = logits(model)
    add_lora(model, LoraParams(r=4, experts=kind == "experts"))
    assert torch.equal(logits(model), before)
    model(TOKENS).logits.sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


def test_a_bare_name_spares_the_head():
    model = adapted(targets=("ff_out",))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 4
    assert all(".blocks." in name for name in trained)


def test_a_regular_expression_chooses():
    model = adapted(targets=r".*blocks\.1\.(q|v)_proj")
    assert sum(p.requires_grad for p in model.parameters()) == 4


@pytest.mark.parametrize("targets", [("q_proj", "o_proj"), r".*gate_proj", ("blocks",)])
def test_a_target_that_matches_nothing_is_an_error(targets):
    with pytest.raises(ValueError, match=r"matches no linear layer of the blocks; they are: attn_out, ff_out"):
        add_lora(tiny_model(), LoraParams(targets=targets))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("merge", [True, False])
def test_stored_adapters_are_accepted_where_a_model_is(tmp_path, kind, merge):
    base = plain(kind)
    save_model(base, tmp_path / "base")
    model = adapted(kind)
    save_adapter(model, tmp_path / "adapter", tmp_path / "base")
    loaded = load_model(tmp_path / "adapter", merge=merge)
    assert_close(logits(loaded), logits(model), atol=2e-5, rtol=1e-4)
    assert loaded.special_tokens == base.special_tokens
    assert any(".lora_" in name for name, _ in loaded.named_parameters()) != merge
    if merge:
        assert loaded.state_dict().keys() == base.state_dict().keys()
        save_model(loaded, tmp_path / "merged")
        assert torch.equal(logits(load_model(tmp_path / "merged")), logits(loaded))


def test_a_base_may_lie_beside_its_adapter(tmp_path):
    save_model(tiny_model(n_kv_heads=2), tmp_path / "base")
    save_adapter(adapted(), tmp_path / "adapter", "../base")
    assert_close(logits(load_model(tmp_path / "adapter")), logits(adapted()), atol=2e-5, rtol=1e-4)


def test_a_base_named_by_its_content_lies_in_a_store_above_the_adapter(tmp_path, monkeypatch):
    save_model(tiny_model(n_kv_heads=2), tmp_path / "project/store/0123")
    for place in ("runs/a/tree/models/sft", "store/4567"):
        save_adapter(adapted(), tmp_path / "project" / place, "sha256:0123")
        assert_close(logits(load_model(tmp_path / "project" / place)), logits(adapted()), atol=2e-5, rtol=1e-4)
    alone = tmp_path / "alone"
    (tmp_path / "project/store/4567").rename(alone)
    with pytest.raises(FileNotFoundError, match=r"are in no store above it; copy store/0123 .* LLADAFLOW_HOME"):
        load_model(alone)
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("LLADAFLOW_HOME", str(tmp_path / "project"))
        load_model(alone)
    monkeypatch.chdir(tmp_path / "project/runs")
    load_model(alone)


def test_a_base_on_the_hub_is_taken_at_the_commit_that_was_trained_on(tmp_path, monkeypatch):
    save_model(tiny_model(n_kv_heads=2), tmp_path / "base")
    asked = []
    monkeypatch.setattr(
        "llada_core.modeling.pretrained.snapshot_download",
        lambda name, revision, allow_patterns: asked.append((name, revision)) or str(tmp_path / "base"),
    )
    for name in ("owner/name@0a1b", "owner/name"):
        save_adapter(adapted(), tmp_path / "a", name)
        load_model(tmp_path / "a")
    assert asked == [("owner/name", "0a1b"), ("owner/name", None)]
    assert json.loads((tmp_path / "a/adapter_config.json").read_text())["base_model_name_or_path"] == "owner/name"


def test_an_adapter_of_an_adapter(tmp_path):
    """The first one is merged; where it cannot be, in four bits, the second would take its place without a word."""
    save_model(tiny_model(n_kv_heads=2), tmp_path / "base")
    save_adapter(adapted(), tmp_path / "first", "../base")
    model = load_model(tmp_path / "first")
    add_lora(model, LoraParams(r=2))
    save_adapter(model, tmp_path / "second", "../first")
    assert_close(logits(load_model(tmp_path / "second")), logits(adapted()), atol=2e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="has an adapter already"):
        load_adapter(load_model(tmp_path / "first", merge=False), tmp_path / "second")
    with pytest.raises(ValueError, match="has an adapter already"):
        add_lora(load_model(tmp_path / "first", merge=False), LoraParams(r=2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stored_adapter_is_merged_into_what_it_was_merged_into_when_it_was_trained(tmp_path, dtype):
    model = tiny_model(n_kv_heads=2)
    model.to(dtype)
    save_model(model, tmp_path / "base")
    add_lora(model, LoraParams(r=4))
    for name, parameter in model.named_parameters():
        if ".lora_" in name:  # as it trains
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.02
    save_adapter(model, tmp_path / "a", "../base")
    merge_adapter(model)
    found = load_model(tmp_path / "a").state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in model.state_dict().items())


def test_stored_adapters_open_with_peft_and_published_names(tmp_path):
    from peft import PeftModel

    model = adapted()
    save_adapter(model, tmp_path / "a", "base")
    opened = PeftModel.from_pretrained(tiny_model(n_kv_heads=2), tmp_path / "a")
    assert_close(opened(TOKENS).logits.detach(), logits(model), atol=2e-5, rtol=1e-4)
    save_adapter(adapted("llada_moe"), tmp_path / "moe", "base")
    names = load_file(tmp_path / "moe" / "adapter_model.safetensors").keys()
    assert "base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight" in names


def test_stored_adapters_of_experts_are_peft_s_for_stacked_parameters(tmp_path):
    """On stacks of that name, in a network whose other names are the published ones."""
    from peft import PeftModel

    save_adapter(adapted("experts", targets=()), tmp_path / "a", "base")
    ours = adapted("experts", targets=())
    layers = nn.ModuleList(
        nn.ModuleDict({"mlp": nn.ModuleDict({"experts": block.mlp.experts})}) for block in plain("experts").blocks
    )
    theirs = nn.ModuleDict({"model": nn.ModuleDict({"layers": layers})})
    PeftModel.from_pretrained(theirs, tmp_path / "a")
    x, chosen = torch.randn(5, 32), torch.arange(10).view(5, 2) % 4
    for block, layer in zip(ours.blocks, layers, strict=True):
        outputs = [each(x, chosen, torch.ones(5, 2)) for each in (block.mlp.experts, layer.mlp.experts)]
        assert type(layer.mlp.experts).__module__.startswith("peft.")
        assert_close(*outputs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["llada_moe", "llada2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_adapter_of_experts_computes_what_its_changes_of_their_weights_compute(monkeypatch, kind, dtype):
    model = tiny_model(kind).to(dtype)
    add_lora(model, LoraParams(r=3, alpha=6, experts=True, targets=()))
    layer = model.blocks[-1].mlp
    factors = {n: p for n, p in layer.named_parameters() if p.requires_grad}
    assert len(factors) == 4
    assert all(".experts." in n for n, p in model.named_parameters() if p.requires_grad)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for factor in factors.values():
            factor.copy_(torch.randn(factor.shape, generator=g) * 0.1)
    x = torch.randn(7, 32, generator=g).to(dtype)
    found = layer(x)[0]
    found_grads = torch.autograd.grad(found.square().mean(), list(factors.values()))

    bare, merged = tiny_model(kind).to(dtype).blocks[-1].mlp, {}
    for table, inner in (("gate_up", "experts.base_layer"), ("down", "experts")):
        a, b = (factors[f"{inner}.lora_{part}.default.weight"] for part in "AB")
        stack = enumerate(bare.get_parameter(f"experts.{table}"))
        merged[f"experts.{table}"] = torch.stack([w + 2 * b[:, e::4] @ a[3 * e : 3 * e + 3] for e, w in stack])
    monkeypatch.setattr(Experts, "forward", Experts.loop)
    wanted = torch.func.functional_call(bare, merged, x)[0]
    assert_close(found, wanted, atol=1e-6, rtol=1e-6)
    wanted_grads = torch.autograd.grad(wanted.square().mean(), list(factors.values()))
    assert_close(found_grads, wanted_grads, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("rank", [1, 8])
def test_experts_are_adapted_in_bf16_whatever_the_rank(rank):
    model = tiny_model("llada_moe")
    add_lora(model, LoraParams(r=rank, experts=True))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(TOKENS).logits.float().square().mean()
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_what_an_adapter_of_experts_changes_is_not_rounded_away_in_bf16():
    """A quarter of the last bit of every weight, whose own products add up to nothing."""
    table = torch.tensor([1.0, -1.0]).repeat(2, 16, 256).bfloat16()
    change = LowRank(torch.full((2, 1, 512), 2.0**-10), torch.ones(2, 16, 1), 1.0)
    ends = torch.tensor([2, 3], dtype=torch.int32)
    y = stack_product(torch.ones(3, 512).bfloat16(), table, ends, change)
    assert torch.equal(y, torch.full((3, 16), 0.5).bfloat16())


@pytest.mark.parametrize("kind", ["llada", "distilbert"])
def test_a_model_without_experts_and_settings_that_experts_do_not_take_are_refused(kind):
    with pytest.raises(ValueError, match=r"lora\.experts: there are no routed experts in \w+; use experts: false"):
        add_lora(tiny_model(kind), LoraParams(experts=True))
    with pytest.raises(ValueError, match=r"experts drop nothing out, and dropout is 0\.1: set dropout: 0"):
        LoraParams(experts=True, dropout=0.1)
    with pytest.raises(ValueError, match="targets is empty: name layers, or all-linear; for routed experts alone"):
        LoraParams(targets=())
    if kind == "llada":
        with pytest.raises(ValueError, match="modules_to_save 'experts' matches no module beside the adapted layers"):
            add_lora(tiny_model("llada2"), LoraParams(experts=True, modules_to_save=("experts",)))


@pytest.mark.parametrize("kind", ["llada", "experts"])
def test_switched_off_it_is_the_model_before(kind):
    model, before = adapted(kind), logits(plain(kind))
    with adapter_off(model):
        assert torch.equal(logits(model), before)
    assert not torch.allclose(logits(model), before)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_keeps_logits_and_published_keys(kind):
    model = adapted(kind)
    before, keys = logits(model), plain(kind).state_dict().keys()
    merge_adapter(model)
    assert_close(logits(model), before, atol=2e-5, rtol=1e-4)
    assert model.state_dict().keys() == keys


def test_merging_is_checked_in_fp32_whatever_autocast_says():
    """As after training with precision bf16, whose autocast is around the model's forward."""
    model = adapted()
    before = logits(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert merge_adapter(model) < 1e-5
    assert_close(logits(model), before, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("scale", [1e-3, 1e-1])
def test_weights_in_bf16_are_rounded_once(scale):
    """From fp32 to the stored dtype; rounding the adapter before it is added costs another half bit."""
    model = adapted()
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16()
        elif "lora_B" in name:
            parameter.data *= scale
    layer = model.get_submodule("model.transformer.blocks.1.q_proj")
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    exact = layer.base_layer.weight.float() + layer.scaling["default"] * (b @ a)
    lost = merge_adapter(model)
    merged = model.get_submodule("model.transformer.blocks.1.q_proj").weight
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, exact.bfloat16())
    assert (lost > 0.3) == (scale == 1e-3)


def test_an_adapter_too_small_for_bf16_is_told(caplog):
    model = adapted().bfloat16()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = parameter.data.float() * 1e-6
    assert merge_adapter(model) == pytest.approx(1.0, abs=1e-3)
    assert "rounded to bfloat16, the merged weights miss 100 % of what the adapter changes" in caplog.text


@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_a_merge_that_is_not_the_adapter_is_refused(monkeypatch, size):
    """Also where the adapter adds so little that the logits hardly move."""
    from peft.tuners.lora.layer import Linear

    model, right = adapted().bfloat16(), Linear.get_delta_weight
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data *= size
    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, name: 1.1 * right(self, name))
    with pytest.raises(
        ValueError, match=r"merging the adapter changes what model\.transformer\.blocks\.0\.\w+ computes"
    ):
        merge_adapter(model)


def test_an_adapter_that_does_not_fit_is_refused(tmp_path):
    save_model(tiny_model(n_kv_heads=2), tmp_path / "base")
    save_adapter(adapted(), tmp_path / "a", tmp_path / "base")
    file = tmp_path / "a" / "adapter_model.safetensors"
    weights = load_file(file)
    some = sorted(weights)[0]
    save_file({k: v for k, v in weights.items() if k != some}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"does not fit LLaDAModelLM in 1 places: model\.transformer\.blocks"):
        load_model(tmp_path / "a")
    save_file({**weights, "base_model.model.model.nowhere.lora_A.weight": torch.ones(1)}, file, {"format": "pt"})
    with pytest.raises(ValueError, match="does not fit LLaDAModelLM"):
        load_model(tmp_path / "a")
    save_file(weights, file, {"format": "pt"})
    save_model(tiny_model(d_model=64), tmp_path / "base")
    with pytest.raises(ValueError, match="does not fit LLaDAModelLM"):
        load_model(tmp_path / "a")


def test_an_adapter_without_its_model(tmp_path):
    save_adapter(adapted(), tmp_path / "a", tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="gone"):
        load_model(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="base_model_name_or_path is missing"):
        load_model(tmp_path / "a")


def trained_a_little(kind, **params):
    """A model whose trained weights have all moved."""
    model = tiny_model(kind)
    add_lora(model, LoraParams(r=2, **params))
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter += torch.linspace(-0.1, 0.1, parameter.numel()).view(parameter.shape)
    return model


WHOLE = [
    ("llada", ("wte", "ln_f", "ff_out"), "transformer.ff_out.weight"),
    ("llada_moe", ("wte", "ff_out"), "lm_head.weight"),
    ("distilbert", ("vocab_projector",), "vocab_projector.weight"),
]


@pytest.mark.parametrize(("kind", "modules", "stored"), WHOLE)
@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_modules_and_biases_train_are_stored_and_merged_with_the_adapter(tmp_path, kind, modules, stored, bias):
    if bias != "none" and kind != "distilbert":
        with pytest.raises(ValueError, match=r"there are no such biases in LLaDA.*; use bias: none"):
            trained_a_little(kind, bias=bias)
        return
    save_model(tiny_model(kind), tmp_path / "base")
    model, plain = trained_a_little(kind, modules_to_save=modules, bias=bias), logits(tiny_model(kind))
    with adapter_off(model):
        assert torch.equal(logits(model), plain) == (bias == "none")
    save_adapter(model, tmp_path / "a", "../base")
    names = {name.removeprefix("base_model.model.") for name in load_file(tmp_path / "a/adapter_model.safetensors")}
    assert any(name.endswith(stored) for name in names)
    assert any(name.endswith("base_layer.bias") for name in names) == (bias != "none")
    assert any(name.endswith("layer_norm.bias") for name in names) == (bias == "all")
    for merge in (False, True):
        found = load_model(tmp_path / "a", merge=merge)
        assert_close(logits(found), logits(model), atol=2e-5, rtol=1e-4)
    assert found.state_dict().keys() == tiny_model(kind).state_dict().keys()
    merge_adapter(model)
    assert all(torch.equal(found.state_dict()[name], weight) for name, weight in model.state_dict().items())


def test_a_name_outside_the_blocks_is_not_that_inside():
    """`ff_out` is a layer of every block, which is adapted, and the head, which trains whole."""
    model = trained_a_little("llada", modules_to_save=("ff_out",))
    whole = [name for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name]
    assert whole == ["model.transformer.ff_out.modules_to_save.default.weight"]
    with pytest.raises(ValueError, match=r"modules_to_save 'lm_head' matches no module .* they are: .*wte"):
        trained_a_little("llada", modules_to_save=("lm_head",))


def test_attention_is_computed_as_asked_where_there_is_a_choice(tmp_path):
    save_model(tiny_model("distilbert"), tmp_path)
    eager, sdpa = (load_model(tmp_path, attn_implementation=name) for name in ("eager", "sdpa"))
    assert (eager.config._attn_implementation, sdpa.config._attn_implementation) == ("eager", "sdpa")
    assert_close(logits(eager), logits(sdpa), atol=2e-5, rtol=1e-4)
    tiny_model().choose_attention("sdpa")
    with pytest.raises(
        ValueError, match=r"'eager' is none of LLaDAModelLM's: .* takes FlashAttention by itself; use sdpa"
    ):
        tiny_model().choose_attention("eager")
    with pytest.raises(ValueError, match="attn_implementation 'nonsense' is none of DistilBertForMaskedLM's"):
        eager.choose_attention("nonsense")


def test_without_peft_its_extra_is_named(monkeypatch):
    monkeypatch.setattr(settings, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^an adapter needs the package peft: pip install 'lladaflow\[train\]'$"):
        add_lora(tiny_model(), LoraParams())
