"""Nothing is lost: damage, full disks, NaNs, stop requests, changed configurations, and kills at random moments."""

import os
import resource
import shutil
import signal
from contextlib import contextmanager

import pytest
import torch

import llada_core.training.checkpoint as checkpoint_module
import llada_core.training.train as export_module
from llada_core.modeling import load_model
from llada_core.modeling.families import LoraParams
from llada_core.training.checkpoint import damaged
from llada_core.training.loop import DivergedError
from llada_core.training.objectives import DiffusionObjective, Loss
from llada_core.training.progress import read_metrics
from llada_core.training.train import RunPaths, fingerprint_of, train
from tests.tiny import tiny_pair
from tests.training.kills import STAGES, prepared, survive
from tests.training.test_loop import losses, params, run


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("data"))


def events(folder):
    return [line for line in read_metrics(folder / "metrics.jsonl") if "event" in line]


def stop_at(folder, step, how=None):
    def follow(line):
        if line["step"] == step and "loss" in line:
            (how or (folder / "STOP").touch)()

    return follow


def test_sigterm_stops_within_a_step_and_saves(data, tmp_path):
    receipt, _ = run(data, tmp_path, follow=stop_at(tmp_path, 5, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert (receipt.finished, receipt.steps) == (False, 5)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert (tmp_path / "checkpoints" / "step-00000005").is_dir()


@pytest.mark.parametrize("how", ["flipped", "cut", "gone", "no manifest"])
def test_a_damaged_checkpoint_is_passed_over(data, tmp_path, how):
    run(data, tmp_path / "whole")
    run(data, tmp_path / "cut", follow=stop_at(tmp_path / "cut", 9))
    newest = tmp_path / "cut" / "checkpoints" / "step-00000009"
    shard = newest / "shard-00000-of-00001.safetensors"
    content = shard.read_bytes()
    if how == "flipped":
        shard.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    elif how == "cut":
        shard.write_bytes(content[: len(content) // 2])
    else:
        (shard if how == "gone" else newest / "manifest.json").unlink()
    assert damaged(newest)
    run(data, tmp_path / "cut")
    assert events(tmp_path / "cut")[-1] | {"time": 0} == {"event": "resumed", "back_to": 8, "step": 8, "time": 0}
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def break_loss(monkeypatch, steps, value):
    """The loss of these data steps becomes `value` times what it is."""
    real = DiffusionObjective.loss

    def broken(self, model, batch):
        loss = real(self, model, batch)
        step = int(batch.rows.numbers[0]) // self.params.batch_size  # rows are numbered through the run
        if step not in steps:
            return loss
        scale = torch.tensor([value, 1.0])
        return Loss(loss.sum * value, {n: part * scale if n == "loss" else part for n, part in loss.parts.items()})

    monkeypatch.setattr(DiffusionObjective, "loss", broken)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e4])
def test_a_diverged_loss_rolls_back_skips_the_data_and_slows_down(data, tmp_path, monkeypatch, value):
    break_loss(monkeypatch, {6}, value)
    receipt, model = run(data, tmp_path)
    (event,) = [line for line in events(tmp_path) if line["event"] == "rolled back"]
    assert (event["from"], event["back_to"], event["learning_rate_factor"]) == (7, 4, 0.25)
    assert receipt.finished
    assert receipt.steps == 12
    rates = {line["step"]: line["learning_rate"] for line in read_metrics(tmp_path / "metrics.jsonl") if "loss" in line}
    assert rates[5] == pytest.approx(0.25 * rates[4])
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_resume_after_a_recovery_is_exact(data, tmp_path, monkeypatch):
    break_loss(monkeypatch, {6}, float("nan"))
    run(data, tmp_path / "whole")
    run(data, tmp_path / "cut", follow=stop_at(tmp_path / "cut", 9))
    run(data, tmp_path / "cut")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_recovery_gives_up_and_says_where_to_look(data, tmp_path, monkeypatch):
    break_loss(monkeypatch, set(range(5, 99)), float("nan"))
    with pytest.raises(DivergedError, match=r"3 recoveries did not help; see .*metrics\.jsonl"):
        run(data, tmp_path)
    assert sum(line["event"] == "diverged" for line in events(tmp_path)) == 1


@contextmanager
def full_disk(size=10_000):
    """No file may grow beyond `size` bytes: the system's own error, in the libraries' own words."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_costs_a_checkpoint_not_the_run(data, tmp_path, monkeypatch):
    real, calls = checkpoint_module.save_file, []

    def full_once(tensors, path):
        calls.append(path)
        if len(calls) != 2:
            return real(tensors, path)
        with full_disk():
            return real(tensors, path)

    monkeypatch.setattr(checkpoint_module, "save_file", full_once)
    receipt, _ = run(data, tmp_path)
    assert receipt.finished
    assert [line["step"] for line in events(tmp_path) if line["event"] == "checkpoint failed"] == [4]
    assert not list((tmp_path / "checkpoints").glob(".partial*"))


def test_a_disk_that_stays_full_ends_the_run_with_the_last_checkpoint_intact(data, tmp_path, monkeypatch):
    run(data, tmp_path, follow=stop_at(tmp_path, 4))

    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_module, "save_file", full)
    with pytest.raises(OSError, match=r"could not be written \(disk full\?\)"):
        run(data, tmp_path)
    assert damaged(tmp_path / "checkpoints" / "step-00000004") is None


def test_on_a_full_disk_older_checkpoints_make_room_for_the_newest(data, tmp_path, monkeypatch):
    real, left = checkpoint_module.save_file, []

    def full_beside_three(tensors, path):
        left.append(sorted(folder.name[-2:] for folder in (tmp_path / "checkpoints").glob("step-*")))
        if len(left[-1]) > 1:
            raise OSError(28, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(checkpoint_module, "save_file", full_beside_three)
    receipt, _ = run(data, tmp_path)
    assert receipt.finished
    assert left == [[], ["00"], ["00", "04"], ["04"], ["04", "08"], ["08"]]
    assert not [line for line in events(tmp_path) if line["event"] == "checkpoint failed"]


def not_merging(model):
    raise ValueError("merging the adapter changes what blocks.0.q_proj computes")


def on_a_full_disk(write):
    def full(*given, **named):
        with full_disk():
            write(*given, **named)

    return full


ADAPTER = LoraParams(r=4)
AFTER_TRAINING = [
    (None, "save_model"),
    (ADAPTER, "save_adapter"),
    (ADAPTER, "merge_adapter"),
    (ADAPTER, "save_model"),
    (ADAPTER.model_copy(update={"merge": False}), "save_adapter"),
]


@pytest.mark.parametrize(("lora", "fails"), AFTER_TRAINING)
def test_what_fails_after_the_last_step_costs_no_training(data, tmp_path, monkeypatch, lora, fails):
    def trained(folder):
        model, tokenizer = tiny_pair()
        model.save_pretrained(tmp_path / "base")
        place = RunPaths(data, folder, folder / "model", base=str(tmp_path / "base"))
        return train(params("sft", lora=lora), model, tokenizer, place, seed=1)

    def exported(name):
        return load_model(tmp_path / name).state_dict()

    trained(tmp_path / "whole")
    whole = exported("whole/model")
    with monkeypatch.context() as patched:
        broken = not_merging if fails == "merge_adapter" else on_a_full_disk(getattr(export_module, fails))
        patched.setattr(export_module, fails, broken)
        with pytest.raises(OSError, match=r"trained to the end, .* same command") as told:
            trained(tmp_path / "cut")
    assert not list((tmp_path / "cut").glob("model*"))
    if lora and fails != "save_adapter":
        assert f"{tmp_path / 'cut' / 'adapter'} (`llada export FOLDER --merge" in str(told.value)
        rescued = exported("cut/adapter")
        assert all(torch.equal(whole[name], rescued[name]) for name in whole)
    monkeypatch.setattr(DiffusionObjective, "work", None)  # no step is taken
    trained(tmp_path / "cut")
    again = exported("cut/model")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_another_configuration_never_goes_on_with_a_run(data, tmp_path):
    run(data, tmp_path)
    with pytest.raises(ValueError, match=r"holds another run .configuration: "):
        run(data, tmp_path, learning_rate=1e-3)
    with pytest.raises(ValueError, match=r"holds another run .length: .* extend: true"):
        run(data, tmp_path, max_steps=16)
    receipt, _ = run(data, tmp_path, max_steps=16, extend=True)
    assert receipt.steps == 16


def test_free_settings_and_another_stages_data_are_no_other_run_but_its_own_data_is(data, tmp_path):
    mine = tmp_path / "data"
    shutil.copytree(data, mine)
    asked = params(
        activation_checkpointing=True, micro_batch_size=2, distribution={"kind": "ddp"}, keep=9, init_from="x"
    )
    before = fingerprint_of(params(), mine, 1)
    assert fingerprint_of(asked, mine, 1) == before
    (mine / "grpo").mkdir(exist_ok=True)
    (mine / "grpo/card.json").write_text("{}")
    assert fingerprint_of(params(extend=True), mine, 1) == before
    (mine / "pretrain/card.json").write_text("{}")
    assert {k for k, v in fingerprint_of(params(), mine, 1).items() if v != before[k]} == {"data"}


def test_a_checkpoint_of_another_model_is_refused(data, tmp_path):
    run(data, tmp_path, follow=stop_at(tmp_path, 4))
    model, tokenizer = tiny_pair(d_model=64)
    with pytest.raises(ValueError, match=r"\(300, 32\) in the checkpoint, \(300, 64\) in this model"):
        train(params(), model, tokenizer, RunPaths(data, tmp_path), seed=1)


def test_a_finished_run_is_not_trained_again(data, tmp_path):
    first, _ = run(data, tmp_path)
    again, model = run(data, tmp_path)
    assert again == first
    assert not model.training or all(torch.isfinite(p).all() for p in model.parameters())


def test_a_kill_in_the_middle_of_a_save(data, tmp_path):
    assert survive("sft", data, tmp_path, kills=2, seed=0)["kills"] == 2


@pytest.mark.faults
@pytest.mark.parametrize("stage", STAGES)
def test_kills_at_random_moments(data, tmp_path, stage):
    assert survive(stage, data, tmp_path, kills=5, seed=1)["kills"] == 5
