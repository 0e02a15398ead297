"""Models from nothing: seeded, rightly scaled, in the published layout."""

import json
import math

import pytest
import torch

from llada_core.modeling import load_model, new_model, save_model
from llada_core.modeling.families import LLADA, LLADA_MOE
from llada_core.tokenizer import SpecialTokens
from tests.tiny import SPECIAL, TINY_BACKBONES, tiny_model, tiny_params

TOKENS = torch.randint(0, 120, (2, 6))


@pytest.mark.parametrize("kind", ["llada", "llada_moe", *TINY_BACKBONES])
def test_the_seed_decides_and_torchs_own_stream_is_left_alone(kind):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = tiny_model(kind, seed=1).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    again, other = tiny_model(kind, seed=1).state_dict(), tiny_model(kind, seed=2).state_dict()
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)


def test_initial_scales():
    """Mitchell: 1/sqrt(d_in) cut at three sigma; outputs into the residual smaller with depth."""
    model = tiny_model(d_model=128, n_layers=4, mlp_hidden_size=256)
    blocks = model.model.transformer.blocks
    for layer, block in enumerate(blocks):
        assert block.q_proj.weight.std().item() == pytest.approx(1 / math.sqrt(128), rel=0.05)
        shrink = math.sqrt(2 * (layer + 1))
        assert block.attn_out.weight.std().item() == pytest.approx(1 / math.sqrt(128) / shrink, rel=0.05)
        assert block.ff_out.weight.std().item() == pytest.approx(1 / math.sqrt(256) / shrink, rel=0.05)
        assert block.q_proj.weight.abs().max() <= 3 / math.sqrt(128)
    assert model.model.transformer.wte.weight.std().item() == pytest.approx(1 / math.sqrt(128), rel=0.05)
    sparse = tiny_model("llada_moe", d_model=64).model.transformer.blocks[0]
    assert sparse.mlp.experts.gate_up.std().item() == pytest.approx(1 / 8, rel=0.05)
    assert torch.equal(sparse.attn_norm.weight, torch.ones(64))


@pytest.mark.parametrize("kind", ["llada", "llada_moe", *TINY_BACKBONES])
def test_what_is_made_is_saved_and_loaded_by_itself(tmp_path, kind):
    model = tiny_model(kind)
    save_model(model, tmp_path / "m")
    again = load_model(tmp_path / "m")
    assert again.special_tokens == SPECIAL
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize(("kind", "family"), [("llada", LLADA), ("llada_moe", LLADA_MOE)])
def test_config_json_of_a_new_model_has_every_published_key(tmp_path, kind, family):
    save_model(tiny_model(kind), tmp_path / "m")
    written = json.loads((tmp_path / "m" / "config.json").read_text())
    assert family.config.keys() <= written.keys()
    assert written["architectures"] == family.config["architectures"]
    assert written["vocab_size"] == 136


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["llada", "llada_moe"])
def test_tied_and_untied(tmp_path, kind, tied):
    model = tiny_model(kind, weight_tying=tied, qk_norm=True, n_kv_heads=2)
    save_model(model, tmp_path / "m")
    again = load_model(tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    assert (again.get_output_embeddings() is None) == tied


def test_published_sizes_are_described_exactly():
    """Without memory: 8.02 and 7.36 billion parameters."""
    from llada_core.modeling import LLaDAConfig, LLaDAModelLM, LLaDAMoEConfig, LLaDAMoEModelLM

    counts = []
    for model, config, family in ((LLaDAModelLM, LLaDAConfig, LLADA), (LLaDAMoEModelLM, LLaDAMoEConfig, LLADA_MOE)):
        with torch.device("meta"):
            counts.append(sum(p.numel() for p in model(config(**family.config)).parameters()))
    assert counts == [8_015_581_184, 7_356_880_896]


def test_special_tokens_must_fit():
    with pytest.raises(ValueError, match="eos_id 900 is outside the vocabulary"):
        new_model(tiny_params(), 136, SpecialTokens(1, 900, 0))
