"""The linear layer, computed by the faster of the two exact fp32 matrix products that PyTorch has on a CPU.

PyTorch gives fp32 products on x86 to MKL, which on AMD processors runs at less than half of oneDNN's rate (a Zen 5
core, 189 x 1024 x 384: 95 against 230 GFLOP/s). Knows products; does not know what a layer is for. The choice depends
on the processor's maker and the shape alone, never on a measurement, so that runs repeat bit for bit.
"""

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_WORTH = 1 << 21
"""Multiply-adds above which oneDNN's set-up pays for itself; with the weight in its own order a quarter suffices."""


@functools.cache
def prefers_onednn() -> bool:
    """Whether this is an AMD processor, on which MKL is slow, and oneDNN is there."""
    cpuinfo = Path("/proc/cpuinfo")
    return torch.backends.mkldnn.is_available() and cpuinfo.is_file() and "AuthenticAMD" in cpuinfo.read_text()


def plain(x: Tensor, weight: Tensor) -> bool:
    """Whether both are ordinary CPU tensors of one dtype that nothing is about to cast, shard or trace."""
    return (
        x.dtype == weight.dtype
        and x.device.type == weight.device.type == "cpu"
        and type(weight) in (Tensor, nn.Parameter)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast turns the operands of products on `x`'s device into; None where it is off."""
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind):  # shapes alone, and other devices that torch has no autocast for
        return None
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _pays(x: Tensor, weight: Tensor) -> bool:
    large = x.numel() * weight.shape[0] >= _WORTH
    return large and weight.dtype == torch.float32 and prefers_onednn() and plain(x, weight)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`: x (..., I), weight (O, I), bias (O,) -> (..., O)."""
    # Compiled code takes the plain product without asking: the questions would be guards that a new size or dtype breaks.
    if torch.compiler.is_compiling() or not _pays(x, weight):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled():
        return _Product.apply(x, weight, bias)
    return _product(x, weight, bias)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Product(torch.autograd.Function):
    """oneDNN's product with its three gradients, which it computes itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            _product(rows, weight.t()).view_as(x) if of_x else None,
            _product(rows.t(), x.reshape(-1, x.shape[-1]).t()) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )


class Linear(nn.Linear):
    """`nn.Linear` through `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
