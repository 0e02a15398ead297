"""`llada plan`: figures checked by hand for LLaDA-8B, activations against what autograd really keeps, and refusals."""

import json
import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import tasks.launch.plan
from cli.main import llada
from llada_core.modeling import save_model
from tasks.launch.plan import GIB, need, ranks_of
from tasks.launch.plan_memory import KEPT, cut, shape_of
from tasks.project import Params, visible_gpus
from tests.tasks.test_runs import program
from tests.tiny import tiny_model

PROFILES = Path(__file__).parents[2] / "profiles"
BLOCK = 4 * 4096**2 + 3 * 4096 * 12288 + 2 * 4096
OUTER = 2 * 126464 * 4096 + 4096
DENSE = 32 * BLOCK + OUTER  # 8,015,581,184


def load(name: str, *overrides: str) -> Params:
    return Params.load(PROFILES / f"{name}.yaml", list(overrides))


def llada_plan(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(llada, ["plan", *arguments])
    return result.exit_code, result.output


def test_llada_8b_split_over_eight_gpus() -> None:
    params = load("llada-sft-alpaca")
    needs = need(params, "sft", *ranks_of(params, "sft"))
    assert (needs.parameters, needs.trained) == (DENSE, DENSE) == (8_015_581_184, 8_015_581_184)
    assert needs.measured
    around, block = 2 * 126464 * 4096, BLOCK
    by_hand = {
        "weights": 4 * DENSE / 8,  # this rank's part
        "optimiser": 8 * DENSE / 8,
    }
    for name, value in by_hand.items():
        assert needs.memory[name] == pytest.approx(value, rel=0.05), name
    assert 4 * DENSE / 8 < needs.memory["gradients"] < 4 * DENSE / 8 + 4 * around  # this rank's sums, and whole tables'
    gathered = 2 * (block + around)  # a block and the tables in bf16
    assert needs.total - sum(by_hand.values()) > gathered
    assert needs.checkpoints == 2 * 12 * DENSE
    assert needs.exported == 2 * DENSE
    assert needs.host == 8 * 4 * DENSE
    assert needs.tokens == 32 * 1024
    assert needs.steps == 5 * (52002 * 0.95 // 32)
    assert needs.flops == needs.steps * 6 * (DENSE - 126464 * 4096) * needs.tokens


@pytest.mark.parametrize(
    ("kind", "dtype", "stored"), [("bert", "float32", 4), ("bert", "bfloat16", 2), ("llada", "bfloat16", 2)]
)
def test_a_stored_model_of_any_family_is_planned_by_its_shape(
    tmp_path: Path, kind: str, dtype: str, stored: int
) -> None:
    model = tiny_model(kind).to(getattr(torch, dtype))
    save_model(model, tmp_path / "m")
    params = load("llada-sft-alpaca", f"sft.init_from={tmp_path / 'm'}")
    shape, size = shape_of(params, "sft")
    assert {name: p.shape for name, p in shape.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert ({p.device.type for p in shape.parameters()}, size) == ({"meta"}, stored)
    assert len(cut(shape, 1).blocks) == 1


def test_adapters_on_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    params = load("llada-grpo-gsm8k")
    needs = need(params, "grpo", *ranks_of(params, "grpo"))
    adapters = 32 * 16 * (3 * (4096 + 4096) + (4096 + 12288))  # queries, keys, values and up_proj
    assert (needs.trained, needs.parameters) == (adapters, DENSE + adapters)
    assert needs.memory["weights"] == pytest.approx(2 * DENSE + 4 * adapters, rel=0.01)
    assert needs.memory["optimiser"] == pytest.approx(8 * adapters, rel=0.01)
    assert needs.tokens == 8 * (512 + 256)
    rollouts = 8 * 768 * 64  # 64 forwards of the whole canvas
    active = DENSE - 126464 * 4096
    assert needs.flops == needs.steps * (6 * active * 8 * 768 + 2 * active * rollouts)
    monkeypatch.setattr(tasks.launch.plan, "memory_of", lambda asked: ({}, True))
    params = load("llada-grpo-gsm8k", "grpo.beta=0.04")
    needs, reference = need(params, "grpo", *ranks_of(params, "grpo")), 8 * 768
    assert needs.flops == needs.steps * (6 * active * 8 * 768 + 2 * active * (rollouts + reference))


def test_the_sparse_model_counts_its_chosen_experts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks.launch.plan, "memory_of", lambda asked: ({}, True))
    params = load("llada-moe-sft-alpaca")
    needs = need(params, "sft", 8)
    expert, layer = 3 * 2048 * 1024, 4 * 2048**2 + 64 * 2048 + 2 * 2048 + 2 * 128
    assert needs.parameters == 16 * (64 * expert + layer) + 2 * 157184 * 2048 + 2048
    active = 16 * (8 * expert + layer) + 157184 * 2048 + 2048
    assert needs.flops == needs.steps * 6 * active * needs.tokens


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_are_what_autograd_keeps(precision: str) -> None:
    width, inner, tokens, kept = 128, 384, 4 * 64, {}
    model = tiny_model(d_model=width, mlp_hidden_size=inner).train()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage, storage.nbytes())
        return tensor

    hidden = torch.randn(4, 64, width, requires_grad=True)
    around = model._surroundings(hidden, None, None, None, None)
    own |= {around.cos.untyped_storage().data_ptr(), around.sin.untyped_storage().data_ptr()}
    low = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), low:
        result, _ = model.model.transformer.blocks[0](hidden, around)
    del result
    weights = (
        2 * (4 * width**2 + 3 * width * inner) if precision == "bf16" else 0
    )  # autocast's copies, counted as weights
    by_width, by_inner = KEPT[precision]
    assert sum(size for _, size in kept.values()) - weights == pytest.approx(
        tokens * (by_width * width + by_inner * inner), rel=0.1
    )


def test_what_cannot_fit_is_refused_with_what_would_help() -> None:
    code, text = llada_plan(str(PROFILES / "llada-grpo-gsm8k.yaml"), "-S", "grpo.lora=null", "-S", "grpo.beta=0.04")
    assert code == 2
    assert re.search(
        r"grpo needs 1\d\d\.\d GiB of a GPU, a plan may fill 71\.1 of 1 x H100; it would fit with lora", text
    )
    assert "fsdp" not in text  # a reference copy is not sharded
    code, text = llada_plan(str(PROFILES / "llada-sft-alpaca.yaml"), "-S", "launch.processes=2", "--gpu", "A100-40")
    assert code == 2
    assert "distribution.kind: fsdp on 8 GPUs" in text
    assert llada_plan(str(PROFILES / "llada-sft-alpaca.yaml"), "--gpu", "H10")[1].count("did you mean 'H100'?") == 1
    unknown = llada_plan(str(PROFILES / "smoke.yaml"), "--gpu", "RTX 4090")[1]
    assert "allowed: A100, A100-40, H100, H200, its memory, as 24GB" in unknown
    code, text = llada_plan(str(PROFILES / "smoke.yaml"), "--gpu", "24GB")
    assert code == 0, text
    assert re.search(r"\(MiB; .*: weights \d.*: \d+\.\d of 20\.7 GiB\n  disk \(MiB\): checkpoints [1-9]", text), (
        "a small model"
    )
    if not visible_gpus():
        code, text = llada_plan(str(PROFILES / "smoke.yaml"))
        assert (code, "H100" in text) == (0, False)
        assert re.search(r"on 1 process of this machine \(\d+ cores, \d+ GiB of memory, no GPU\)", text)
        assert "memory of a process (MiB" in text
        assert "how long, the run will tell" in text
        assert "1 x H100" in llada_plan(str(PROFILES / "llada-sft-own.yaml"))[1]
        code, text = llada_plan(
            str(PROFILES / "smoke.yaml"), "-S", "model.d_model=65536", "-S", "launch.cpu_processes=2"
        )
        assert code == 2
        assert "GiB of a process, a plan may fill" in text
    code, text = llada_plan(str(PROFILES / "smoke.yaml"), "--gpu", "H100", "--json")
    planned = json.loads(text)
    assert (code, planned["profile"]) == (0, "smoke")
    assert [stage["stage"] for stage in planned["stages"]] == ["pretrain", "sft", "grpo", "sft_control"]
    assert 0 < planned["stages"][0]["total"] < planned["stages"][0]["room"]
    assert "tasks.pretrain" in planned["stages"][0]["script"]


def test_what_is_measured_and_what_is_counted_by_formula_is_told() -> None:
    arguments = (str(PROFILES / "llada-sft-alpaca.yaml"), "-S", "launch.processes=8")
    assert "memory of a GPU (GiB; a training step run on tensors without memory): weights" in llada_plan(*arguments)[1]
    text = llada_plan(*arguments, "-S", "sft.distribution.kind=zero3")[1]
    assert "memory of a GPU (GiB; by formula): weights" in text
    code, text = llada_plan(str(PROFILES / "smoke.yaml"), "--gpu", "24 gb", "-S", "model.kind=llada_moe")
    assert (code, text.count("(MiB; by formula)")) == (0, 4), "in fp32"


@pytest.mark.slow
def test_adapters_of_llada2_mini_do_not_fit_on_a_small_gpu_and_those_of_its_experts_on_a_large_one() -> None:
    profile = str(PROFILES / "llada2-sft-lora.yaml")
    code, text = llada_plan(profile, "--gpu", "24GB")
    assert code == 2
    assert "sft needs 33.5 GiB of a GPU, a plan may fill 20.7 of 1 x 24GB; it would fit with " in text
    assert "distribution.kind: fsdp on 4 GPUs (17.6 GiB)" in text
    code, text = llada_plan(profile, "-S", "sft.lora.experts=true")
    assert (code, "443,932,672 of them trained" in text, "40.3 of 71.1" in text) == (0, True, True)


@pytest.mark.parametrize(
    ("profile", "overrides", "told"),
    [
        ("llada-sft-alpaca", "sft.distribution.kind=zero3 sft.lora.r=8", "pieces of zero3; use zero2"),
        ("llada-sft-alpaca", "sft.lora.r=8", "set lora.merge to false"),
        ("llada-sft-alpaca", "sft.batch_size=12", "batch_size 12 does not divide into 8 ranks"),
        ("llada-grpo-gsm8k-lora", "grpo.prompts=12", "prompts 12 does not divide over 8 ranks; use a multiple"),
        ("llada-grpo-gsm8k-lora", "grpo.sync_every=2", "with LoRA the reference is the adapter switched off"),
        (
            "llada-grpo-gsm8k",
            "grpo.distribution.kind=fsdp grpo.lora=null grpo.beta=0.04",
            "a reference copy is not sharded",
        ),
        ("llada-grpo-gsm8k-lora", "grpo.distribution.kind=fsdp grpo.sampling.stop_at_eos=true", "ddp or fixed steps"),
    ],
)
def test_what_training_would_refuse_is_refused_before_anything_starts(profile: str, overrides: str, told: str) -> None:
    code, text = llada_plan(str(PROFILES / f"{profile}.yaml"), *(f"-S{change}" for change in overrides.split(" ")))
    assert code == 2
    assert re.search(told, " ".join(text.split()))


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=[pytest.mark.faults] if re.search("2x8|lora|d1|tulu", path.stem) else [], id=path.stem)
        for path in sorted(PROFILES.glob("llada-*.yaml"))
    ],
)
def test_every_profile_fits_and_shows_how_it_would_run(path: Path) -> None:
    code, text = llada_plan(str(path))
    assert code == 0, text
    assert ("at an MFU of 40%" in text) != ("how many steps, the data will tell" in text)
    assert f"-m tasks.{Params.load(path).stages[1]}" in text
    if "24x8" in path.stem:
        for line in ("#SBATCH --nodes=24", "#SBATCH --gpus-per-node=8", "--num_processes 192", "accelerate/fsdp.yaml"):
            assert line in text
    assert GIB == 2**30


def test_a_job_that_cannot_fit_is_not_submitted(project: Path) -> None:
    shape = "model={d_model: 16384, n_layers: 8, n_heads: 64, mlp_hidden_size: 65536}"
    data = "data={tokenizer: {vocab_size: 512}, pretrain: {length: 4096, sources: [{name: a.txt}]}}"
    process = program("tasks.pretrain", shape, data, "launch={kind: slurm, gpu: H100, slurm: {gpus_per_node: 1}}")
    text = process.communicate(timeout=300)[0]
    assert process.returncode == 2, text
    assert "pretrain needs" in text
    assert not list(project.glob("runs/*/job.json"))
