"""Low-rank adapters: which layers, stored and loaded in peft's format, switched off, merged."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from llada_core.config.training import LoraParams
from llada_core.modeling import add_lora, load_model, merge_adapter, save_model
from llada_core.modeling.adapters import adapter_off, linear_layers, save_adapter
from tests.tiny import TINY_BACKBONES, tiny_model

KINDS = ["llada", "llada_moe", *TINY_BACKBONES]
TOKENS = torch.randint(0, 120, (2, 9), generator=torch.Generator().manual_seed(0))


def adapted(kind="llada", seed=0, **params):
    """A model whose adapter does something, as after training."""
    model = tiny_model(kind, **({"n_kv_heads": 2} if kind == "llada" else {}))
    add_lora(model, LoraParams(r=4, alpha=8, **params))
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
    model = tiny_model(kind)
    before = logits(model)
    add_lora(model, LoraParams(r=4))
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
    base = tiny_model(kind, **({"n_kv_heads": 2} if kind == "llada" else {}))
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


def test_stored_adapters_open_with_peft_and_published_names(tmp_path):
    from peft import PeftModel

    model = adapted()
    save_adapter(model, tmp_path / "a", "base")
    opened = PeftModel.from_pretrained(tiny_model(n_kv_heads=2), tmp_path / "a")
    assert_close(opened(TOKENS).logits.detach(), logits(model), atol=2e-5, rtol=1e-4)
    save_adapter(adapted("llada_moe"), tmp_path / "moe", "base")
    names = load_file(tmp_path / "moe" / "adapter_model.safetensors").keys()
    assert "base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight" in names


def test_switched_off_it_is_the_model_before():
    model, before = adapted(), logits(tiny_model(n_kv_heads=2))
    with adapter_off(model):
        assert torch.equal(logits(model), before)
    assert not torch.allclose(logits(model), before)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_keeps_logits_and_published_keys(kind):
    model = adapted(kind)
    before, keys = logits(model), tiny_model(kind).state_dict().keys()
    merge_adapter(model)
    assert_close(logits(model), before, atol=2e-5, rtol=1e-4)
    assert model.state_dict().keys() == keys


def test_a_merge_that_moves_the_logits_is_refused(monkeypatch):
    from peft.tuners.lora.layer import Linear

    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, name: torch.ones_like(self.weight))
    with pytest.raises(ArithmeticError, match="moved the logits"):
        merge_adapter(adapted())


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
