"""Settings that are free to change, and runs of another length: training goes on, and is never done again unasked."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from llada_core.settings import ConfigError, flat, free_settings
from llada_core.training.params import GRPOParams
from tasks.graph import load_stage
from tasks.project import Params, Project
from tasks.record.runs import RunFolder, all_runs, open_run, stage_params
from tests.tasks.test_runs import PREPARE, at_step, finish, open_toy, program, steps, the_run
from tests.waiting import PATIENCE, wait_for

FREE = {
    "micro_batch_size": 2,
    "activation_checkpointing": True,
    "compile": True,
    "save_every": 7,
    "keep": 5,
    "log_every": 3,
    "distribution": {"kind": "ddp"},
    "recovery": {"tries": 9},
}


def text_of(process: subprocess.Popen, code: int) -> str:
    text = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == code, text
    return text


def stopped_at(project: Path, step: int, *overrides: str) -> None:
    """A run of pretrain that was cancelled at a step."""
    (project / f"wait-pretrain-{step}").touch()
    job = program("tasks.pretrain", *overrides)
    wait_for(
        f"step {step}",
        lambda: any(step in steps(run) for run in all_runs(Project.at(project)) if (run.path / "steps.txt").exists()),
    )
    job.terminate()
    text_of(job, 143)
    (project / f"wait-pretrain-{step}").unlink()


def dvc(project: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "dvc", *arguments]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def edit(project: Path, **changes: object) -> None:
    """Change the block `pretrain` of params.yaml, as a person would."""
    params = yaml.safe_load((project / "params.yaml").read_text())
    params["pretrain"] |= changes
    (project / "params.yaml").write_text(yaml.safe_dump(params))


def test_a_free_setting_or_a_default_spelled_out_is_not_in_a_runs_name(project: Path) -> None:
    key = open_toy(project).key
    for name, value in FREE.items():
        assert open_toy(project, f"pretrain.{name}={json.dumps(value)}").key == key, name
    assert open_toy(project, "pretrain.clip=1.0", "pretrain.lora=null").key == key


def test_what_is_free_is_declared_beside_the_settings() -> None:
    assert FREE.keys() < free_settings(GRPOParams).keys()
    assert "rollout_batch" in free_settings(GRPOParams)
    determining = flat(Params.load(Path(__file__).parents[2] / "params.yaml").determining())
    assert {"grpo.learning_rate", "grpo.extend", "grpo.sampling.steps", "evaluate.limit"} <= determining.keys()
    assert not {"grpo.micro_batch_size", "data.workers", "data.root", "evaluate.batch_size"} & determining.keys()


def test_an_unfinished_run_goes_on_with_new_free_settings(project: Path) -> None:
    stopped_at(project, 2)
    text = finish(program("tasks.pretrain", "pretrain.micro_batch_size=4", "pretrain.save_every=1"))
    run = the_run(project)
    assert "pretrain.micro_batch_size: None -> 4" in text
    assert "first micro batches of 4" in text
    assert steps(run) == [1, 2, 3, 4]
    assert run.request["free"]["pretrain.save_every"] == 1
    assert run.request["params"]["pretrain"]["micro_batch_size"] == 4
    assert yaml.safe_load((run.tree / "params.yaml").read_text())["pretrain"]["micro_batch_size"] == 4


def test_inline_and_in_hand_made_ranks_it_goes_on_as_well(project: Path) -> None:
    (project / "mistake-pretrain-2").touch()
    text_of(program("tasks.pretrain", "launch.kind=inline"), 2)
    (project / "mistake-pretrain-2").unlink()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", "-m"]
    done = subprocess.run(
        [*command, "tasks.pretrain", "pretrain.micro_batch_size=4"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "first micro batches of 4" in done.stdout
    assert steps(the_run(project)) == [1, 2, 3, 4]


def test_a_job_at_work_refuses_other_settings_by_name(project: Path) -> None:
    (project / "wait-pretrain-2").touch()
    first = program("tasks.pretrain")
    at_step(project, 2)
    key = the_run(project).key
    text = text_of(program("tasks.pretrain", "pretrain.micro_batch_size=4", "sft.max_steps=9"), 2)
    assert len(text.strip().splitlines()) == 1
    assert f"error: {key} (local " in text
    assert f"(pretrain.micro_batch_size: None -> 4): `llada cancel {key}` saves and ends it" in text
    follower = program("tasks.pretrain", "sft.max_steps=9")  # another stage's settings are none of its business
    assert follower.stdout.readline().endswith("already running, following it\n")
    (project / "wait-pretrain-2").unlink()
    finish(first)
    finish(follower)
    assert the_run(project).request["free"]["pretrain.micro_batch_size"] is None


def test_an_inline_run_at_work_refuses_them_as_well(project: Path) -> None:
    (project / "wait-pretrain-2").touch()
    first = program("tasks.pretrain", "launch.kind=inline")
    at_step(project, 2)
    text = text_of(program("tasks.pretrain", "launch.kind=inline", "pretrain.micro_batch_size=4"), 2)
    assert "(inline) is at it with other settings (pretrain.micro_batch_size: None -> 4): Ctrl-C where it runs" in text
    (project / "wait-pretrain-2").unlink()
    finish(first)


def test_a_finished_run_with_other_free_settings_is_the_same_result_also_for_dvc(project: Path) -> None:
    dvc(project, "repro", "pretrain")
    edit(project, micro_batch_size=4, distribution={"kind": "ddp"}, keep=1)
    text = dvc(project, "repro", "pretrain")
    assert "Running stage 'pretrain'" in text
    assert "already made, its outputs are put in place" in text
    assert steps(the_run(project)) == [1, 2, 3, 4]
    assert "didn't change, skipping" in dvc(project, "repro", "pretrain")


def test_the_stage_that_is_always_done_again_takes_them_too(project: Path) -> None:
    (project / "tasks/prepare.py").write_text(PREPARE)
    stage = "  prepare:\n    cmd: python -m tasks.prepare\n    deps: [tasks/prepare.py]\n    params: [data]\n"
    (project / "dvc.yaml").write_text((project / "dvc.yaml").read_text().replace("stages:\n", f"stages:\n{stage}"))
    finish(program("tasks.prepare", "data.workers=1"))
    finish(program("tasks.prepare", "data.workers=2", "data.root=elsewhere"))
    assert the_run(project, "prepare").request["all_params"]["data"] == {"workers": 2, "root": "elsewhere"}
    assert (project / "times").read_text() == "once once "


@pytest.mark.slow
def test_a_longer_run_begins_from_the_shorter_ones_checkpoints(project: Path) -> None:
    dvc(project, "repro", "pretrain")
    shorter = the_run(project)
    (shorter.path / "recovery.json").write_text("[]")
    edit(project, max_steps=6, extend=True)
    text = dvc(project, "repro", "pretrain")
    longer = newest(project)
    assert f"{longer.key}: goes on from step 4 of {shorter.key}" in text
    assert "took 2.0 h" not in text  # as the toy says; this does nothing again
    assert steps(longer) == [5, 6]
    assert longer.request["extends"] == shorter.key
    assert (project / "models/pretrain/weights").read_text() == "hello pretrain 6 first"
    one, other = (run.path / "checkpoints/step-00000003/state.json" for run in (shorter, longer))
    assert one.stat().st_ino == other.stat().st_ino
    metrics = [json.loads(line)["step"] for line in (longer.path / "metrics.jsonl").read_text().splitlines()]
    assert metrics == [1, 2, 3, 4, 5, 6]
    assert (longer.path / "recovery.json").read_text() == "[]"
    assert len((shorter.path / "metrics.jsonl").read_text().splitlines()) == 4
    assert "already made" in finish(program("tasks.pretrain"))
    edit(project, max_steps=4, extend=False)
    assert "already made" in dvc(project, "repro", "pretrain")
    edit(project, max_steps=8, extend=True, micro_batch_size=2)
    assert f"goes on from step 6 of {longer.key}" in dvc(project, "repro", "pretrain")


def newest(project: Path) -> RunFolder:
    return next(all_runs(Project.at(project)))


def test_a_run_that_was_begun_anew_by_mistake_is_no_end_to_extending(project: Path) -> None:
    finish(program("tasks.pretrain"))
    os.environ["LLADAFLOW_YES"] = "1"
    try:
        (project / "mistake-pretrain-2").touch()
        text = text_of(program("tasks.pretrain", "pretrain.max_steps=6"), 2)
        (project / "mistake-pretrain-2").unlink()
    finally:
        del os.environ["LLADAFLOW_YES"]
    assert "the same at another length, has saved step 4: pretrain.extend: true goes on from there" in text
    finish(program("tasks.pretrain", "pretrain.max_steps=6", "pretrain.extend=true"))
    assert steps(newest(project)) == [5, 6]


def test_a_stopped_run_is_extended_and_one_at_work_is_not(project: Path) -> None:
    (project / "wait-pretrain-2").touch()
    first = program("tasks.pretrain")
    at_step(project, 2)
    key = the_run(project).key
    text = text_of(program("tasks.pretrain", "pretrain.max_steps=6", "pretrain.extend=true"), 2)
    assert f"{key}, which pretrain.extend goes on from, is still training: wait for its end, or `llada cancel" in text
    first.terminate()
    text_of(first, 143)
    (project / "wait-pretrain-2").unlink()
    finish(program("tasks.pretrain", "pretrain.max_steps=6", "pretrain.extend=true"))
    assert steps(newest(project)) == [3, 4, 5, 6]


def test_extend_without_anything_to_extend_is_a_run_like_any(project: Path) -> None:
    finish(program("tasks.pretrain", "pretrain.extend=true"))
    assert "already made" in finish(program("tasks.pretrain"))
    assert "already made" in finish(program("tasks.pretrain", "pretrain.extend=true"))
    text = finish(program("tasks.pretrain", "pretrain.max_steps=2", "pretrain.extend=true", LLADAFLOW_YES="1"))
    assert "has saved step 4: which is no shorter" in text
    assert steps(newest(project)) == [1, 2]


def test_another_stage_input_or_setting_is_no_shorter_run(project: Path) -> None:
    finish(program("tasks.pretrain"))
    for override in ("pretrain.learning_rate=0.25", "seed=2"):
        run = open_toy(project, "pretrain.max_steps=6", "pretrain.extend=true", override)
        assert not (run.path / "checkpoints").exists()
    (project / "inputs/text").write_text("other")
    run = open_toy(project, "pretrain.max_steps=6", "pretrain.extend=true")
    assert "extends" not in run.request


EVALUATE = """\
name: toy
stages: [evaluate]
evaluate: {benchmarks: [b1, b2], models: [one=MODEL/one, two=MODEL/two], batch_size: 8, limit: 3, overrides: {}}
"""


def test_an_evaluation_is_named_by_its_own_benchmark_and_by_what_its_models_hold(project: Path, tmp_path: Path) -> None:
    def key(models: str = "models", *overrides: str) -> str:
        (project / "params.yaml").write_text(EVALUATE.replace("MODEL", str(tmp_path / models)))
        params = stage_params(Project.at(project), list(overrides))
        return open_run(Project.at(project), load_stage(Project.at(project), "evaluate@b1", params), params).key

    spec = yaml.safe_load((project / "dvc.yaml").read_text())
    spec["stages"]["evaluate"]["do"]["params"] = [
        f"evaluate.{k}" for k in ("models", "batch_size", "limit", "overrides")
    ]
    (project / "dvc.yaml").write_text(yaml.safe_dump(spec))
    for name in ("one", "two"):
        (tmp_path / "models" / name).mkdir(parents=True)
        (tmp_path / "models" / name / "weights").write_text(name)
    first = key()
    (tmp_path / "models").rename(tmp_path / "moved")
    assert key("moved") == first
    assert key("moved", "evaluate.batch_size=2", "evaluate.root=elsewhere") == first
    assert key("moved", "evaluate.overrides={b2: {samples: 9}}") == first
    assert key("moved", "evaluate.overrides={b1: {samples: 9}}") != first
    assert key("moved", "evaluate.limit=4") != first
    for name, text in (("one", "two"), ("two", "one")):
        (tmp_path / "moved" / name / "weights").write_text(text)
    assert key("moved") != first, "the same weights under each other's labels"


def test_an_unknown_setting_is_still_refused(project: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'extend'"):
        open_toy(project, "pretrain.extended=true")
