"""Training by blocks: the losses and gradients of dFactory and dllm (tests/golden), and the sampler's view as an oracle."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from llada_core.data.batches import Batch, BatchSampler, RowBatches
from llada_core.modeling import load_model, save_model
from llada_core.modeling.attention import BlockCausal
from llada_core.modeling.families import LoraParams
from llada_core.modeling.predictor import projected_certainty
from llada_core.settings import ConfigError, NoiseParams
from llada_core.training.objectives import DiffusionObjective, Hidden
from llada_core.training.params import BlockParams, BlockPhase, GRPOParams, PreferenceParams, PretrainParams, SFTParams
from llada_core.training.preference import PairBatch, Preference
from llada_core.training.progress import read_metrics
from llada_core.training.train import RunPaths, by_blocks, train
from tests.reference import BLOCKS, GOLDEN, arrays
from tests.tiny import tiny_model, tiny_pair
from tests.training.data import write_data
from tests.training.test_ranks import launch, same, scenario

GOLD = json.loads((GOLDEN / "cases_llada2_loss.json").read_text())
DFACTORY = {"normalise": "masked", "noise": NoiseParams(epsilon=0.3, highest=0.8, weight="uniform")}


def gold(name):
    return arrays("loss_llada2")[name]


def llada2(dtype=torch.float32):
    return load_model(GOLDEN / "llada2_tiny", special_tokens=BLOCKS, dtype=dtype)


def published():
    """dFactory's batch: everything behind the prompt may be hidden."""
    ids = gold("input_ids")
    return Batch(ids, torch.arange(ids.shape[1]) >= gold("prompt_lengths")[:, None], None, None, torch.arange(len(ids)))


def mean_loss(model, rows, t, uniforms, **settings):
    params = SFTParams(max_steps=1, **settings)
    found = DiffusionObjective(model, None, None, params, seed=0).noisy_loss(model, rows, t, uniforms)
    return found.sum / found.parts["loss"][1]


def dfactory(model, length, **settings):
    blocks = BlockParams(length=length)
    return mean_loss(model, published(), gold("mask_ratio"), gold("u_mask"), blocks=blocks, **{**DFACTORY, **settings})


@pytest.mark.parametrize("name", ["bd", "bd_block1", "bd_block3", "bd_block24", "full_attention_noisy"])
def test_the_losses_of_dfactory(name):
    length = {"bd": int(gold("block_length")), "full_attention_noisy": 24}.get(name) or int(name[8:])
    assert float(dfactory(llada2(), length).detach()) == pytest.approx(float(gold(f"{name}_loss")), rel=1e-4)


@pytest.mark.parametrize("case", GOLD["bd3lm_losses"], ids=lambda c: "-".join(str(v) for v in list(c.values())[:3]))
def test_the_losses_of_dllm(case):
    ids, maskable = gold("input_ids"), gold("bd3lm_labels") != -100
    noise = NoiseParams(
        schedule=case["scheduler"], weight="uniform" if case["loss_weight_type"] == "uniform" else "elbo"
    )
    loss = mean_loss(
        llada2(), Batch(ids, maskable, None, None, torch.arange(4)), 1e-3 + (1 - 1e-3) * gold("bd3lm_u_t"), gold("bd3lm_u_mask"),
        blocks=BlockParams(length=int(gold("block_length"))), normalise=case["loss_norm_type"], noise=noise,
    )  # fmt: skip
    assert float(loss.detach()) == pytest.approx(case["loss"], rel=1e-4)


def gradients(model):
    """The norm of the gradient of every published weight."""
    norms = {}
    for name, parameter in model.named_parameters():
        stem, dot, stack = model.family.published_name(name).partition(".experts.")
        parts = {} if dot else {stem: parameter.grad}
        for expert in range(len(parameter) if dot else 0):
            own = parameter.grad[expert]
            pieces = {"down": own} if stack == "down" else dict(zip(("gate", "up"), own.chunk(2), strict=True))
            parts |= {f"{stem}.experts.{expert}.{part}_proj.weight": piece for part, piece in pieces.items()}
        norms |= {key: float(gradient.norm()) for key, gradient in parts.items()}
    return norms


def test_the_gradient_of_every_published_weight():
    """The reference's embedding gives the padding row none, ours does as everywhere."""
    model, wanted = llada2(), GOLD["grad_l2_norms"]["bd"]
    dfactory(model, int(gold("block_length"))).backward()
    found = gradients(model)
    assert found["model.word_embeddings.weight"] == pytest.approx(
        GOLD["embedding_grad_l2_norm_without_padding_idx"], rel=1e-3
    )
    assert found == pytest.approx(
        wanted | {"model.word_embeddings.weight": found["model.word_embeddings.weight"]}, rel=1e-3
    )
    bias = model.blocks[1].mlp.expert_bias
    assert not isinstance(bias, torch.nn.Parameter)


@pytest.mark.parametrize(("length", "name"), [(1, "bd_block1"), (3, "bd_block3"), (24, "bd_block24")])
def test_the_gradient_in_all(length, name):
    model = llada2()
    dfactory(model, length).backward()
    model.get_input_embeddings().weight.grad[BLOCKS.pad_id] = 0
    total = math.hypot(*gradients(model).values())
    assert total == pytest.approx(float(gold(f"{name}_grad_norm_total")), rel=1e-3)


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_the_confidence_loss_of_dparallel(beta):
    model, rows = llada2(), published()
    params = SFTParams(
        max_steps=1, batch_size=4, confidence=beta, blocks=BlockParams(length=int(gold("block_length"))), **DFACTORY
    )
    objective = DiffusionObjective(model, None, None, params, seed=0)
    objective.routed = False
    found = objective.noisy_loss(model, rows, gold("mask_ratio"), gold("u_mask"))
    right = found.parts["confidence"]
    assert float(right[0] / right[1]) == pytest.approx(float(gold("cap_confidence_loss")), rel=1e-4)
    loss = found.sum / found.parts["loss"][1] + found.extra
    assert float(loss.detach()) == pytest.approx(float(gold(f"cap_beta{beta}_loss")), rel=1e-4)
    loss.backward()
    if beta == 2.0:
        wanted, norms = GOLD["grad_l2_norms"]["cap_beta2.0"], gradients(model)
        del norms["model.word_embeddings.weight"]
        assert norms == pytest.approx({name: wanted[name] for name in norms}, rel=1e-3)
    model.get_input_embeddings().weight.grad[BLOCKS.pad_id] = 0
    assert math.hypot(*gradients(model).values()) == pytest.approx(
        float(gold(f"cap_beta{beta}_grad_norm_total")), rel=1e-3
    )


@pytest.mark.parametrize(("labels", "name"), [("half_right", "half_right"), (None, "none_right")])
def test_certainty_counts_where_the_prediction_is_right(labels, name):
    logits, masked = gold("bd_noisy_logits"), gold("labels") != -100
    wanted = float(gold(f"cap_confidence_loss_{name}"))
    targets = logits.argmin(-1) if labels is None else gold(f"cap_labels_{labels}")
    _, (entropy, right) = projected_certainty(logits[masked], lambda x: x, 160, targets[masked])
    assert float(entropy[right].sum() / right.sum().clamp(min=1)) == pytest.approx(wanted, rel=1e-4)


def sampled_view(model, tokens, masked, length):
    """-log p of each hidden token as a sampler meets it: its block noisy, the blocks before it finished; (B, L)."""
    found, width = torch.zeros(tokens.shape, dtype=torch.float64), tokens.shape[1]
    for first in range(0, width, length):
        upto = min(first + length, width)
        shown = tokens[:, :upto].clone()
        shown[:, first:upto][masked[:, first:upto]] = model.special_tokens.mask_id
        logits = model(shown, block_causal=BlockCausal(length)).logits[:, first:upto]
        nll = -logits.double().log_softmax(-1).gather(-1, tokens[:, first:upto, None])[..., 0]
        found[:, first:upto] = torch.where(masked[:, first:upto], nll, 0.0)
    return found


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llada2", "llada_blocks"])
@pytest.mark.parametrize("length", [1, 3, 8, 20])
def test_what_is_trained_is_what_a_sampler_asks(kind, length):
    model = tiny_model(kind).double()
    tokens = torch.randint(0, 110, (3, 17), generator=torch.Generator().manual_seed(length))
    uniforms = torch.rand(3, 17, generator=torch.Generator().manual_seed(1))
    rows = Batch(tokens, torch.arange(17).expand(3, -1) >= 4, None, None, torch.arange(3))
    params = SFTParams(
        max_steps=1, blocks=BlockParams(length=length), normalise="token", noise=NoiseParams(weight="uniform")
    )
    found = DiffusionObjective(model, None, None, params, seed=0).noisy_loss(
        model, rows, torch.full((3,), 0.6), uniforms
    )
    masked = rows.maskable & (uniforms < 0.6)
    assert_close(found.sum.double(), sampled_view(model, tokens, masked, length).sum(), atol=1e-5, rtol=1e-6)


@torch.no_grad()
def test_rows_of_unequal_length_cost_together_what_they_cost_alone():
    model = tiny_model("llada2").double()
    tokens = torch.randint(0, 110, (4, 21), generator=torch.Generator().manual_seed(0))
    uniforms, t = torch.rand(4, 21, generator=torch.Generator().manual_seed(1)), torch.tensor([0.3, 0.5, 0.7, 0.9])
    lengths = [21, 16, 9, 5]
    real = torch.arange(21) < torch.tensor(lengths)[:, None]
    params = SFTParams(max_steps=1, blocks=BlockParams(length=4), normalise="batch", router_balance=0, router_z=0)
    objective = DiffusionObjective(model, None, None, params, seed=0)
    together = objective.noisy_loss(model, Batch(tokens, real, real.long(), None, torch.arange(4)), t, uniforms).sum
    alone = 0.0
    for i, n in enumerate(lengths):
        row = Batch(tokens[i : i + 1, :n], real[i : i + 1, :n], None, None, torch.arange(1))
        alone += objective.noisy_loss(model, row, t[i : i + 1], uniforms[i : i + 1, :n]).sum
    assert_close(together, alone, atol=1e-6, rtol=1e-7)


@torch.no_grad()
@pytest.mark.parametrize("length", [4, 64])
def test_documents_of_one_row_do_not_see_each_other(length):
    model = tiny_model("llada2").double()
    params = PretrainParams(
        max_steps=1, document_mask=True, blocks=BlockParams(length=length), router_balance=0, router_z=0
    )
    objective = DiffusionObjective(model, None, None, params, seed=0)
    tokens = torch.randint(0, 110, (1, 16), generator=torch.Generator().manual_seed(0))
    documents, uniforms = (
        torch.tensor([[0] * 8 + [1] * 8]),
        torch.rand(1, 16, generator=torch.Generator().manual_seed(1)),
    )

    def cost(tokens, documents, uniforms):
        rows = Batch(tokens, torch.ones_like(tokens).bool(), None, documents, torch.arange(1))
        return objective.noisy_loss(model, rows, torch.tensor([0.5]), uniforms).sum

    alone = [cost(tokens[:, part], None, uniforms[:, part]) for part in (slice(0, 8), slice(8, 16))]
    # Where a document begins with a block, it costs what it costs alone; RoPE is relative.
    assert_close(cost(tokens, documents, uniforms), sum(alone), atol=1e-4, rtol=1e-5)
    assert not torch.isclose(cost(tokens, None, uniforms), sum(alone), atol=1e-2)


@torch.no_grad()
def test_a_complementary_pair_hides_every_scored_token_once():
    model, rows = tiny_model(), Batch(
        torch.arange(24).view(2, 12), torch.arange(12).expand(2, -1) >= 3, None, None, torch.arange(2)
    )  # fmt: skip
    params = SFTParams(max_steps=1, complementary=True, normalise="masked", noise=NoiseParams(weight="uniform"))
    objective = DiffusionObjective(model, None, None, params, seed=0)
    uniforms = torch.rand(2, 12, generator=torch.Generator().manual_seed(0))
    hidden = objective.hide(rows, torch.tensor([0.3, 0.6]), uniforms, None)
    assert torch.equal(hidden.masked[:2] ^ hidden.masked[2:], rows.maskable)
    assert not (hidden.masked[:2] & hidden.masked[2:]).any()
    assert_close(hidden.times, torch.tensor([0.3, 0.6, 0.7, 0.4]))
    both = objective.loss(model, hidden)
    twice = replace(rows, **{name: getattr(hidden.rows, name)[:2] for name in ("tokens", "maskable")})
    apart = [Hidden(twice, hidden.masked[i : i + 2], hidden.times[i : i + 2], None) for i in (0, 2)]
    assert_close(both.sum, sum(objective.loss(model, one).sum for one in apart))
    assert both.parts["loss"][1] == rows.maskable.sum()


def exact_bound(model, tokens, prompt, length):
    """The bound of log p(answer | prompt) by blocks: over all sets of hidden tokens, their weight integrated over t."""
    n, total = tokens.shape[1] - prompt, 0.0
    for size in range(1, n + 1):
        weight = math.factorial(size - 1) * math.factorial(n - size) / math.factorial(n)
        for chosen in itertools.combinations(range(prompt, prompt + n), size):
            masked = torch.zeros(tokens.shape, dtype=torch.bool)
            masked[0, list(chosen)] = True
            total -= weight * float(sampled_view(model, tokens, masked, length).sum())
    return total


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llada2", "llada_blocks"])
def test_the_block_bound_of_preference_tuning_is_that_of_all_masks(kind):
    model = tiny_model(kind, block_length=2)
    tokens = torch.tensor([[5, 9, 30, 31, 32], [5, 9, 40, 41, 42]])
    params = PreferenceParams(max_steps=1, mask_samples=20000, batch_size=1)
    objective = Preference(model, [0], [], params, seed=0)
    pairs = PairBatch(tokens, (torch.arange(5) >= 2).expand(2, -1), torch.ones_like(tokens), torch.arange(2), 0)
    found = objective.bound(model, pairs, 10)
    wanted = torch.tensor([exact_bound(model, tokens[i : i + 1], 2, 2) for i in range(2)])
    assert_close(found, wanted, atol=0.4, rtol=0.0)  # three standard errors
    whole = torch.tensor([exact_bound(model, tokens[i : i + 1], 2, 8) for i in range(2)])
    assert (wanted - whole).abs().max() > 0.4


def test_a_row_ends_with_its_last_block():
    table = {"input_ids": [[7] * 9, [7] * 4], "maskable": [[0] + [1] * 8, [0, 1, 1, 1]]}

    class Table(dict):
        column_names = property(lambda self: list(self))

        def __getitem__(self, rows):
            return {name: [column[i] for i in rows] for name, column in table.items()}

    order = BatchSampler(2, 2, seed=0)
    batch = RowBatches(Table(table), order, eos_id=1, padding="block", block_length=4).batch(0)
    by_length = {int(row.ne(1).sum()): i for i, row in enumerate(batch.tokens)}
    assert batch.tokens.shape == (2, 12)
    assert batch.attention_mask.sum(1)[[by_length[9], by_length[4]]].tolist() == [12, 4]
    assert batch.maskable.sum(1)[[by_length[9], by_length[4]]].tolist() == [11, 3]


def test_block_lengths_by_step():
    blocks = BlockParams(length=4, phases=(BlockPhase(steps=2, length=1), BlockPhase(steps=3, length=64)))
    assert [blocks.at(step, 4) for step in range(7)] == [1, 1, 64, 64, 64, 4, 4]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


QUICK = {
    "max_steps": 4,
    "batch_size": 4,
    "learning_rate": 1e-3,
    "log_every": 1,
    "save_every": 2,
    "samples": 2,
    "validation_rows": 4,
}


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
@pytest.mark.parametrize("kind", ["llada2", "llada_blocks", "llada"])
def test_it_trains_and_resumes_bit_for_bit(data, tmp_path, kind, stage):
    phases = (BlockPhase(steps=1, length=1), BlockPhase(steps=2, length=32))
    make = {
        "pretrain": lambda: PretrainParams(**QUICK, blocks=BlockParams(length=4, phases=phases), random_length_ratio=0.5),
        "sft": lambda: SFTParams(**QUICK, blocks=BlockParams(length=4, phases=phases), complementary=True, eos_padding="block"),
    }[stage]  # fmt: skip

    def run(folder, follow=None):
        model, tokenizer = tiny_pair(kind)
        return train(make(), model, tokenizer, RunPaths(data, folder, folder / "model"), seed=1, follow=follow)

    def stop(line):
        if line["step"] == 2:
            (tmp_path / "cut" / "STOP").touch()

    assert run(tmp_path / "whole").steps == 4
    assert run(tmp_path / "cut", stop).steps == 2
    run(tmp_path / "cut")
    whole, cut = (load_model(tmp_path / name / "model") for name in ("whole", "cut"))
    assert (whole.kind, whole.block_length) == ({"llada": "llada_blocks"}.get(kind, kind), 4)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), cut.parameters(), strict=True))
    assert {"loss", "validation_loss"} <= {
        key for line in read_metrics(tmp_path / "whole" / "metrics.jsonl") for key in line
    }


@pytest.mark.slow
def test_ranks_are_one_process(data, tmp_path):
    """DDP and FSDP2, whose engine takes a stored buffer for a shard; a dense model becomes one by blocks on the way."""
    changes = {
        "max_steps": 4, "batch_size": 8, "micro_batch_size": 2, "blocks": {"length": 4, "phases": [{"steps": 1, "length": 1}]},
        "complementary": True, "eos_padding": "block", "normalise": "masked", "validate_every": 2, "save_every": 2,
    }  # fmt: skip
    kinds = {"llada2": "fsdp", "llada": "ddp"}
    scenarios = [
        scenario(data, tmp_path / model, model=model, distribution={"kind": kind}, **changes)
        for model, kind in kinds.items()
    ]
    launch(tmp_path, 2, scenarios)
    for asked in scenarios:
        model, tokenizer = tiny_pair(asked["model"])
        params = SFTParams.model_validate(asked["params"] | {"distribution": {}}, strict=False)
        alone = tmp_path / f"one-{asked['model']}"
        train(params, model, tokenizer, RunPaths(data, alone, alone / "model"), seed=1)
        same(tmp_path / asked["model"], alone)


def test_a_router_bias_is_not_trained_and_keeps_its_dtype(data, tmp_path):
    model, tokenizer = tiny_pair("llada2")
    bias = torch.linspace(-1e-3, 1e-3, 4)
    model.blocks[1].mlp.expert_bias.copy_(bias)
    save_model(model.to(torch.bfloat16), tmp_path / "low")
    model = load_model(tmp_path / "low")
    model.blocks[1].mlp.expert_bias = bias.clone()  # as 2.1 stores it beside weights in bf16
    train(SFTParams(**QUICK, weight_decay=0.5), model, tokenizer, RunPaths(data, tmp_path, tmp_path / "model"), seed=1)
    trained = load_model(tmp_path / "model")
    assert trained.dtype == torch.bfloat16
    assert torch.equal(trained.blocks[1].mlp.expert_bias, bias)


@torch.no_grad()
def test_a_dense_model_becomes_one_of_its_own_type(tmp_path):
    model, ids = tiny_model(), torch.arange(24).view(2, 12)
    made = by_blocks(model, SFTParams(max_steps=1, blocks=BlockParams(length=4)))
    assert (made.kind, made.block_length, model.block_length) == ("llada_blocks", 4, None)
    assert torch.equal(made(ids).logits, model(ids).logits)
    save_model(made, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert (config["model_type"], config["block_length"]) == ("llada_blocks", 4)
    assert config["architectures"] == ["LLaDABlocksModelLM"]
    assert "auto_map" not in config
    again = load_model(tmp_path / "m")
    assert (again.kind, again.block_length, again.special_tokens) == ("llada_blocks", 4, model.special_tokens)
    how = {"block_causal": BlockCausal(4)}
    assert torch.equal(again(ids, **how).logits, made(ids, **how).logits)
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"model_type": "llada"}))
    with pytest.raises(ValueError, match=r"the key 'block_length' = 4 is not known"):
        load_model(tmp_path / "m")


def test_published_files_name_no_block_length_unless_it_is_another(tmp_path):
    model = tiny_model("llada2")
    assert model.by_blocks(32) is model
    save_model(model, tmp_path / "usual")
    save_model(model.by_blocks(16), tmp_path / "other")
    found = [
        json.loads((tmp_path / name / "config.json").read_text()).get("block_length") for name in ("usual", "other")
    ]
    assert found == [None, 16]
    assert load_model(tmp_path / "other").block_length == 16


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: SFTParams(max_steps=1, blocks=BlockParams(length=0)), "greater than or equal to 1"),
        (lambda: NoiseParams(epsilon=0.8, highest=0.3), r"noise\.epsilon 0\.8 is the lowest time and highest 0\.3"),
        (lambda: SFTParams(max_steps=1, complementary=True, noise=NoiseParams(schedule="cosine")), "noise.schedule: linear"),
        (lambda: GRPOParams(max_steps=1, blocks=BlockParams(length=4)), "blocks are a setting of pretraining and fine-tuning"),
        (lambda: by_blocks(tiny_model("llada_moe"), SFTParams(max_steps=1, blocks=BlockParams(length=4))), "kind llada_moe cannot attend by blocks"),
        (lambda: by_blocks(tiny_model("distilbert"), SFTParams(max_steps=1, blocks=BlockParams(length=4))), "kind masked_lm cannot attend by blocks"),
        (lambda: by_blocks(tiny_model(), SFTParams(max_steps=1, blocks=BlockParams())), "say how long they shall be"),
        (
            lambda: by_blocks(tiny_model(), SFTParams(max_steps=1, blocks=BlockParams(length=4), lora=LoraParams(merge=False))),
            "an adapter alone would be put on a model that does not attend by blocks",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_told(make, told):
    with pytest.raises(ValueError, match=told):
        make()


def test_an_unknown_key_is_told_with_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown key 'blocks\.lenght'; did you mean 'length'\?"):
        SFTParams.parse({"max_steps": 1, "blocks": {"lenght": 4}}, "sft")


def test_runs_that_know_no_blocks_keep_their_names():
    """What a run folder and a checkpoint are named by has none of the settings that came later."""
    for params in (PretrainParams(max_steps=1), SFTParams(max_steps=1), GRPOParams(max_steps=1)):
        assert not {"blocks", "complementary", "confidence"} & params.determining().keys()
        assert "highest" not in params.determining()["noise"]
    assert SFTParams(max_steps=1, blocks=BlockParams(length=4)).determining()["blocks"] == {"length": 4, "phases": []}
