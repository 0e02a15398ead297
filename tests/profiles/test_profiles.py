"""Every profile of dllm's LLaDA commands, as it is, at tiny width on two CPU ranks under its own accelerate file.

What is run: the command that a job would run (`accelerate launch --config_file ...`), with the test's program in place
of the stage's. accelerate cannot run ZeRO on a CPU: there the command is checked up to what it would start.
"""

import json
import operator
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from peft import LoraConfig, inject_adapter_in_model

from llada_core import settings
from llada_core.modeling import add_lora, load_model
from llada_core.training.accelerator import accelerator_for
from llada_core.training.progress import read_metrics
from llada_core.training.train import block_classes
from tasks.launch.local import LocalLauncher
from tasks.project import Params
from tasks.record.runs import RunFolder
from tasks.stages import TRAINING_STAGES
from tasks.work.prepare import prepare
from tests.profiles.shrink import PROFILES, shrunk, write_sources
from tests.tiny import tiny_model

ROOT = PROFILES.parent
NAMES = sorted(path.stem for path in PROFILES.glob("llada*.yaml"))


def stage_of(params: Params) -> str:
    (stage,) = (s for s in params.stages if s in TRAINING_STAGES)
    return stage


def kind_of(name: str) -> str:
    params = Params.load(PROFILES / f"{name}.yaml")
    return params.training(stage_of(params)).distribution.kind


def command_of(params: Params, folder: Path) -> list[str]:
    """What the profile's job runs, as words; its folder has the accelerate files as a submitted one has."""
    shutil.copytree(ROOT / "tasks" / "accelerate", folder / "tree" / "tasks" / "accelerate")
    request = {
        "stage": stage_of(params),
        "root": str(ROOT),
        "all_params": params.model_dump(mode="json", by_alias=True),
    }
    (folder / "request.json").write_text(json.dumps(request))
    script = LocalLauncher(params.launch).script(RunFolder(folder))
    (line,) = [line for line in script.splitlines() if "-m tasks." in line]
    return shlex.split(line.removesuffix(" &"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every profile that a CPU can run, in one launch for each accelerate file."""
    folder = tmp_path_factory.mktemp("profiles")
    root = write_sources(folder / "sources")
    for kind in ("fsdp", "auto"):
        scenarios, command = [], []
        for name in (n for n in NAMES if kind_of(n) == kind):
            params = shrunk(name, root)
            stage, run = stage_of(params), folder / name
            assert params.data is not None
            with pytest.MonkeyPatch.context() as patch:
                patch.delenv("LLADAFLOW_DATA_ROOT", raising=False)  # it would go before the profile's own root
                prepare(params.data, seed=0, out=run / "data", home=folder)
            model = "llada2" if name.startswith("llada2") else "llada_moe" if "moe" in name else "llada"
            block = params.training(stage).model_dump(mode="json")
            scenarios.append(
                {"stage": stage, "data": str(run / "data"), "run": str(run), "model": model, "params": block}
            )
            command = command_of(params, folder / f"job-{name}")
        file = folder / f"{kind}.json"
        file.write_text(json.dumps(scenarios))
        whole = [*command[: command.index("-m", 3)], "-m", "tests.profiles.ranks", str(file)]
        done = subprocess.run(
            whole, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if kind_of(name) != "zero2"])
def test_a_profile_runs_at_tiny_width_on_two_ranks(runs: Path, name: str) -> None:
    run = runs / name
    losses = [line["loss"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
    assert losses
    assert torch.tensor(losses).isfinite().all()
    found = json.loads((run / "sharding.json").read_text())
    sharded = found["all"] if kind_of(name) == "fsdp" else 0
    assert (found["ranks"], found["sharded"]) == (2, sharded)
    if kind_of(name) == "fsdp":
        assert found["file"] == "LLaDABlock"
        assert found["file"] in found["wrapped"]
        assert load_model(run / "model").vocab_rows == 300
    else:
        assert (run / "model" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("name", [name for name in NAMES if kind_of(name) == "zero2"])
def test_a_zero_profile_is_right_up_to_the_launch(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    params = Params.load(PROFILES / f"{name}.yaml")
    monkeypatch.setattr(settings, "find_spec", lambda name: object())  # as if deepspeed were there
    words = command_of(params, tmp_path / "run")
    asked, _, _ = _validate_launch_command(launch_command_parser().parse_args(words[words.index("--config_file") :]))
    assert (asked.use_deepspeed, asked.zero_stage, asked.num_processes, asked.module) == (True, 2, 8, True)
    assert asked.training_script == "tasks.grpo"
    made = {}
    monkeypatch.setattr("llada_core.training.accelerator.Accelerator", lambda **values: made.update(values) or made)
    monkeypatch.setattr("llada_core.training.accelerator._assert_distribution", lambda params, engine: None)
    block = params.training("grpo")
    accelerator_for(block, cpu=True, block_classes=())
    config = made["deepspeed_plugin"].deepspeed_config
    assert config["zero_optimization"]["stage"] == 2
    assert config["train_micro_batch_size_per_gpu"] == block.micro_batch_size
    assert config["gradient_clipping"] == block.clip


# What dllm@ca17675's commands come to with TRL's and transformers' defaults, and what d1@837888f's train.yaml says.
DEFAULTS = {
    "schedule": "linear", "warmup": 0.0, "final_ratio": 0.0, "weight_decay": 0.0, "betas": (0.9, 0.999), "clip": 1.0,
    "iterations": 1, "mask_prompt": 0.3, "scale_rewards": False, "likelihood": "one_forward", "keep_best": False,
    "reward": "published", "optimiser": "adamw", "sampling.max_new_tokens": 256, "sampling.block_length": 64,
    "sampling.steps": 64, "sampling.temperature": 1.0, "lora.dropout": 0.05,
}  # fmt: skip
GSM8K = {
    "llada-grpo-gsm8k": DEFAULTS
    | {"learning_rate": 1e-6, "epochs": 1, "generations": 8, "prompts": 1, "beta": 0.0, "epsilon": 0.2}
    | {"lora.r": 16, "lora.alpha": 32},
    "llada-grpo-gsm8k-lora": DEFAULTS
    | {"learning_rate": 3e-6, "epochs": 10, "generations": 6, "prompts": 8 * 2, "micro_batch_size": 6}
    | {"beta": 0.04, "epsilon": 0.5, "lora.r": 128, "lora.alpha": 64},
    "llada-grpo-gsm8k-d1": DEFAULTS
    | {"learning_rate": 3e-6, "epochs": 10, "generations": 6, "prompts": 8 * 2, "micro_batch_size": 6}
    | {"beta": 0.04, "epsilon": 0.5, "lora.r": 128, "lora.alpha": 64, "lora.four_bit": True}
    | {"schedule": "constant", "warmup": 1e-4, "final_ratio": 0.1, "weight_decay": 0.1, "betas": (0.9, 0.99)}
    | {"clip": 0.2, "iterations": 12, "mask_prompt": 0.15, "sampling.block_length": 32, "sampling.steps": 128}
    | {"sampling.temperature": 0.9},
}


@pytest.mark.parametrize("name", [*GSM8K, "llada-moe-grpo-gsm8k", "llada-moe-grpo-gsm8k-lora"])
def test_a_grpo_profile_says_what_the_original_command_does(name: str) -> None:
    block = Params.load(PROFILES / f"{name}.yaml").training("grpo")
    expected = GSM8K[name.replace("-moe", "")]
    assert {key: operator.attrgetter(key)(block) for key in expected} == expected


@pytest.mark.parametrize("name", [*GSM8K])
def test_adapters_lie_where_peft_puts_those_of_the_original(name: str) -> None:
    lora = Params.load(PROFILES / f"{name}.yaml").training("grpo").lora
    assert lora is not None
    ours, theirs = tiny_model(), tiny_model()
    add_lora(ours, lora)
    seven = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"]
    inject_adapter_in_model(LoraConfig(r=lora.r, target_modules=seven), theirs)
    trained = [{n: p.shape for n, p in m.named_parameters() if p.requires_grad} for m in (ours, theirs)]
    assert trained[0] == trained[1]
    assert len(trained[0]) == 2 * 2 * 4  # two matrices in each of four layers of two blocks


@pytest.mark.parametrize("kind", ["llada", "llada_moe", "llada2", "llada_blocks"])
def test_the_fsdp_file_names_the_class_that_is_wrapped(kind: str) -> None:
    file = yaml.safe_load((ROOT / "tasks/accelerate/fsdp.yaml").read_text())
    assert file["fsdp_config"]["fsdp_transformer_layer_cls_to_wrap"] == ",".join(block_classes(tiny_model(kind)))
