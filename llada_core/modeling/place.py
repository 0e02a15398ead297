"""Where a model lies: this process's own GPU, several GPUs when one is too small, Apple's, or the CPU.

Everything that loads a model asks `place_for`.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import torch

from llada_core.settings import DEVICE_SETTING, DEVICES, Bits, require_package

ROOM = 1.3  # what a model that answers takes over its weights: activations, keys and values, a few rows of logits
GB = 2**30
SHARE = {4: 0.5 + 4 / 64, 8: 1.0}  # bytes of a quantised weight; nf4 has one fp32 scale for 64 of them


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of the weights: as they will lie, and at 4 bits."""

    weights: int
    at_4_bits: int = 0

    @classmethod
    def of(
        cls,
        stored: Mapping[str, tuple[tuple[int, ...], int]],
        dtype: torch.dtype | None = None,
        bits: int | None = None,
    ) -> "WeightBytes":
        """From each stored weight's shape and bytes a number.

        Quantised are the matrices of the blocks; experts, which lie in one table, and what is outside of the blocks are not.
        """
        totals = {None: 0.0, 4: 0.0, 8: 0.0}
        for name, (shape, size) in stored.items():
            count, size = int(torch.Size(shape).numel()), size if dtype is None else dtype.itemsize
            matrix = len(shape) == 2 and any(part.isdigit() for part in name.split("."))
            for kind in totals:
                small = kind is not None and matrix and ".experts." not in name
                totals[kind] += count * (SHARE[kind] if small and kind is not None else size)
        return cls(int(totals[bits]), int(totals[4]))


def _free_bytes(device: str) -> int:
    """What can be had on a device now, with what torch keeps there for itself."""
    kind, _, number = device.partition(":")
    if kind == "cuda":
        index = int(number)
        kept = torch.cuda.memory_reserved(index) - torch.cuda.memory_allocated(index)
        return torch.cuda.mem_get_info(index)[0] + kept
    if kind == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    return available_memory()


def available_memory() -> int:
    """Bytes of main memory that can be had without swapping (Linux), or a great many where that is not told."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 1 << 60
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def _own_rank() -> int | None:
    """This process's number among those of its launch on this machine; None where it is the only one."""
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    return None if alone else int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")))


@dataclass(frozen=True)
class Machine:
    """What this process sees: the number of GPUs, Apple's, its rank if it is one of several, bytes free on a device.

    `free` is asked of a GPU only when it matters, since the first question takes half a GB of it.
    """

    gpus: int = field(default_factory=lambda: torch.cuda.device_count())
    mps: bool = field(default_factory=torch.backends.mps.is_available)
    rank: int | None = field(default_factory=_own_rank)
    free: Callable[[str], int] = _free_bytes


@dataclass(frozen=True)
class Place:
    """Where a model will lie: on `device`, or spread over GPUs of which each may be filled with `spread` bytes."""

    device: str
    need: WeightBytes
    free: int  # bytes, on all of its devices
    spread: Mapping[int, int] | None = None

    @property
    def kind(self) -> str:
        """cuda, mps or cpu."""
        return self.device.partition(":")[0]

    def require_room(self) -> None:
        """`ValueError` where the model will not fit, before its weights are read."""
        if ROOM * self.need.weights > self.free:
            where = "memory" if self.kind == "cpu" else f"memory of {self.device}"
            raise ValueError(
                f"the model needs about {_gb(self.need.weights)} GB of {where}; {self.free / GB:.1f} GB are free"
            )


def kind_of(wanted: str = "auto", bits: int | None = None, machine: Machine | None = None) -> tuple[str, int | None]:
    """cuda, mps or cpu, and the number of a GPU if `wanted` names one. `auto`: LLADAFLOW_DEVICE, else the best there is.

    `ValueError`, in one line, for a device that there is not, and for `bits` where nothing computes with them.
    """
    machine = Machine() if machine is None else machine
    if bits not in (None, *get_args(Bits)):
        raise ValueError(f"bits is {bits}; 4 and 8 are supported")
    wanted = os.environ.get(DEVICE_SETTING) or "auto" if wanted == "auto" else wanted
    kind, _, number = wanted.partition(":")
    if kind == "auto":
        kind = "cuda" if machine.gpus else "mps" if machine.mps and bits is None else "cpu"
    if kind not in ("cuda", "mps", "cpu") or (number and not (kind == "cuda" and number.isdecimal())):
        raise ValueError(f"device {wanted!r} is none of {DEVICES}")
    if kind == "cuda" and not machine.gpus:
        raise ValueError(f"device {wanted}: no CUDA GPU is visible; use device='cpu' (--device cpu)")
    if number and int(number) >= machine.gpus:
        raise ValueError(f"device {wanted}: this process sees {machine.gpus} GPUs, cuda:0 to cuda:{machine.gpus - 1}")
    if kind == "mps" and not machine.mps:
        raise ValueError("device mps: this machine or this build of torch has no Apple GPU; use device='cpu'")
    if bits is not None and kind != "cuda":
        raise ValueError(f"bits={bits} needs a CUDA GPU, and the model goes to the {kind}; leave bits out")
    if bits is not None:
        require_package("bitsandbytes", "4bit", f"bits={bits}")
    return kind, int(number) if number else None


def checked_bits(device: str, bits: int | None) -> Bits | None:
    """A person's wish for quantised weights; `ValueError`, before anything is read, if `device` cannot have them."""
    kind_of(device, bits)
    return None if bits is None else 4 if bits == 4 else 8


def place_for(
    need: WeightBytes, wanted: str = "auto", bits: int | None = None, machine: Machine | None = None
) -> Place:
    """The place of a model. On a machine with GPUs: the one that was named, this rank's own, or the first with room;
    where no single one has it, all together. `ValueError` if there is none."""
    machine = Machine() if machine is None else machine
    kind, number = kind_of(wanted, bits, machine)
    if kind != "cuda":
        return Place(kind, need, machine.free(kind))
    own = number if number is not None else None if machine.rank is None else machine.rank % machine.gpus
    places = []
    for index in range(machine.gpus) if own is None else (own,):
        places.append(Place(f"cuda:{index}", need, machine.free(f"cuda:{index}")))
        if ROOM * need.weights <= places[-1].free:
            return places[-1]
    free = [place.free for place in places]
    if len(free) > 1 and ROOM * need.weights <= sum(free):
        require_package("accelerate", "train", "a model over several GPUs")
        # room for activations and keys is left on each; less than ROOM, as whole blocks do not divide evenly
        return Place("cuda:0", need, sum(free), {index: int(0.87 * each) for index, each in enumerate(free)})
    raise ValueError(_no_room(need, free, places[0].device, alone=machine.rank is None, bits=bits))


def _no_room(need: WeightBytes, free: list[int], device: str, *, alone: bool, bits: int | None) -> str:
    where = device if len(free) == 1 else f"{len(free)} GPUs together"
    ways = [] if bits is not None else [f"bits=4 (--bits 4), which needs {_gb(need.at_4_bits)} GB"]
    ways += [] if alone else ["a single process (launch.processes: 1), which spreads it over all GPUs"]
    told = f"the model needs about {_gb(need.weights)} GB of GPU memory; {sum(free) / GB:.1f} GB are free on {where}"
    return f"{told}; {', or '.join([*ways, 'device=cpu (--device cpu)'])}"


def positions_that_fit(one: Iterable[torch.Tensor], share: float = 0.5, machine: Machine | None = None) -> int:
    """How many canvas positions have keys and values in a `share` of what is free now on each of their devices.

    one: the keys and values of one position, all layers'. The rest is for activations and logits.
    """
    free, sizes = (machine or Machine()).free, dict[str, int]()
    for tensor in one:
        place = str(tensor.device)
        sizes[place] = sizes.get(place, 0) + tensor.nbytes
    return min(int(share * free(place)) // size for place, size in sizes.items())


def processes_for(
    needs: list[WeightBytes], wanted: str = "auto", bits: int | None = None, machine: Machine | None = None
) -> int:
    """How many processes answer requests best on this machine: one a GPU where each model fits on one, else one.

    All GPUs are taken to be as free as the first; a process whose own is not says so, and the others do its work.
    """
    machine = Machine() if machine is None else machine
    kind, number = kind_of(wanted, bits, machine)
    if kind != "cuda" or number is not None or machine.rank is not None or machine.gpus == 1:
        return 1
    return machine.gpus if ROOM * max(need.weights for need in needs) <= machine.free("cuda:0") else 1


def held_bytes() -> int:
    """Bytes that this process holds: in GPUs if it uses any, else in main memory (0 where that is not told)."""
    if torch.cuda.is_initialized():
        return sum(torch.cuda.memory_reserved(index) for index in range(torch.cuda.device_count()))
    if torch.backends.mps.is_available() and (taken := torch.mps.driver_allocated_memory()):
        return taken
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _gb(weights: int) -> str:
    return f"{ROOM * weights / GB:.1f}"
