"""Every backbone and adapters in every objective; packed documents, random lengths, and what the divisor must be."""

import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset

from llada_core.data.batches import Batch
from llada_core.data.formats import schema_of
from llada_core.data.params import SFTData
from llada_core.data.rows import RowFile
from llada_core.modeling import load_model, save_model
from llada_core.modeling.families import LoraParams
from llada_core.sampling.params import SamplingParams
from llada_core.training.objectives import DiffusionObjective
from llada_core.training.params import GRPOParams, PreferenceParams, PretrainParams, SFTParams
from llada_core.training.progress import read_metrics
from llada_core.training.train import RunPaths, train
from tests.tiny import tiny_model, tiny_pair
from tests.training.data import write_data
from tests.training.test_grpo import write_prompts
from tests.training.test_preference import write_pairs

COMMON = {"max_steps": 3, "learning_rate": 1e-3, "log_every": 1, "samples": 1, "save_every": 100}
STAGES = {
    "pretrain": PretrainParams(**COMMON, batch_size=4, random_length_ratio=0.5),
    "sft": SFTParams(**COMMON, batch_size=4, eos_padding=2),
    "grpo": GRPOParams(
        **COMMON, prompts=2, generations=2, beta=0.04, validation_rows=2, keep_best=False, reward="tests.training.test_grpo.likes_low_ids",
        sampling=SamplingParams(max_new_tokens=4, block_length=4, steps=2, temperature=1.0),
    ),
    "preference": PreferenceParams(**COMMON, batch_size=2, mask_samples=2, validation_rows=2),
}  # fmt: skip


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return write_pairs(write_prompts(write_data(tmp_path_factory.mktemp("data"))))


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.tensor([[0, 10, 2, 12, 2, 14]])).logits


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", ["llada_moe", "distilbert", "modernbert"])
def test_every_backbone_in_every_objective(data, tmp_path, stage, kind):
    model, tokenizer = tiny_pair(kind)
    before = logits(model)
    train(STAGES[stage], model, tokenizer, RunPaths(data, tmp_path, tmp_path / "model"), seed=1)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert all(torch.tensor(line["loss"]).isfinite() for line in lines if "loss" in line)
    assert ("router_balance" in lines[1]) == (kind == "llada_moe" and stage in ("pretrain", "sft"))
    after = logits(load_model(tmp_path / "model"))
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, logits(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("merge", [True, False])
def test_adapters_in_every_objective(data, tmp_path, stage, merge):
    model, tokenizer = tiny_pair()
    save_model(model, tmp_path / "base", tokenizer)
    before = {name: p.clone() for name, p in model.named_parameters()}
    params = STAGES[stage].model_copy(update={"lora": LoraParams(r=4, merge=merge)})
    place = RunPaths(data, tmp_path, tmp_path / "model", base=str(tmp_path / "base"))
    train(params, model, tokenizer, place, seed=1)
    frozen = {name.replace(".base_layer", ""): p for name, p in model.named_parameters() if "lora_" not in name}
    changed = {name for name, p in before.items() if not torch.equal(p, frozen[name])}
    assert (len(changed) == 14) if merge else not changed
    torch.testing.assert_close(logits(load_model(tmp_path / "model")), logits(model), atol=1e-5, rtol=1e-5)


def test_a_resumed_adapter_run_is_exact(data, tmp_path):
    def run(folder, follow=None):
        model, tokenizer = tiny_pair()
        params = STAGES["sft"].model_copy(update={"lora": LoraParams(r=4, dropout=0.1), "max_steps": 6})
        receipt = train(params, model, tokenizer, RunPaths(data, folder, folder / "model"), seed=1, follow=follow)
        return receipt, model

    def stop(line):
        if line["step"] == 3:
            (tmp_path / "cut" / "STOP").touch()

    _, whole = run(tmp_path / "whole")
    assert run(tmp_path / "cut", stop)[0].steps == 3
    _, cut = run(tmp_path / "cut")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), cut.parameters(), strict=True))


def loss(model, params, tokens, maskable, documents=None):
    objective = DiffusionObjective(model, None, None, params, seed=0)
    batch = Batch(tokens, maskable, None, documents, torch.arange(len(tokens)))
    uniforms = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0))
    return objective.noisy_loss(model, batch, torch.full((len(tokens),), 0.5), uniforms).sum


def test_a_document_does_not_see_its_neighbour():
    model, params = tiny_model(), PretrainParams(max_steps=1, document_mask=True)
    tokens = torch.randint(0, 110, (1, 12), generator=torch.Generator().manual_seed(0))
    documents = torch.tensor([[0] * 5 + [1] * 7])
    first = torch.arange(12)[None] < 5
    found = loss(model, params, tokens, first, documents)
    other = torch.where(first, tokens, (tokens + 1) % 110)
    torch.testing.assert_close(loss(model, params, other, first, documents), found)
    assert not torch.isclose(loss(model, params, other, first), loss(model, params, tokens, first))


@pytest.mark.parametrize("kind", ["llada", "distilbert"])
def test_documents_in_one_row_cost_what_they_cost_alone(kind):
    """RoPE is relative, so a document's place in its row does not matter; learned positions are absolute."""
    model, params = tiny_model(kind), PretrainParams(max_steps=1, document_mask=True)
    tokens = torch.randint(0, 110, (1, 12), generator=torch.Generator().manual_seed(0))
    documents, everything = torch.tensor([[0] * 5 + [1] * 7]), torch.ones(1, 12, dtype=torch.bool)
    packed = [loss(model, params, tokens, everything & (documents == d), documents) for d in (0, 1)]
    uniforms = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0))
    objective = DiffusionObjective(model, None, None, params, seed=0)
    for d, span in ((0, slice(0, 5)), (1, slice(5, 12))):
        alone = Batch(tokens[:, span], everything[:, span], None, None, torch.arange(1))
        cost = objective.noisy_loss(model, alone, torch.full((1,), 0.5), uniforms[:, span]).sum
        close = torch.isclose(cost, packed[d], rtol=1e-4)
        assert close if kind == "llada" or d == 0 else not close


def test_data_without_rows_is_told(data, tmp_path):
    model, tokenizer = tiny_pair()
    (tmp_path / "sft").mkdir()
    RowFile(tmp_path / "sft" / "train", SFTData(), schema_of("sft", SFTData(), 300)).close()
    with pytest.raises(ValueError, match=r"the training data has no rows; see data/card\.json"):
        train(STAGES["sft"], model, tokenizer, RunPaths(tmp_path, tmp_path / "run"), seed=1)
    with pytest.raises(FileNotFoundError, match=r"pretrain/train: no prepared data; run `python -m tasks\.prepare`"):
        train(STAGES["pretrain"], model, tokenizer, RunPaths(tmp_path, tmp_path / "other"), seed=1)


def test_rows_longer_than_the_model_takes_are_refused(data, tmp_path):
    model, tokenizer = tiny_pair("distilbert")
    Dataset.from_dict({"input_ids": [[7] * 200]}).save_to_disk(tmp_path / "pretrain" / "train")
    with pytest.raises(ValueError, match="a row has 200 tokens, the model takes 128; lower the data's `length`"):
        train(STAGES["pretrain"], model, tokenizer, RunPaths(tmp_path, tmp_path / "run"), seed=1)


@pytest.mark.parametrize("kind", ["llada", "distilbert"])
def test_compiling_and_recomputing_activations_change_no_number(data, tmp_path, kind, monkeypatch):
    compiled, recomputed = [], []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(type(self).__name__))
    real = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr("transformers.modeling_utils.checkpoint", lambda *a, **k: recomputed.append(1) or real(*a, **k))
    weights = {}
    for fast in (False, True):
        model, tokenizer = tiny_pair(kind)
        params = STAGES["sft"].model_copy(update={"compile": fast, "activation_checkpointing": fast})
        train(params, model, tokenizer, RunPaths(data, tmp_path / str(fast)), seed=1)
        weights[fast] = model.state_dict()
    assert len(compiled) == 2
    assert recomputed
    assert all(torch.allclose(weights[True][name], w, atol=1e-6) for name, w in weights[False].items())


def test_what_trains_in_fp32_beside_frozen_bf16_asks_for_autocast(data, tmp_path):
    lora = LoraParams(r=2, modules_to_save=("ff_out",))

    def trained(precision):
        model, tokenizer = tiny_pair()
        model.bfloat16()
        params = STAGES["sft"].model_copy(update={"lora": lora, "precision": precision, "max_steps": 1})
        AcceleratorState._reset_state()  # of another precision, as a process of its own would have it
        train(params, model, tokenizer, RunPaths(data, tmp_path, tmp_path / "model"), seed=1)

    with pytest.raises(ValueError, match="set precision: bf16"):
        trained("fp32")
    trained("bf16")
    AcceleratorState._reset_state()
    assert {weight.dtype for weight in load_model(tmp_path / "model").state_dict().values()} == {torch.bfloat16}


@pytest.mark.parametrize("stage", ["grpo", "preference"])
def test_biases_that_train_leave_no_reference(stage):
    with pytest.raises(ValueError, match=r"lora.bias all trains biases in place, .* use bias: none or beta: 0"):
        type(STAGES[stage])(max_steps=1, beta=0.1, lora=LoraParams(bias="all"))


def test_double_quantisation_is_of_four_bits():
    with pytest.raises(ValueError, match="set four_bit: true"):
        LoraParams(double_quant=True)
