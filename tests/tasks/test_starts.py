"""What nobody set follows where the weights come from and where the job will run, and stays as the first job had it."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from tasks.graph import load_stage
from tasks.launch import local
from tasks.launch.jobs import settle
from tasks.launch.launcher import machine_settings
from tasks.project import Params, Project
from tasks.record.runs import StageContext, open_run, request_of, stage_params
from tasks.work import training

HUB = "GSAI-ML/LLaDA-8B-Base"
SLURM = {"kind": "slurm", "slurm": {"gpus_per_node": 8}}


def a_run(launch: dict | None = None, **blocks: dict) -> Params:
    values = {"name": "x", "stages": list(blocks), "model": {"d_model": 8, "n_layers": 1, "n_heads": 1}}
    return Params.parse({**values, **{name: {"max_steps": 1, **block} for name, block in blocks.items()},
                         "launch": launch or {}}, "test")  # fmt: skip


@pytest.mark.parametrize(
    ("blocks", "rate", "on_gpu"),
    [
        ({"sft": {"init_from": HUB}}, 2e-5, "bf16"),
        ({"sft": {"init_from": HUB, "learning_rate": 1e-3, "precision": "fp32"}}, 1e-3, "fp32"),
        ({"sft": {}}, 4e-4, "fp32"),
        ({"pretrain": {}, "sft": {"init_from": "pretrain"}}, 4e-4, "fp32"),
        ({"pretrain": {"init_from": HUB}, "sft": {"init_from": "pretrain"}}, 2e-5, "bf16"),
        ({"sft": {"init_from": HUB}, "grpo": {"init_from": "sft"}}, 3e-6, "bf16"),
        ({"pretrain": {}, "grpo": {"init_from": "pretrain", "precision": "bf16"}}, 3e-6, "bf16"),
    ],
)
def test_defaults_follow_the_kind_of_start(blocks, rate, on_gpu):
    params, stage = a_run(**blocks), list(blocks)[-1]
    assert params.training(stage).learning_rate == rate
    assert params.settled(stage, gpu=True).precision == on_gpu
    given = blocks[stage].get("precision")
    assert params.settled(stage, gpu=False).precision == (given or "fp32")


@pytest.mark.parametrize(
    ("launch", "here", "precision"),
    [
        (SLURM, 0, "bf16"),  # a login node without a GPU
        ({"kind": "slurm", "slurm": {"extra": ["--gres=gpu:a100:4"]}}, 0, "bf16"),
        ({"kind": "slurm"}, 8, "fp32"),  # a workstation's GPUs are no cluster's
        ({"kind": "local"}, 0, "fp32"),
        ({"kind": "local"}, 1, "bf16"),
    ],
)
def test_the_machine_that_will_train_decides(monkeypatch, launch, here, precision):
    monkeypatch.setattr(local, "visible_gpus", lambda: here)
    params = a_run(launch, sft={"init_from": HUB})
    assert machine_settings(params, "sft", params.launch) == {"precision": precision}


def test_a_run_keeps_what_its_first_job_had(project: Path, capsys):
    published = project / "published"
    published.mkdir()
    (published / "weights").write_text("1")
    values = stage_params(Project.at(project), [f"pretrain.init_from={published}"])
    del values["pretrain"]["learning_rate"]
    stage = load_stage(Project.at(project), "pretrain", values)
    run = open_run(
        Project.at(project),
        stage,
        values,
        request_of(Project.at(project), stage, values) | {"machine": {"precision": "bf16"}},
    )
    values["pretrain"]["save_every"] = 7
    asked = request_of(Project.at(project), stage, values) | {"machine": {"precision": "fp32"}}
    assert open_run(Project.at(project), stage, values, asked).key == run.key
    params = Params.parse(values, "test")
    settle(run, asked, params.launch)
    assert run.request["free"]["pretrain.save_every"] == 7
    taken = training._settled(StageContext(params, run, "pretrain", None))
    assert (taken.learning_rate, taken.precision) == (2e-5, "bf16")  # although this machine has no GPU
    said = capsys.readouterr().out.splitlines()[-1]
    why = f"for weights trained elsewhere ({published})"
    assert said == f"pretrain: learning_rate 2e-05 {why}, precision bf16 {why} on a GPU"


def test_what_is_set_is_not_told_of(monkeypatch):
    params = a_run(sft={"learning_rate": 1e-3, "precision": "fp32"})
    request = {"all_params": {"sft": {"learning_rate": 1e-3, "precision": "fp32"}}}
    assert training._taken(SimpleNamespace(stage="sft", params=params, run=SimpleNamespace(request=request)),
                           params.training("sft")) == ""  # fmt: skip
