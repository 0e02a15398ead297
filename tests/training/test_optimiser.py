"""Learning-rate curves, the paper's among them, and which parameters decay."""

import math

import pytest
import torch
import torch.distributed as dist

from llada_core.modeling import add_lora
from llada_core.modeling.families import LoraParams
from llada_core.settings import ConfigError
from llada_core.training.accelerator import Muon, learning_rate, optimiser_for
from llada_core.training.params import Phase, TrainingParams
from tests.tiny import tiny_model


def curve(**changes):
    params = TrainingParams.parse({"max_steps": 100, "learning_rate": 1.0, **changes}, "sft")
    return [learning_rate(params, step, step / 100) for step in range(100)]


def test_wsd_warms_up_stays_and_decays():
    rates = curve(schedule="wsd", warmup=10, decay=0.2, final_ratio=0.1)
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert set(rates[10:81]) == {1.0}
    assert rates[90] == pytest.approx(0.55)
    assert rates[99] == pytest.approx(0.1 + 0.9 * 0.05)


def test_cosine_linear_and_constant():
    assert curve(schedule="cosine", warmup=0, final_ratio=0)[50] == pytest.approx(0.5)
    assert curve(schedule="cosine", warmup=0, final_ratio=0.2)[25] == pytest.approx(
        0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2
    )
    assert curve(schedule="linear", warmup=0, final_ratio=0)[75] == pytest.approx(0.25)
    assert curve(schedule="constant", warmup=0.1)[5:11] == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9, 1.0])


def test_the_papers_phases():
    """Warm-up to 4e-4, constant, 1e-4 after the crash at 1.2 T tokens, then linear to 1e-5 (LLaDA, section 2.2)."""
    phases = (Phase(steps=20, start=0, end=4e-4), Phase(steps=40, start=4e-4, end=4e-4),
              Phase(steps=30, start=1e-4, end=1e-4), Phase(steps=10, start=1e-4, end=1e-5))  # fmt: skip
    params = TrainingParams(max_steps=100, schedule="phases", phases=phases)
    found = [learning_rate(params, step, step / 100) for step in (10, 30, 60, 89, 95, 100, 500)]
    assert found == pytest.approx([2e-4, 4e-4, 1e-4, 1e-4, 5.5e-5, 1e-5, 1e-5])


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_weight_trains_once_and_vectors_do_not_decay(name):
    model = tiny_model()
    groups = optimiser_for(model, TrainingParams(max_steps=1, optimiser=name, weight_decay=0.3)).param_groups
    found = [p for group in groups for p in group["params"]]
    assert {id(p) for p in found} == {id(p) for p in model.parameters()}
    assert len(found) == len(list(model.parameters()))
    assert all((group["weight_decay"] > 0) == all(p.ndim > 1 for p in group["params"]) for group in groups)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({}, "one of max_steps, epochs, max_flops, flops_of must say when training ends"),
        ({"max_steps": 1, "micro_batch_size": 24}, "micro_batch_size 24 must divide batch_size 64"),
        ({"max_steps": 1, "schedule": "phases"}, "schedule phases and a non-empty list of phases go together"),
        ({"max_steps": 1, "learning_rte": 1}, "unknown key 'learning_rte'; did you mean 'learning_rate'?"),
        ({"max_steps": 0}, "max_steps: Input should be greater than or equal to 1"),
    ],
)
def test_mistakes_are_told_in_one_line(values, told):
    with pytest.raises(ConfigError, match="^sft: .*" + told.replace("(", r"\(").replace("?", r"\?")):
        TrainingParams.parse(values, "sft")


SHAPES = [(8, 8), (24, 8), (8, 24), (8, 8), (24, 8), (8, 8)]


def matrices(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in SHAPES]


def trained_by(make, steps=3):
    found = matrices()
    optimiser = make(found)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for p in found:
            p.grad = torch.randn(p.shape, generator=generator)
        optimiser.step()
    return found


def muon(found):
    return Muon(found, lr=0.1, weight_decay=0.3)


def test_muon_is_torchs_bit_for_bit():
    theirs = trained_by(lambda found: torch.optim.Muon(found, lr=0.1, weight_decay=0.3, adjust_lr_fn="match_rms_adamw"))
    assert all(torch.equal(one, other) for one, other in zip(trained_by(muon), theirs, strict=True))


def on_rank(rank, folder):
    """What a rank of two ends with, in a process of its own."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.save([p.detach() for p in trained_by(muon)], folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_share_muons_work_and_end_with_the_same_bits(tmp_path):
    torch.multiprocessing.spawn(on_rank, (tmp_path,), nprocs=2)
    alone = trained_by(muon)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert all(torch.equal(one, other) for one, other in zip(found, alone, strict=True))


def test_muons_memory_is_stored_under_torchs_names():
    found = matrices()
    for p in found:
        p.grad = torch.ones_like(p)
    theirs, mine = torch.optim.Muon(found), Muon(found, lr=0.1, weight_decay=0.3)
    theirs.step()
    mine.load_state_dict({"state": theirs.state_dict()["state"], "param_groups": mine.state_dict()["param_groups"]})
    assert [set(state) for state in mine.state_dict()["state"].values()] == [{"momentum_buffer"}] * len(found)


def test_muon_trains_adapters_which_leave_adamw_nothing():
    model = tiny_model()
    add_lora(model, LoraParams(r=2))
    params = TrainingParams(max_steps=1, optimiser="muon", learning_rate=1e-2)
    optimiser = optimiser_for(model, params)
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    for _ in range(2):  # B is zero at first, and so is the gradient of A
        model(torch.arange(10, 20)[None]).logits.square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()
    assert all(not torch.equal(p, old) for p, old in zip(trained, before, strict=True))
