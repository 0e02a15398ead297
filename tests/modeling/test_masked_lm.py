"""Any transformers masked-LM behind the mask predictor's call, as transformers itself would compute it."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from llada_core.modeling import load_model, new_model, save_model
from llada_core.modeling.families import ModelParams
from tests.tiny import SPECIAL, TINY_BACKBONES, tiny_model, tiny_tokenizer

TOKENS = torch.randint(0, 119, (2, 9), generator=torch.Generator().manual_seed(0))
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
OTHERS = {
    "albert": {**SIZES, "embedding_size": 16, "max_position_embeddings": 64},
    "electra": {**SIZES, "embedding_size": 32, "max_position_embeddings": 64},
    "roberta": {**SIZES, "max_position_embeddings": 64 + 121},
}


def backbone(kind):
    if kind in TINY_BACKBONES:
        return tiny_model(kind)
    return new_model(ModelParams(kind="masked_lm", backbone={"model_type": kind, **OTHERS[kind]}), 136, SPECIAL).eval()


@pytest.mark.parametrize("kind", [*TINY_BACKBONES, *OTHERS])
def test_logits_are_those_of_transformers(kind):
    model = backbone(kind)
    mask = torch.ones_like(TOKENS)
    mask[0, -2:] = 0
    asked = torch.tensor([0, 4, 10])
    with torch.no_grad():
        theirs = model.backbone(input_ids=TOKENS, attention_mask=mask).logits
        assert_close(model(TOKENS, mask).logits, theirs, atol=1e-5, rtol=1e-5)
        part = model(TOKENS, mask, positions=asked).logits
    assert_close(part, theirs.flatten(0, 1)[asked], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [*TINY_BACKBONES, *OTHERS])
def test_its_longest_sequence_fits(kind):
    model = backbone(kind)
    with torch.no_grad():
        assert model(torch.full((1, model.max_length), 5)).logits.isfinite().all()
    assert model.max_length == {"albert": 64, "electra": 64, "roberta": 64}.get(kind, 128)


def test_other_heads_in_the_file_are_left_but_a_missing_weight_is_an_error(tmp_path):
    """bert-base-uncased also stores a next-sentence head."""
    save_model(tiny_model("bert"), tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    weights = load_file(file)
    save_file({**weights, "cls.seq_relationship.weight": torch.ones(2, 32)}, file, {"format": "pt"})
    assert load_model(tmp_path / "m").special_tokens == SPECIAL
    name = next(k for k in weights if "query.weight" in k)
    save_file({k: v for k, v in weights.items() if k != name}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"missing or of another shape, such as .*query\.weight"):
        load_model(tmp_path / "m")
    save_file({**weights, name: torch.ones(3, 3)}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"missing or of another shape, such as .*query\.weight"):
        load_model(tmp_path / "m")


def test_special_tokens_of_a_published_backbone_come_from_its_tokenizer(tmp_path):
    tokenizer = tiny_tokenizer()
    save_model(tiny_model("bert", vocab_size=300), tmp_path / "m", tokenizer)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    plain = {k: v for k, v in config.items() if not k.endswith("_token_id")}
    (tmp_path / "m" / "config.json").write_text(json.dumps(plain))
    assert load_model(tmp_path / "m").special_tokens == tokenizer.special
