"""The loop from prepared data to an exported model: it learns, resumes exactly, and stops when asked."""

import json

import pytest
import torch

from llada_core.modeling import load_model
from llada_core.modeling.families import LoraParams
from llada_core.training import loop, objectives, preference
from llada_core.training.grpo import GRPO
from llada_core.training.loop import Loop
from llada_core.training.params import GRPOParams, PreferenceParams, PretrainParams, SFTParams
from llada_core.training.progress import read_metrics
from llada_core.training.train import RunPaths, train
from tests.tiny import tiny_pair
from tests.training.data import write_data
from tests.training.test_grpo import SAMPLING, by_weights, write_prompts
from tests.training.test_preference import write_pairs

KINDS = {"pretrain": PretrainParams, "sft": SFTParams, "preference": PreferenceParams}


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return write_pairs(write_prompts(write_data(tmp_path_factory.mktemp("data"))))


def params(stage="pretrain", **changes):
    values = {
        "max_steps": 12,
        "batch_size": 16,
        "learning_rate": 3e-3,
        "log_every": 1,
        "save_every": 4,
        "warmup": 2,
        "samples": 0,
    }
    return KINDS[stage](**{**values, **changes})


def run(data, folder, stage="pretrain", follow=None, kind="llada", **changes):
    model, tokenizer = tiny_pair(kind)
    place = RunPaths(data, folder, folder / "model", base="../base")
    receipt = train(params(stage, **changes), model, tokenizer, place, seed=1, follow=follow)
    return receipt, model


def losses(folder):
    return {line["step"]: line["loss"] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line}


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_it_learns_and_exports(data, tmp_path, stage):
    receipt, model = run(data, tmp_path, stage, max_steps=40, samples=1)
    found = losses(tmp_path)
    assert receipt.finished
    assert receipt.steps == 40
    assert found[40] < 0.8 * found[1]
    assert (tmp_path / "samples.jsonl").read_text().count("expected") == 1
    exported = load_model(tmp_path / "model")
    ids = torch.arange(10, 20)[None]
    torch.testing.assert_close(exported(ids).logits, model.eval()(ids).logits)


EXPERTS = {"kind": "llada_moe", "lora": LoraParams(r=2, experts=True)}


@pytest.mark.parametrize(("stage", "changes"), [("pretrain", {}), ("sft", {}), ("sft", EXPERTS)])
def test_a_stopped_run_goes_on_exactly(data, tmp_path, stage, changes):
    run(data, tmp_path / "whole", stage, **changes)

    def stop_at_seven(line):
        if line["step"] == 7:
            (tmp_path / "cut" / "STOP").touch()

    receipt, _ = run(data, tmp_path / "cut", stage, follow=stop_at_seven, **changes)
    assert (receipt.finished, receipt.steps) == (False, 7)
    assert not (tmp_path / "cut" / "model").exists()
    receipt, _ = run(data, tmp_path / "cut", stage, **changes)
    assert receipt.finished
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    whole, cut = (load_model(tmp_path / name / "model").state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_a_stop_between_two_log_lines_leaves_their_means_as_they_were(data, tmp_path, monkeypatch):
    run(data, tmp_path / "whole", log_every=4)
    rate = loop.learning_rate

    def stop_at_six(params, step, share):
        if step == 5:
            (tmp_path / "cut" / "STOP").touch()
        return rate(params, step, share)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "learning_rate", stop_at_six)
        receipt, _ = run(data, tmp_path / "cut", log_every=4)
    assert (receipt.finished, receipt.steps) == (False, 6)
    run(data, tmp_path / "cut", log_every=4)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_what_a_run_wrote_before_it_was_started_anew_is_gone(tmp_path):
    lines = [{"step": 0, "event": "started", "back_to": 0}, {"step": 0, "validation_correct": 0.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, *lines]))
    assert read_metrics(tmp_path / "metrics.jsonl") == lines


class KilledError(Exception):
    """In place of SIGKILL: nothing that a run has in memory outlives it."""


def policy(data, folder, follow=None):
    """A policy run that validates at every step and saves at every second one."""
    model, tokenizer = tiny_pair()
    params = GRPOParams(
        max_steps=8, prompts=2, generations=3, iterations=3, sampling=SAMPLING, learning_rate=3e-3, log_every=1, keep=1,
        save_every=2, validate_every=1, samples=0, beta=0.0, patience=6, reward="tests.training.test_grpo.likes_low_ids",
    )  # fmt: skip
    receipt = train(params, model, tokenizer, RunPaths(data, folder), seed=1, follow=follow)
    return receipt, model.state_dict()


def measured(folder):
    """What a run's metrics say, without what depends on the clock."""
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if line.get("event") != "resumed"]
    clock = ("time", "seconds", "steps_per_second", "tokens_per_second", "flops_per_second", "memory_gb")
    return [{name: value for name, value in line.items() if name not in clock} for line in lines]


def by_seen_weights(policy, model, *_):
    """A score that goes up and down with the weights, and is best in the middle."""
    return {"validation_correct": 1 - by_weights(policy, model)["validation_correct"] * torch.tensor([1.0, 0.0])}


@pytest.fixture(scope="session")
def undisturbed(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(GRPO, "validate", by_seen_weights)
        receipt, weights = policy(data, folder)
    assert receipt.steps == 8
    return measured(folder), weights


MOMENTS = [("before it", step) for step in (1, 2, 4, 8)]
MOMENTS += [("before it is noted", step) for step in (2, 3, 8)] + [("after it is noted", step) for step in (4, 8)]


@pytest.mark.parametrize(("moment", "step"), MOMENTS)
def test_a_kill_around_a_validation_changes_nothing(data, undisturbed, tmp_path, monkeypatch, moment, step):
    lines, whole = undisturbed
    print([(line["best_step"], line["validation_correct"]) for line in lines if "best_step" in line])
    assert 0 < lines[-1]["best_step"] < 8
    monkeypatch.setattr(GRPO, "validate", by_seen_weights)
    asked, real = [], Loop._note

    def validates(objective, model, *_):
        asked.append(1)
        if moment == "before it" and len(asked) == step + 1:  # the first is that of the weights it begins with
            raise KilledError
        return by_seen_weights(objective, model)

    def validated(line):
        if moment == "before it is noted" and line["step"] == step and "validation_correct" in line:
            raise KilledError

    def noted(loop):
        real(loop)
        if moment == "after it is noted" and loop.progress.step == step:
            raise KilledError

    with monkeypatch.context() as patched:
        patched.setattr(GRPO, "validate", validates)
        patched.setattr(Loop, "_note", noted)
        with pytest.raises(KilledError):
            policy(data, tmp_path, validated)
    saved = tmp_path / "checkpoints" / f"step-{step:08d}"
    assert saved.exists() == (step % 2 == 0)  # before what could run out of memory
    receipt, weights = policy(data, tmp_path)
    assert receipt.finished
    assert measured(tmp_path) == lines
    assert all(torch.equal(whole[name], weights[name]) for name in whole)


def test_a_resume_does_not_validate_what_was_validated(data, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(GRPO, "validate", lambda *a: asked.append(1) or by_weights(*a))
    policy(data, tmp_path)
    asked.clear()
    policy(data, tmp_path)
    assert not asked


@pytest.mark.parametrize(
    ("stage", "home", "rows"),
    [("pretrain", objectives, 4), ("sft", objectives, 4), ("preference", preference, 4 * 2 * 3)],
)
def test_validation_takes_no_more_rows_at_once_than_training(data, tmp_path, monkeypatch, stage, home, rows):
    largest, real = [], home.masked_nll
    monkeypatch.setattr(
        home, "masked_nll", lambda m, noisy, *a, **k: largest.append(len(noisy)) or real(m, noisy, *a, **k)
    )
    figures = {}
    more = {"mask_samples": 3} if stage == "preference" else {}
    for micro in (None, 4):
        largest.clear()
        run(data, tmp_path / str(micro), stage, max_steps=1, micro_batch_size=micro, validation_rows=7, **more)
        found = read_metrics(tmp_path / str(micro) / "metrics.jsonl")[-1]
        figures[micro] = {name: value for name, value in found.items() if "validation" in name}
    assert max(largest) == rows
    assert figures[4] == pytest.approx(figures[None], rel=1e-6)
    assert figures[4]
