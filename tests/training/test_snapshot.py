"""A checkpoint in which another engine writes its own part, as DeepSpeed does under ZeRO."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import Shard

import llada_core.training.checkpoint as checkpoint_module
from llada_core.training.accelerator import Ranks
from llada_core.training.checkpoint import Checkpoints, Snapshot


class Splitting(nn.Linear):
    """Says of itself what DeepSpeed's engine does, and keeps its weights in a file."""

    def zero_optimization_stage(self):
        return 3

    def save_checkpoint(self, folder, tag, save_latest, exclude_frozen_parameters):
        (place := self.place(folder, tag)).parent.mkdir()
        torch.save(self.state_dict(), place)

    def load_checkpoint(self, folder, tag, load_module_strict, load_module_only=False, load_lr_scheduler_states=True):
        self.load_state_dict(torch.load(self.place(folder, tag)))
        return folder, {}

    def place(self, folder, tag):
        return Path(folder) / tag / "weights.pt"


def snapshot(folder, model):
    objective = SimpleNamespace(state=lambda: {"seen": torch.ones(1)}, load_state=lambda state: None)
    checkpoints = Checkpoints(folder / "run/checkpoints", Ranks(), keep=3)
    return Snapshot(checkpoints, model, torch.optim.AdamW(model.parameters()), objective, {})


def test_what_an_engine_writes_beside_is_hashed_and_read_back(tmp_path):
    model = Splitting(2, 2)
    kept = snapshot(tmp_path, model)
    for step in (1, 2):
        nn.init.constant_(model.weight, step)
        assert kept.save(step, {})
    nn.init.zeros_(model.weight)
    assert kept.restore()["step"] == 2
    assert model.weight.eq(2).all()
    kept.restore_weights(1)
    assert model.weight.eq(1).all()
    whole = next(tmp_path.rglob("step-00000002/zero/weights.pt"))
    whole.write_bytes(whole.read_bytes()[:-1] + b"?")
    assert kept.restore()["step"] == 1


def test_what_such_an_engine_could_not_read_is_an_error(tmp_path, monkeypatch):
    kept = snapshot(tmp_path, Splitting(2, 2))
    kept.save(1, {})
    monkeypatch.setattr(Splitting, "load_checkpoint", lambda *args, **kwargs: (None, {}))
    with pytest.raises(OSError, match="DeepSpeed could not read its part; go on with as many ranks"):
        kept.restore()


def test_a_run_does_not_change_between_such_an_engine_and_ours(tmp_path):
    snapshot(tmp_path / "a", Splitting(2, 2)).save(1, {})
    with pytest.raises(ValueError, match=r"was written by DeepSpeed: go on with the distribution\.kind"):
        snapshot(tmp_path / "a", nn.Linear(2, 2)).restore()
    snapshot(tmp_path / "b", nn.Linear(2, 2)).save(1, {})
    with pytest.raises(ValueError, match="was not written by DeepSpeed"):
        snapshot(tmp_path / "b", Splitting(2, 2)).restore()


def test_the_rows_of_a_sharded_tensor_are_those_that_distributing_gives(monkeypatch):
    """On a pretended mesh; the oracle is torch.chunk, which is how DTensor cuts rows."""
    monkeypatch.setattr(checkpoint_module, "DTensor", SimpleNamespace)
    whole = torch.arange(7)
    for ranks, rank in ((count, n) for count in (1, 2, 3, 5, 8) for n in range(count)):
        wanted = [*whole.chunk(ranks), *[whole[:0]] * ranks][rank]
        mesh = SimpleNamespace(size=[ranks].__getitem__, get_local_rank=[rank].__getitem__)
        tensor = SimpleNamespace(placements=(Shard(0),), shape=(7,), device_mesh=mesh, to_local=wanted.clone)
        start, stop = checkpoint_module.rows_held(tensor)
        assert whole[start:stop].equal(wanted)


@pytest.mark.parametrize(("cuts", "start", "stop"), [((7,), 2, 5), ((3, 4), 0, 7), ((3, 0, 4), 2, 4), ((3, 4), 7, 7)])
def test_rows_are_read_from_the_shards_that_hold_them(tmp_path, cuts, start, stop):
    whole = torch.randn(7, 2)
    for number, part in enumerate(whole.split(cuts)):
        save_file({"w": part.contiguous()}, tmp_path / f"shard-{number:05d}-of-{len(cuts):05d}.safetensors")
    stored = checkpoint_module.Stored(tmp_path)
    found = torch.full((stop - start, 2), torch.nan)
    for place, part in stored._parts("w", start, stop):
        found[place : place + len(part)] = part
    assert found.equal(whole[start:stop])
    target = torch.zeros(7, 2)
    stored.copy_into("w", target)
    assert target.equal(whole)
    with pytest.raises(ValueError, match=r"w: \(7, 2\) in the checkpoint, \(7, 3\) in this model"):
        stored.copy_into("w", torch.zeros(7, 3))
