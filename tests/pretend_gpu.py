"""A GPU that is not there: real numbers in CPU memory, a GPU's rules about them, and a count of the waits it would cost.

`OnGPU` tensors say that they lie on another device (torch's "meta", the only one that a CPU build lets autograd and
slicing work on). Within `PretendGPU` mixing them with CPU tensors raises, as CUDA does, and whatever makes the host wait
for the device is noted: reading a value, a shape that depends on values, a copy either way that is not asynchronous.
"""

import contextlib
from collections import Counter
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

GPU = torch.device("meta")
aten = torch.ops.aten
READS = {aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.item}
SHAPES = {aten.nonzero, aten.masked_select, aten.bincount, aten.unique_dim, aten._unique2, aten.unique_consecutive,
          aten.repeat_interleave}  # fmt: skip
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._unsafe_index, aten._index_put_impl_}


class OnGPU(Tensor):
    """A tensor of the pretended device; `numbers` holds its numbers."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, real: Tensor) -> "OnGPU":
        made = torch.Tensor._make_wrapper_subclass(
            cls, real.shape, strides=real.stride(), storage_offset=real.storage_offset(), dtype=real.dtype, device=GPU
        )
        made.numbers = real.detach()
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnGPU({self.numbers!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {}, Counter())


class PretendGPU(TorchDispatchMode):
    """`waits` counts by kind what made the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "PretendGPU":
        generator = torch.Generator  # which knows no "meta"
        drawn = mock.patch.object(torch, "Generator", side_effect=lambda device=None: generator())
        for context in (drawn, _Literals(self.waits)):
            self._stack.enter_context(context)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {}, self.waits)


class _Literals(TorchFunctionMode):
    """What happens above the operators: `torch.tensor([...], device=gpu)` and `tolist()` are copies that are waited for."""

    def __init__(self, waits: Counter[str]) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.tolist and isinstance(args[0], OnGPU):
            self.waits["copied out"] += 1
            return args[0].numbers.tolist()
        literal = func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], Tensor)
        if literal and _is_gpu(kwargs.get("device")):
            self.waits["copied in"] += 1
            kwargs.pop("device")
            return OnGPU(func(*args, **kwargs))
        return func(*args, **kwargs)


def _is_gpu(device: Any) -> bool:
    return device is not None and torch.device(device) == GPU


def _computed(func: Any, args: Any, kwargs: dict[str, Any], waits: Counter[str]) -> Any:
    """The result of an operator, computed on the CPU, after the rules have been applied."""
    operator = func.overloadpacket
    given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    there = [x for x in given if isinstance(x, OnGPU)]
    here = [x for x in given if not isinstance(x, OnGPU)]
    to_gpu = _is_gpu(kwargs["device"]) if kwargs.get("device") is not None else bool(there)
    if operator in (aten._to_copy, aten.copy_):
        source, to_gpu = (args[0], to_gpu) if operator is aten._to_copy else (args[1], isinstance(args[0], OnGPU))
        asynchronous = kwargs.get("non_blocking", args[2] if operator is aten.copy_ and len(args) > 2 else False)
        if isinstance(source, OnGPU) != to_gpu and (there or to_gpu) and not (to_gpu and asynchronous):
            waits["copied in" if to_gpu else "copied out"] += 1
    elif there:
        _note(operator, args, waits)
        if any(x.dim() > 0 for x in here) and operator not in INDEXED:
            raise RuntimeError(f"{func}: tensors of the GPU and of the CPU together")
    plain = {k: ("cpu" if k == "device" and v is not None else v) for k, v in kwargs.items()}
    result = func(*tree_map(_real, args), **tree_map(_real, plain))
    if operator in READS or not to_gpu:
        return result
    changed = {id(x.numbers): x for x in there}  # an operator in place gives back the tensor that it was given
    return tree_map(lambda x: changed.get(id(x), OnGPU(x)) if isinstance(x, Tensor) else x, result)


def _note(operator: Any, args: Any, waits: Counter[str]) -> None:
    if operator in READS:
        waits["read"] += 1
    if operator in SHAPES and not (operator is aten.repeat_interleave and len(args) > 1 and isinstance(args[1], int)):
        waits["shape"] += 1
    index = [x for x in args[1] if x is not None] if operator in INDEXED else []
    if any(x.dtype in (torch.bool, torch.uint8) for x in index):
        waits["shape"] += 1
    if any(not isinstance(x, OnGPU) for x in index):
        waits["copied in"] += 1


def _real(x: Any) -> Any:
    return x.numbers if isinstance(x, OnGPU) else x


def moved(module: nn.Module) -> nn.Module:
    """`module` with its parameters and buffers on the pretended device."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(OnGPU(parameter.data), requires_grad=parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = OnGPU(buffer)
    return module
