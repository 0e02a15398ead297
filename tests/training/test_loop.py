"""The loop from prepared data to an exported model: it learns, resumes exactly, and stops when asked."""

import json

import pytest
import torch

from llada_core.config.training import PretrainParams, SFTParams
from llada_core.modeling import load_model
from llada_core.training import loop
from llada_core.training.metrics import read_metrics
from llada_core.training.stages import Place, train
from tests.tiny import tiny_pair
from tests.training.data import write_data

KINDS = {"pretrain": PretrainParams, "sft": SFTParams}


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


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


def run(data, folder, stage="pretrain", follow=None, **changes):
    model, tokenizer = tiny_pair()
    receipt = train(
        params(stage, **changes), model, tokenizer, Place(data, folder, folder / "model"), seed=1, follow=follow
    )
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


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_a_stopped_run_goes_on_exactly(data, tmp_path, stage):
    run(data, tmp_path / "whole", stage)

    def stop_at_seven(line):
        if line["step"] == 7:
            (tmp_path / "cut" / "STOP").touch()

    receipt, _ = run(data, tmp_path / "cut", stage, follow=stop_at_seven)
    assert (receipt.finished, receipt.steps) == (False, 7)
    assert not (tmp_path / "cut" / "model").exists()
    receipt, _ = run(data, tmp_path / "cut", stage)
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
