"""`metrics.jsonl`: the truth of a run, one JSON object per line, only ever appended to.

After a resume or a roll-back a line says so, and what it undoes is dropped by `read_metrics`. Knows no model.
"""

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llada_core.files import complete, line_of, parsed
from llada_core.training.ranks import Ranks

Follower = Callable[[dict[str, Any]], None]


class MetricsFile:
    """Appends lines on the first rank; `follow` is called with each line as well."""

    def __init__(self, path: Path, ranks: Ranks, follow: Follower | None = None) -> None:
        self._path, self._first, self._follow = path, ranks.first, follow

    def write(self, step: int, values: Mapping[str, Any], file_name: str | None = None) -> None:
        """One line with step and time; a whole line in one write, so that readers never see half of one."""
        if not self._first:
            return
        line = {"step": step, "time": round(time.time(), 3), **values}
        path = self._path if file_name is None else self._path.with_name(file_name)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(handle, line_of(line).encode())
        finally:
            os.close(handle)
        if self._follow is not None and file_name is None:
            self._follow(line)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines that still hold: after a line with `back_to`, those of later steps are gone. A torn last line is skipped."""
    kept: list[dict[str, Any]] = []
    if not path.exists():
        return kept
    for text in complete(path.read_bytes()):
        try:
            line = parsed(text, str(path))
        except ValueError:
            continue
        if "back_to" in line:  # one that starts anew was killed before its first checkpoint
            kept = [old for old in kept if old["step"] <= line["back_to"] and line.get("event") != "started"]
        if line.get("validates_again"):  # the checkpoint did not know yet what its step's validation had found
            kept = [old for old in kept if old["step"] < line["back_to"] or not _validated(old)]
        kept.append(line)
    return kept


def _validated(line: Mapping[str, Any]) -> bool:
    return any(name.startswith("validation_") for name in line)


class Meter:
    """Adds up (sum, count) pairs on the device and gives their ratios, over all ranks, when asked."""

    def __init__(self) -> None:
        self._totals: dict[str, Tensor] = {}

    def add(self, parts: Mapping[str, Tensor]) -> None:
        """Each part is (2,) or (2, K): sums and counts, added up in float64 (float32 on mps, which has no other).

        Between two lines of a large run lie more tokens than float32 counts one by one.
        """
        for name, part in parts.items():
            wide = part if part.device.type == "mps" else part.to(torch.float64)
            self._totals[name] = self._totals[name].to(wide) + wide if name in self._totals else wide

    def take(self, ranks: Ranks) -> dict[str, float | list[float | None]]:
        """The ratios since the last call (None where nothing was counted); every rank must hold the same names."""
        names = sorted(self._totals)
        # With offload some lie on the CPU (the gradients' norm) and some on the GPU; one transfer brings all of them.
        devices = [self._totals[n].device for n in names]
        device = next((d for d in devices if d.type != "cpu"), torch.device("cpu"))
        parts = [self._totals[n].flatten().to(device, torch.float64, non_blocking=True) for n in names]
        flat = torch.cat(parts).tolist() if names else []
        flat, ratios = ranks.sum(flat), {}
        for name in names:
            size = self._totals[name].numel()
            part, flat = flat[:size], flat[size:]
            values = [s / c if c else None for s, c in zip(part[: size // 2], part[size // 2 :], strict=True)]
            ratios[name] = values if self._totals[name].ndim == 2 else values[0]
        self._totals = {}
        return {name: value for name, value in ratios.items() if value is not None}

    def state(self, ranks: Ranks) -> dict[str, list[Any]]:
        """What was added since the last `take`, over all ranks, as JSON: a stop in between loses nothing of the mean."""
        totals = sorted(self._totals.items())
        return {name: torch.tensor(ranks.sum(part.flatten().tolist())).view_as(part).tolist() for name, part in totals}

    def load_state(self, state: Mapping[str, list[Any]], ranks: Ranks) -> None:
        """Go on from `state`, which the first rank holds for all."""
        self._totals = {name: torch.tensor(part, dtype=torch.float64) * ranks.first for name, part in state.items()}
