"""Two ranks are one process: losses, parameters, exports and resumes, with DDP and with FSDP2 really sharding."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llada_core.modeling import load_model
from llada_core.training.progress import read_metrics
from tests.ports import free_port
from tests.training.data import write_data
from tests.training.test_grpo import write_prompts

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return write_prompts(write_data(tmp_path_factory.mktemp("data")))


def scenario(data, run, stage="sft", model="llada", stop=None, **changes):
    values = {
        "max_steps": 20, "batch_size": 16, "learning_rate": 3e-3, "log_every": 1, "save_every": 10, "warmup": 2, "samples": 0,
    }  # fmt: skip
    return {
        "data": str(data), "run": str(run), "stage": stage, "model": model, "stop": stop, "params": {**values, **changes}
    }  # fmt: skip


def launch(folder, processes, scenarios, succeeds=True):
    file = folder / f"scenarios-{processes}-{len(list(folder.iterdir()))}.json"
    file.write_text(json.dumps(scenarios))
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", f"--master-port={free_port()}",
               "-m", "tests.training.ranks", str(file)]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert (done.returncode == 0) == succeeds, done.stderr[-3000:]
    return done.stderr


def losses(folder):
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]


def weights(folder):
    return load_model(folder / "model").state_dict()


def same(one, other, tolerance=1e-5):
    torch.testing.assert_close(torch.tensor(losses(one)), torch.tensor(losses(other)), atol=tolerance, rtol=tolerance)
    mine, theirs = weights(one), weights(other)
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], atol=tolerance, rtol=tolerance, msg=name)


KINDS = [("llada", "ddp"), ("llada", "fsdp"), ("llada_moe", "ddp"), ("llada_moe", "fsdp")]


def plan(data, folder, name, **changes):
    kind = changes.pop("kind", None)
    if kind is not None:
        changes |= {"distribution": {"kind": kind}, "micro_batch_size": 4}
    return scenario(data, folder / name, **changes)


POLICY = {
    "stage": "grpo", "max_steps": 6, "prompts": 2, "generations": 3, "iterations": 3, "beta": 0.0, "validate_every": 3,
    "reward": "tests.training.test_grpo.likes_low_ids", "keep_best": False,
    "sampling": {"max_new_tokens": 6, "block_length": 6, "steps": 3, "temperature": 1.0},
}  # fmt: skip


@pytest.fixture(scope="session")
def few(data, tmp_path_factory):
    """On one process and on two (sharded, or in small batches): a sparse and a tied model, one in bf16, an adapter, a policy.

    On two alone: adapters that drop out, a policy that samples with a cache in bf16.
    """
    folder = tmp_path_factory.mktemp("few")
    sparse, adapter = (
        {"model": "llada_moe", "max_steps": 8},
        {
            "model": "llada_moe",
            "max_steps": 8,
            "lora": {"r": 4, "merge": False, "experts": True, "modules_to_save": ["ff_out"]},
        },
    )
    half, tied = {"model": "llada_moe", "max_steps": 4, "precision": "bf16"}, {"shape": {"weight_tying": True}}
    alone = [("alone", sparse), ("adapter-alone", adapter), ("policy", POLICY)]
    alone = [*alone, ("alone-bf16", half | {"micro_batch_size": 4})]
    tied_alone = plan(data, folder, "alone-tied", max_steps=8) | tied
    launch(folder, 1, [*(plan(data, folder, name, **changes) for name, changes in alone), tied_alone])
    two = plan(data, folder, "policies", **POLICY, kind="ddp")
    two["params"]["micro_batch_size"] = 1
    cut = plan(data, folder, "cut", kind="fsdp", **sparse)
    lora = {"max_steps": 4, "lora": {"dropout": 0.5, "merge": False}}
    cached = {**POLICY, "max_steps": 2, "precision": "bf16", "sampling": {**POLICY["sampling"], "cache": "dual"}}
    sharded = [
        ("fsdp", sparse),
        ("adapter-fsdp", adapter),
        ("fsdp-bf16", half),
        ("cached-bf16", cached),
        ("policy-fsdp", POLICY),
    ]
    sharded = [*sharded, ("lora", lora), ("lora-recomputed", lora | {"activation_checkpointing": True})]
    twice = [*(plan(data, folder, name, kind="fsdp", **changes) for name, changes in sharded), cut | {"stop": 4}]
    twice.append(plan(data, folder, "ddp-bf16", kind="ddp", **half))
    twice.append(plan(data, folder, "fsdp-tied", max_steps=8, kind="fsdp", activation_checkpointing=True) | tied)
    launch(folder, 2, [*twice, two, cut | {"count": True}])
    return folder


def test_two_ranks_read_a_checkpoint_once_between_them(few):
    same(few / "cut", few / "alone")
    checkpoint = few / "cut/checkpoints/step-00000004"
    counts = [json.loads((few / f"cut/reads-{rank}.json").read_text()) for rank in range(2)]
    hashed = [name for count in counts for name in count["hashed"]]
    assert sorted(hashed) == sorted(json.loads((checkpoint / "manifest.json").read_text()))
    assert all(f"shard-0000{rank}-of-00002.safetensors" in counts[rank]["hashed"] for rank in range(2))
    stored = [load_file(shard) for shard in checkpoint.glob("shard-*.safetensors")]
    held = [sum(t.nbytes for n, t in part.items() if not n.startswith("objective.")) for part in stored]
    assert sorted(count["read"] for count in counts) == sorted(held)


@pytest.fixture(scope="session")
def runs(data, tmp_path_factory):
    """All other runs of this file, in three launches."""
    folder = tmp_path_factory.mktemp("runs")
    alone = [
        plan(data, folder, f"{model}-{n}", model=model, micro_batch_size=16 // n)
        for model in ("llada", "llada_moe")
        for n in (1, 2, 4)
    ]
    half = plan(data, folder, "bf16", precision="bf16")
    launch(folder, 1, [*alone, plan(data, folder, "one-to-two", stop=7), half])
    pairs = [plan(data, folder, f"{model}-{kind}", model=model, kind=kind) for model, kind in KINDS]
    stopped = [plan(data, folder, f"{kind}-to-one", kind=kind, stop=7) for kind in ("ddp", "fsdp")]
    half = plan(data, folder, "bf16-fsdp", kind="fsdp", precision="bf16", activation_checkpointing=True)
    launch(folder, 2, [*pairs, *stopped, half, plan(data, folder, "one-to-two", kind="fsdp")])
    launch(folder, 1, [plan(data, folder, f"{kind}-to-one") for kind in ("ddp", "fsdp")])
    return folder


def really_sharded(folder, kind):
    found = json.loads((folder / "sharding.json").read_text())
    assert found["dtypes"] == ["torch.float32"]
    assert found["sharded"] == (found["all"] if kind == "fsdp" else 0)


def test_two_sharding_ranks_are_one(few):
    same(few / "fsdp", few / "alone")
    really_sharded(few / "fsdp", "fsdp")


def test_two_ranks_that_sample_judge_and_train_their_own_rows_are_one(few):
    same(few / "policies", few / "policy")
    same(few / "policy-fsdp", few / "policy")  # sampled by shards that each step has changed
    really_sharded(few / "policy-fsdp", "fsdp")


def test_the_adapter_of_a_sharded_model_is_exported_whole(few):
    same(few / "adapter-fsdp", few / "adapter-alone")
    really_sharded(few / "adapter-fsdp", "fsdp")


def test_two_sharding_ranks_are_one_with_a_tied_head(few):
    same(few / "fsdp-tied", few / "alone-tied")
    really_sharded(few / "fsdp-tied", "fsdp")


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_bf16_means_the_same_however_ranks_share_the_work(few, kind):
    assert losses(few / f"{kind}-bf16")[0] == pytest.approx(losses(few / "alone-bf16")[0], abs=1e-6)
    assert losses(few / f"{kind}-bf16") == pytest.approx(losses(few / "alone-bf16"), abs=1e-2)


def test_activations_computed_again_drop_out_the_same_units(few):
    assert losses(few / "lora-recomputed") == pytest.approx(losses(few / "lora"), abs=1e-6)


def test_a_sharded_policy_samples_with_a_cache_in_bf16(few):
    assert any("reward" in line for line in read_metrics(few / "cached-bf16" / "metrics.jsonl"))


@pytest.mark.faults
@pytest.mark.parametrize("model", ["llada", "llada_moe"])
@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulation_changes_nothing(runs, model, accumulation):
    same(runs / f"{model}-{accumulation}", runs / f"{model}-1")


@pytest.mark.faults
@pytest.mark.parametrize(("model", "kind"), KINDS)
def test_two_ranks_are_one(runs, model, kind):
    same(runs / f"{model}-{kind}", runs / f"{model}-1")
    really_sharded(runs / f"{model}-{kind}", kind)


@pytest.mark.faults
@pytest.mark.parametrize("run", ["one-to-two", "ddp-to-one", "fsdp-to-one"])
def test_a_run_goes_on_with_another_number_of_ranks(runs, run):
    same(runs / run, runs / "llada-1")


@pytest.mark.faults
def test_bf16_ranks_with_recomputed_activations_stay_close(runs):
    assert losses(runs / "bf16-fsdp") == pytest.approx(losses(runs / "bf16"), abs=1e-2)
    really_sharded(runs / "bf16-fsdp", "fsdp")


@pytest.mark.faults
def test_a_rank_that_hangs_ends_the_job_within_its_timeout(data, tmp_path):
    hung = plan(data, tmp_path, "hung", kind="ddp", max_steps=4)
    hung["params"]["distribution"]["timeout_minutes"] = 0.7  # also the time that a busy machine may take to start both
    assert "imed out" in launch(tmp_path, 2, [hung | {"hang": True}], succeeds=False)
    assert losses(tmp_path / "hung")


LAUNCHERS = {
    "python": [],
    "accelerate": ["accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1", "--mixed_precision",
                   "no", "--dynamo_backend", "no", "--module"],
    "torchrun of one": ["torch.distributed.run", "--nproc-per-node", "1", "-m"],
    "torchrun of two": ["torch.distributed.run", "--nproc-per-node", "2", "-m"],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "kind"),
    [("python", "auto"), ("accelerate", "auto"), ("torchrun of one", "fsdp"), ("torchrun of two", "auto")],
)
def test_a_gpu_machine_trains_however_it_is_started(launcher, kind):
    how = list(LAUNCHERS[launcher])
    if "torch.distributed.run" in how:
        how.insert(1, f"--master-port={free_port()}")
    start = [sys.executable, *(["-m", *how] if how else ["-m"]), "tests.training.devices", kind]
    environment = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "RANK", "WORLD_SIZE")}
    done = subprocess.run(
        start, cwd=ROOT, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    ranks = 2 if "two" in launcher else 1
    grouped = "torchrun" in launcher
    assert (found["ranks"], found["sum"]) == (ranks, [ranks])
    assert found["type"] == ("FSDP" if kind == "fsdp" else "MULTI_GPU" if grouped else "NO")
    assert found["opened"] == (["cpu:gloo,cuda:nccl"] if grouped else [])
    assert (found["device"], found["loads_to"]) == ("cuda:0" if grouped else "cuda", "cuda:0")
