"""Interleaved timing: every entry once per round, ratios within a round, so that a busy machine tells the same story.

Processor seconds of this process (one thread) are the measure: they leave out the time that neighbours take.
"""

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of one entry in every round, and the ratios of a yardstick's seconds to them."""

    seconds: list[float]
    ratios: list[float]

    @property
    def ratio(self) -> float:
        """The median ratio: how many times faster than the yardstick."""
        return statistics.median(self.ratios)

    @property
    def spread(self) -> str:
        """Least and greatest ratio of any round."""
        return f"{min(self.ratios):.1f}-{max(self.ratios):.1f}"


def interleaved(entries: Mapping[str, Callable[[], object]], yardstick: str, rounds: int) -> dict[str, Timing]:
    """Runs every entry once to warm up, then `rounds` times in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in entries}
    for number in range(rounds + 1):
        for name, run in entries.items():
            began = time.process_time()
            run()
            if number:
                seconds[name].append(time.process_time() - began)
    base = seconds[yardstick]
    return {n: Timing(s, [b / own for b, own in zip(base, s, strict=True)]) for n, s in seconds.items()}


def matmul_rate(rows: int, dtype: torch.dtype, width: int = 384, out: int = 1024) -> float:
    """FLOP/s of the best of several products of (rows, width) by (width, out) through a linear layer."""
    layer = torch.nn.Linear(width, out, bias=False).to(dtype)
    x, best = torch.randn(rows, width, dtype=dtype), 0.0
    with torch.no_grad():
        for _ in range(30):
            began = time.process_time()
            for _ in range(20):
                layer(x)
            best = max(best, 20 * 2 * rows * width * out / (time.process_time() - began))
    return best


def machine() -> str:
    """The processor and what it has for low precision; one thread is used."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = (
        dict(line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line)
        if cpuinfo.is_file()
        else {}
    )
    known = {key.strip(): value.strip() for key, value in lines.items()}
    name, flags = known.get("model name", platform.machine()), known.get("flags", "").split()
    has = {"AMX": torch.cpu._is_amx_tile_supported(), "avx512_bf16": "avx512_bf16" in flags}
    told = ", ".join(f"{flag} {'yes' if there else 'no'}" for flag, there in has.items())
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, {told}, one thread"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
