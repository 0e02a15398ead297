"""A family of models is a row of one table and its network: a toy one is added here, and nothing else is told of it."""

import ast
import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from llada_core.modeling import LLaDAConfig, LLaDAModelLM, add_lora, load_config, load_model, new_model, save_model
from llada_core.modeling.adapters import load_adapter, save_adapter
from llada_core.modeling.configuration import register_names
from llada_core.modeling.families import FAMILIES, LLADA, LLADA2, Family, LoraParams, ModelParams, family_of
from llada_core.training.progress import active_parameters
from llada_core.training.train import block_classes
from tests.tiny import SPECIAL, tiny_params

TOKENS = torch.arange(24).view(2, 12)


class ToyConfig(LLaDAConfig):
    """As LLaDA's, under a name of its own."""

    model_type = "toy"

    def __init__(self, **values):  # transformers would replace an inherited one by a dataclass's
        super().__init__(**values)


class ToyLM(LLaDAModelLM):
    """LLaDA's network, which is published under other names."""

    kind = "toy"
    config_class = ToyConfig


def _fresh(params: ModelParams, vocab_rows: int) -> dict[str, object]:
    return FAMILIES["llada"].fresh(params, vocab_rows) | {"model_type": "toy", "architectures": ["ToyLM"]}


TOY = Family(
    kind="toy",
    config=f"{__name__}.ToyConfig",
    network=f"{__name__}.ToyLM",
    claims=lambda config: config.get("model_type") == "toy",
    fresh=_fresh,
    renamed={"body.embedding": "model.transformer.wte", "body.layers": "model.transformer.blocks", "query": "q_proj"},
    needs={"flavour": "vanilla"},
)


@pytest.fixture
def toy(monkeypatch):
    """A fresh toy model, while its row is in the table."""
    monkeypatch.setitem(FAMILIES, "toy", TOY)
    register_names(TOY)  # what importing the package does with every row
    return new_model(tiny_params("toy", backbone={"flavour": "vanilla"}), 136, SPECIAL).eval()


def names_in(file):
    with safe_open(file, "pt") as stored:
        return set(stored.keys())


def test_it_is_made_saved_under_its_published_names_and_loaded(toy, tmp_path):
    save_model(toy, tmp_path / "m")
    assert json.loads((tmp_path / "m" / "config.json").read_text())["model_type"] == "toy"
    names = names_in(tmp_path / "m" / "model.safetensors")
    assert {"body.embedding.weight", "body.layers.0.query.weight"} < names
    assert not any("wte" in name or "q_proj" in name for name in names)
    assert type(load_config(tmp_path / "m")) is ToyConfig
    again = load_model(tmp_path / "m")
    assert (type(again), again.family, again.special_tokens) == (ToyLM, TOY, SPECIAL)
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, toy(TOKENS).logits)
    assert load_model(tmp_path / "m", device="meta").family is TOY


def test_its_adapter_is_stored_under_its_published_names(toy, tmp_path):
    add_lora(toy, LoraParams(r=2, alpha=4, targets=("q_proj",)))
    save_adapter(toy, tmp_path / "a", "base")
    names = names_in(tmp_path / "a" / "adapter_model.safetensors")
    assert "base_model.model.body.layers.0.query.lora_A.weight" in names
    other = new_model(tiny_params("toy", backbone={"flavour": "vanilla"}), 136, SPECIAL)
    load_adapter(other, tmp_path / "a")
    with torch.no_grad():
        assert torch.equal(other.eval()(TOKENS).logits, toy.eval()(TOKENS).logits)


def test_plans_and_training_ask_the_network_for_its_shape(toy):
    assert (len(toy.blocks), toy.widths, toy.expert_share) == (2, (32, 64), 1.0)
    assert block_classes(toy) == ("LLaDABlock",)
    assert active_parameters(toy) == sum(p.numel() for n, p in toy.named_parameters() if "wte" not in n)


def test_what_it_needs_and_families_that_there_are_not_are_told_in_one_line(toy):
    with pytest.raises(ValueError, match=r"kind toy needs backbone\.flavour, for example vanilla"):
        tiny_params("toy")
    with pytest.raises(ValueError, match=r"kind masked_lm needs backbone\.model_type, for example distilbert"):
        tiny_params("masked_lm")
    with pytest.raises(ValueError, match=r"kind 'lada' is no family of models; did you mean 'llada'\?"):
        tiny_params("lada")


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (LLADA.config, "llada"),
        ({"model_type": "llada", "num_experts": 8}, "llada_moe"),
        ({"model_type": "llada", "architectures": ["LLaDAMoEModelLM"]}, "llada_moe"),
        (LLADA2.config, "llada2"),
        ({"model_type": "llada2_moe_veomni"}, "llada2"),
        ({"model_type": "toy"}, "toy"),
        ({"model_type": "bert"}, "masked_lm"),
        ({}, "masked_lm"),
    ],
)
def test_a_config_json_tells_its_family(config, kind, toy):
    assert family_of(config).kind == kind


def test_a_layout_that_is_refused_is_told_in_one_line_alone(tmp_path):
    """transformers would warn first that the file is of another type."""
    (tmp_path / "config.json").write_text(json.dumps({**LLADA2.config, "model_type": "llada2_moe_veomni"}))
    records, handler = [], logging.Handler()
    handler.emit = records.append
    logging.getLogger("transformers").addHandler(handler)
    try:
        with pytest.raises(ValueError, match=r"dFactory's merged layout.*moe_convertor"):
            load_config(tmp_path)
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert not [record.getMessage() for record in records]


def test_nobody_else_asks_which_family_a_network_or_a_configuration_is_of():
    """What differs is asked of the table or of the model itself, so nothing but their own files names these classes."""
    root, classes = Path(__file__).parents[2], {f.network.rpartition(".")[2] for f in FAMILIES.values()}
    classes |= {"LLaDAConfig", "LLaDAMoEConfig", "LLaDA2Config", "LLaDABlocksConfig"}
    home = root / "llada_core" / "modeling"
    own = {home / f"{name}.py" for name in ("__init__", "configuration", "families", "masked_lm", "network")}
    found = []
    for room in ("llada_core", "tasks", "flows", "app", "cli"):
        for file in sorted({*(root / room).rglob("*.py")} - own):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Name) and node.id in classes:
                    found.append(f"{file.relative_to(root)}:{node.lineno} {node.id}")
                if isinstance(node, ast.Compare) and any(
                    isinstance(side, ast.Constant) and side.value in FAMILIES for side in node.comparators
                ):
                    found.append(f"{file.relative_to(root)}:{node.lineno} compares a kind")
    assert not found
