"""Everything a run needs to go on, as files that cannot be half-written."""

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from llada_core.files import file_hash
from llada_core.training.accelerator import Ranks
from llada_core.training.objectives import Objective

# Every rank writes the rows it holds (safetensors, sharded along the first dimension), so that a run resumes on any
# other number of ranks; it reads the rows that it will hold and no others. No pickle.

_log = logging.getLogger(__name__)
_MANIFEST = "manifest.json"
_STATE = "state.json"
_NOTE = "note.json"


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(self, folder: Path, ranks: Ranks, *, keep: int, milestone_every: int = 0) -> None:
        self.folder, self.ranks, self.keep, self.milestone_every = folder, ranks, keep, milestone_every

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        *,
        also_keep: int | None = None,
        beside: Callable[[str], object] | None = None,
    ) -> bool:
        """Write one checkpoint; False when a rank could not write, for example on a full disk, though room was made.

        Of older ones the last `keep`, the milestones and that of step `also_keep` stay. `beside` is called on every
        rank with the folder and may write folders of its own into it.
        """
        written = self._try(step, tensors, state, beside)
        # On a full disk this one is worth more than those that the newest has replaced.
        if not written and self.ranks.any(self.ranks.first and self._made_room(also_keep)):
            written = self._try(step, tensors, state, beside)
        if written and self.ranks.first:
            self._prune(also_keep, self.keep)
        return written

    def _try(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        beside: Callable[[str], object] | None,
    ) -> bool:
        target = self.folder / f"step-{step:08d}"
        # Beside the target, on the same file system: the rename that publishes it cannot be half done.
        partial = self.folder / f".partial-step-{step:08d}"
        if self.ranks.first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True, exist_ok=True)
        self.ranks.barrier()
        # All or none: a checkpoint that lacks a rank's rows is no checkpoint, and a rank that goes on alone waits for ever.
        written = self.ranks.all(self._write_shard(partial, tensors, beside))
        if written and self.ranks.first:
            written = self._publish(partial, target, {**state, "step": step})
        written = self.ranks.all(written)
        if not written and self.ranks.first:
            shutil.rmtree(partial, ignore_errors=True)
        return written

    def _made_room(self, also_keep: int | None) -> bool:
        """Whether checkpoints before the newest could go; none goes unless the newest is whole."""
        before = sorted(self.folder.glob("step-*"))
        # The newest is what the run would go on from, so it stays; and unless it is whole an older one may be needed.
        if len(before) > 1 and damaged(before[-1]) is None:
            self._prune(also_keep, 1)
        return len(list(self.folder.glob("step-*"))) < len(before)

    def newest(self) -> Path | None:
        """The newest checkpoint whose files all match their hashes; damaged ones are reported and passed over.

        All ranks call this at once and get the same: the first says which there are, each hashes its share of the files.
        """
        first = self.ranks.first
        steps = sorted(float(folder.name[5:]) for folder in self.folder.glob("step-*")) if first else []
        while True:
            # Ranks may see a shared folder at different times: what the first one found is what all talk about.
            mine = 0.0 if not first else steps.pop() if steps else -1.0
            step = int(self.ranks.sum([mine])[0])
            if step < 0:
                return None
            folder = self.folder / f"step-{step:08d}"
            damage = self.damage(folder)
            if damage is None:
                return folder
            _log.warning("checkpoint %s is damaged (%s); using an older one", folder.name, damage)

    def damage(self, folder: Path) -> str | None:
        """What is wrong with a checkpoint, None when nothing is. All ranks call this at once, and each file is read once.

        A rank hashes the shard of its own number, most of which it then reads from its node's memory.
        """
        found = damaged(folder, self.ranks.index, self.ranks.count)
        return (found or "another rank found it so") if self.ranks.any(found is not None) else None

    def _write_shard(
        self, partial: Path, tensors: Mapping[str, Tensor], beside: Callable[[str], object] | None
    ) -> bool:
        mine = {name: t for name, t in ((n, self._rows_here(t)) for n, t in tensors.items()) if t is not None}
        path = partial / f"shard-{self.ranks.index:05d}-of-{self.ranks.count:05d}.safetensors"
        try:
            save_file(mine, path)
            _sync(path)
            # Each rank hashes what it wrote: the first one would have to read every shard again.
            _write(path.with_suffix(".sha256"), file_hash(path))
            if beside is not None:
                beside(str(partial))
        except (OSError, RuntimeError, SafetensorError) as error:  # the last is how safetensors reports a full disk
            _log.error("checkpoint %s not written: %s", path, error)
            return False
        return True

    def _rows_here(self, tensor: Tensor) -> Tensor | None:
        if isinstance(tensor, DTensor):
            # Contiguous: safetensors refuses views of other memory.
            return tensor.to_local().detach().cpu().contiguous()
        # What every rank holds whole is written once.
        return tensor.detach().cpu().contiguous() if self.ranks.first else None

    def _publish(self, partial: Path, target: Path, state: Mapping[str, Any]) -> bool:
        try:
            _write(partial / _STATE, json.dumps(state, sort_keys=True, indent=1))
            hashes = {_STATE: file_hash(partial / _STATE)}
            for path in partial.glob("*.sha256"):
                hashes[path.with_suffix(".safetensors").name] = path.read_text(encoding="utf-8")
                path.unlink()
            for path in (path for path in sorted(partial.glob("*/**/*")) if path.is_file()):
                _sync(path)
                hashes[str(path.relative_to(partial))] = file_hash(path)
            # Last of all: a folder without a manifest was not finished, whatever else is in it.
            _write(partial / _MANIFEST, json.dumps(hashes, sort_keys=True, indent=1))
            # The same step again, after a roll-back: what stood there belongs to steps that were undone.
            if target.exists():
                shutil.rmtree(target)
            # Then the folder: until it is on the disk as well, a power cut undoes the rename.
            os.replace(partial, target)
            _sync(self.folder)
        except OSError as error:
            _log.error("checkpoint %s not written: %s", target, error)
            return False
        return True

    def _prune(self, also_keep: int | None, keep: int) -> None:
        for folder in sorted(self.folder.glob("step-*"))[:-keep]:
            step = int(folder.name[5:])
            if step != also_keep and not (self.milestone_every and step % self.milestone_every == 0):
                shutil.rmtree(folder)


def damaged(folder: Path, share: int = 0, shares: int = 1) -> str | None:
    """What is wrong with a checkpoint folder; None when every file (of one of several shares) matches its hash."""
    try:
        hashes = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        wrong = [name for name in sorted(hashes)[share::shares] if file_hash(folder / name) != hashes[name]]
    except (OSError, ValueError) as error:
        return str(error)
    return f"wrong hash: {', '.join(wrong)}" if wrong else None


def read_state(folder: Path) -> dict[str, Any]:
    """The small state stored beside the tensors, with what was noted since."""
    state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
    noted = folder / _NOTE
    return state | (json.loads(noted.read_text(encoding="utf-8")) if noted.exists() else {})


def note(folder: Path, state: Mapping[str, Any]) -> None:
    """New values for parts of a checkpoint's state, which appear by rename; on a full disk the old ones stay."""
    partial = folder / f".{_NOTE}"
    try:
        # A file of its own: the state's hash stands in the manifest already, and stays true.
        _write(partial, json.dumps(state, sort_keys=True))
        os.replace(partial, folder / _NOTE)
        _sync(folder)
    except OSError as error:
        _log.warning("%s: what came after it was not noted (%s), and is found out again on a resume", folder, error)


class Stored:
    """The tensors of one checkpoint, put together from all its shards one at a time.

    Shards are mapped, not read: what several ranks of a node need comes from the disk once.
    """

    def __init__(self, folder: Path) -> None:
        self._files = [safe_open(path, framework="pt") for path in sorted(folder.glob("shard-*.safetensors"))]
        self._where: dict[str, list[int]] = {}
        for number, file in enumerate(self._files):
            for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                self._where.setdefault(name, []).append(number)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def names(self, prefix: str) -> Iterator[str]:
        """The stored names that start with `prefix`."""
        return (name for name in self._where if name.startswith(prefix))

    def full(self, name: str) -> Tensor:
        """A whole tensor; raises KeyError when the checkpoint has none of this name."""
        parts = [self._files[number].get_tensor(name) for number in self._where[name]]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def copy_into(self, name: str, target: Tensor) -> None:
        """Fill `target` (whole or sharded) with a stored tensor; raises ValueError when the shapes differ."""
        if name not in self:
            raise ValueError(f"the checkpoint has no {name!r}: it belongs to another model")
        shape = self._shape(name)
        if shape != tuple(target.shape):
            raise ValueError(f"{name}: {shape} in the checkpoint, {tuple(target.shape)} in this model")
        rows = rows_held(target)
        with torch.no_grad():
            if rows is not None:
                local = target.to_local() if isinstance(target, DTensor) else target
                for place, part in self._parts(name, *rows):
                    local[place : place + len(part)].copy_(part)
            elif isinstance(target, DTensor):
                full = self.full(name).to(target.device)
                # No source rank: each has read the whole, and nothing needs to be sent.
                shard = distribute_tensor(full, target.device_mesh, target.placements, src_data_rank=None)
                target.to_local().copy_(shard.to_local())
            else:
                target.copy_(self.full(name))

    def _shape(self, name: str) -> tuple[int, ...]:
        shapes = [self._files[number].get_slice(name).get_shape() for number in self._where[name]]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:]) if shapes[0] else ()

    def _parts(self, name: str, start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
        """Rows `start` to `stop` as the shards hold them, each part with its place among these rows."""
        first = 0
        for number in self._where[name]:
            shard = self._files[number].get_slice(name)
            count = shard.get_shape()[0]
            low, high = max(start - first, 0), min(stop - first, count)
            if low < high:
                yield first + low - start, shard[low:high]
            first += count


def rows_held(tensor: Tensor) -> tuple[int, int] | None:
    """The first row of `tensor` that this rank holds and the one behind its last; None where that is no run of rows."""
    if not isinstance(tensor, DTensor):
        return (0, len(tensor)) if tensor.ndim else None
    split = [(axis, p) for axis, p in enumerate(tensor.placements) if not p.is_replicate()]
    # Several axes of a mesh, or a cut through columns: no run of rows, so it is put together whole and cut again.
    if len(split) != 1 or type(split[0][1]) is not Shard or split[0][1].dim != 0:
        return None
    axis, rows = split[0][0], tensor.shape[0]
    each = -(-rows // tensor.device_mesh.size(axis))  # as torch.chunk cuts, the last ranks may have fewer, or none
    start = min(tensor.device_mesh.get_local_rank(axis) * each, rows)
    stop = min(start + each, rows)
    return (start, stop) if stop - start == tensor.to_local().shape[0] else None


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# What DeepSpeed splits it writes and reads itself, in a folder of its own within ours.

# AdamW's two, and Muon's.
_MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")
_ZERO = "zero"
_WRAPPERS = ("module.", "_orig_mod.", "_checkpoint_wrapped_module.")


class Snapshot:
    """Saves and restores the parts of a run in place."""

    def __init__(  # noqa: PLR0913 - the parts of a run
        self,
        checkpoints: Checkpoints,
        model: nn.Module,
        optimiser: torch.optim.Optimizer,
        objective: Objective,
        fingerprint: Mapping[str, str],
        *,
        extend: bool = False,
        buffers: Mapping[str, Tensor] | None = None,
    ) -> None:
        """`buffers`: those that training moves, by name, the same on all ranks."""
        self._buffers = {} if buffers is None else buffers
        self._checkpoints, self._model, self._optimiser, self._objective = checkpoints, model, optimiser, objective
        self._fingerprint, self._extend = dict(fingerprint), extend

    def save(self, step: int, state: Mapping[str, Any], *, also_keep: int | None = None) -> bool:
        """Write a checkpoint and keep that of step `also_keep` too; False when it could not be written."""
        tensors: dict[str, Tensor] = {f"objective.{name}": t for name, t in self._objective.state().items()}
        tensors |= {f"buffer.{name}": buffer for name, buffer in self._buffers.items()}
        state = {**state, "updates": 0, "fingerprint": self._fingerprint}
        if self._zero is not None:
            write = partial(self._zero.save_checkpoint, tag=_ZERO, save_latest=False, exclude_frozen_parameters=True)
            return self._checkpoints.save(step, tensors, state, also_keep=also_keep, beside=write)
        for name, parameter in self._trainable().items():
            slots = self._optimiser.state.get(parameter, {})
            tensors[f"model.{name}"] = parameter
            tensors |= {f"optimiser.{moment}.{name}": slots[moment] for moment in _MOMENTS if moment in slots}
        return self._checkpoints.save(step, tensors, {**state, "updates": self._updates()}, also_keep=also_keep)

    def note(self, step: int, state: Mapping[str, Any]) -> None:
        """Change parts of the state of a checkpoint that was written; where that fails, the state stays as it was."""
        if self._checkpoints.ranks.first:
            note(self._checkpoints.folder / f"step-{step:08d}", state)

    def restore(self) -> dict[str, Any] | None:
        """Go back to the newest valid checkpoint and return its state; None when there is none.

        Raises ValueError when it belongs to a run of another configuration, to another model, or DeepSpeed wrote it and
        does not run now (or the other way round).
        """
        folder = self._checkpoints.newest()
        if folder is None:
            return None
        state = read_state(folder)
        self._check(state["fingerprint"], folder.parent.parent.name)
        stored = Stored(folder)
        if not self._load_zero(folder):
            self._copy_weights(stored)
            self._restore_moments(stored, state["updates"])
        self._copy_buffers(stored)
        prefix = "objective."
        self._objective.load_state({name.removeprefix(prefix): stored.full(name) for name in stored.names(prefix)})
        return state

    def restore_weights(self, step: int) -> None:
        """The weights of one kept step and nothing else; raises OSError when its checkpoint is damaged."""
        folder = self._checkpoints.folder / f"step-{step:08d}"
        damage = self._checkpoints.damage(folder)
        if damage is not None:
            raise OSError(
                f"{folder}, the best step by validation, is damaged ({damage}); remove the checkpoints from this one on "
                "and run again: what they held is trained anew"
            )
        stored = Stored(folder)
        if not self._load_zero(folder, load_module_only=True):
            self._copy_weights(stored)
        self._copy_buffers(stored)

    @property
    def _zero(self) -> Any:
        """DeepSpeed's engine, where it is what trains."""
        return self._model if hasattr(self._model, "zero_optimization_stage") else None

    def _load_zero(self, folder: Path, *, load_module_only: bool = False) -> bool:
        """Whether DeepSpeed has read its part of a checkpoint; raises ValueError when only one of the two is there."""
        if (self._zero is not None) != (folder / _ZERO).is_dir():
            raise ValueError(
                f"{folder} was {'not ' if self._zero else ''}written by DeepSpeed: go on with the distribution.kind that "
                "began the run, or start a new one from its weights with init_from"
            )
        if self._zero is not None:
            only = {"load_module_only": True} if load_module_only else {"load_lr_scheduler_states": False}
            # Our learning rate follows from the step; a scheduler's state of DeepSpeed would be a second opinion.
            read, _ = self._zero.load_checkpoint(str(folder), tag=_ZERO, load_module_strict=False, **only)
            if read is None:  # DeepSpeed only warns, and would train on with other weights
                raise OSError(f"{folder}: DeepSpeed could not read its part; go on with as many ranks as wrote it")
        return self._zero is not None

    def _copy_weights(self, stored: Stored) -> None:
        for name, parameter in self._trainable().items():
            stored.copy_into(f"model.{name}", parameter.data)

    def _copy_buffers(self, stored: Stored) -> None:
        for name, buffer in self._buffers.items():
            stored.copy_into(f"buffer.{name}", buffer)

    def _restore_moments(self, stored: Stored, updates: int) -> None:
        for name, parameter in self._trainable().items():
            # Before new moments are made: old and new together would be twice the optimiser's memory.
            self._optimiser.state.pop(parameter, None)
            moments = {m: torch.zeros_like(parameter) for m in _MOMENTS if f"optimiser.{m}.{name}" in stored}
            for moment, tensor in moments.items():
                stored.copy_into(f"optimiser.{moment}.{name}", tensor)
            if "exp_avg" in moments:
                # AdamW corrects its bias by the number of updates, which is one figure for all parameters here.
                moments["step"] = torch.tensor(float(updates), device=parameter.device)
            if moments:
                self._optimiser.state[parameter] = moments

    def _updates(self) -> int:
        return next((int(slots["step"]) for slots in self._optimiser.state.values() if "step" in slots), 0)

    def _trainable(self) -> dict[str, nn.Parameter]:
        found = {}
        for name, parameter in self._model.named_parameters():
            for wrapper in _WRAPPERS:
                name = name.replace(wrapper, "") if wrapper != "module." else name.removeprefix(wrapper)
            if parameter.requires_grad:
                found[name] = parameter
        return found

    def _check(self, found: Mapping[str, str], run: str) -> None:
        may_differ = {"length"} if self._extend else set()
        compared = {*found, *self._fingerprint} - may_differ
        different = sorted(k for k in compared if found.get(k) != self._fingerprint.get(k))
        if different:
            what = "; ".join(f"{k}: {found.get(k)} there, {self._fingerprint.get(k)} now" for k in different)
            raise ValueError(
                f"run folder {run} holds another run ({what}); use a new folder, start from its weights "
                "with init_from, or to train the same run for longer set extend: true"
            )
