"""A linear layer that multiplies with oneDNN where the default library is slow.

On CPUs other than Intel's, MKL's float32 product does without AVX-512: on an EPYC (Zen 5) 85 GFLOP/s against oneDNN's
200, forward and backward alike. Knows nothing of models.
"""

from typing import Any

import torch
from torch import Tensor, nn

SMALL = 1 << 16
"""Weights of fewer elements are left to the default: a call of oneDNN costs 10 microseconds more."""

AVAILABLE = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"


def _times_transposed(x_MK: Tensor, w_NK: Tensor) -> Tensor:
    """x @ w.T by oneDNN, float32; either may be a transposed view."""
    return torch.ops.mkldnn._linear_pointwise(x_MK, w_NK, None, "none", [], "")


class _Product(torch.autograd.Function):
    """x @ weight.T with its two gradients, all by oneDNN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _times_transposed(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows, grad_rows = x.flatten(0, -2), grad.flatten(0, -2)
        to_x = _times_transposed(grad_rows, weight.t()).view_as(x) if ctx.needs_input_grad[0] else None
        to_weight = _times_transposed(grad_rows.t(), rows.t()) if ctx.needs_input_grad[1] else None
        return to_x, to_weight


class Linear(nn.Linear):
    """`nn.Linear`, its product taken by oneDNN for large float32 weights on a CPU with AVX-512."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if (
            not AVAILABLE
            or weight.numel() < SMALL
            or not x.numel()
            or x.device.type != "cpu"
            or x.dtype != torch.float32
            or weight.dtype != torch.float32
            or torch.is_autocast_enabled("cpu")
        ):
            return super().forward(x)
        with_gradient = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        y = _Product.apply(x, weight) if with_gradient else _times_transposed(x, weight)
        return y if self.bias is None else y + self.bias
