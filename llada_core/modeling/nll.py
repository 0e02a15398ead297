"""Cross-entropy of a vocabulary projection in the memory of its logits alone, and without keeping all of them.

Knows hidden rows and target ids; does not know sequences, masks or weights of a loss.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

CHUNK_ELEMENTS = 1 << 28
"""Logits kept at a time; above this the rows are chunked and recomputed in the backward pass."""

CACHED_ELEMENTS = 1 << 20
"""Logits turned into probabilities at a time on a CPU: what stays in its cache."""


Projection = Callable[[Tensor], Tensor]


class _InPlaceNLL(torch.autograd.Function):
    """Cross-entropy whose logits become probabilities, and these the gradient, in one and the same memory.

    F.cross_entropy holds two such tables going forward and two going back. The caller gives its logits up.
    """

    @staticmethod
    def forward(ctx: Any, logits_PV: Tensor, targets_P: Tensor) -> Tensor:
        cached = logits_PV.device.type == "cpu" and type(logits_PV) is Tensor  # a pretended tensor stands for a GPU's
        rows = max(1, CACHED_ELEMENTS // logits_PV.shape[1]) if cached else max(1, len(logits_PV))
        parts = []
        for logits, targets in zip(logits_PV.split(rows), targets_P.split(rows), strict=True):
            total = logits.logsumexp(-1, keepdim=True)
            parts.append((total - logits.gather(-1, targets[:, None]))[:, 0])
            logits.sub_(total).exp_()
        # Saved, not kept as an attribute: what a checkpoint does not see, it cannot drop and compute again. A tensor of its
        # own, because an input that is saved must not change.
        ctx.save_for_backward(logits_PV.detach(), targets_P)
        ctx.taken = False
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_P: Tensor) -> tuple[Tensor, None]:
        if ctx.taken:
            raise RuntimeError("the gradient of a masked loss can be taken once; its logits are gone")
        ctx.taken = True
        table, targets_P = ctx.saved_tensors
        table.mul_(gradient_P[:, None])
        table.scatter_add_(-1, targets_P[:, None], -gradient_P[:, None])
        return table, None


def _nll(x_PD: Tensor, head: Projection, targets_P: Tensor) -> Tensor:
    logits = head(x_PD)
    targets_P = targets_P.to(logits.device)  # where GPUs share a model
    if not logits.requires_grad or len(targets_P) == 0 or torch.compiler.is_compiling():
        return F.cross_entropy(logits.float(), targets_P, reduction="none")
    return _InPlaceNLL.apply(logits.float(), targets_P)


def projected_nll(x_PD: Tensor, head: Projection, vocab_rows: int, targets_P: Tensor) -> Tensor:
    """-log p(target) of each row, (P,) fp32; with many rows in chunks, so that memory does not grow with P times V."""
    rows = max(1, CHUNK_ELEMENTS // vocab_rows)
    if x_PD.shape[0] <= rows:
        return _nll(x_PD, head, targets_P)
    chunks = zip(x_PD.split(rows), targets_P.split(rows), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([_nll(x, head, t) for x, t in chunks])
    return torch.cat([checkpoint(_nll, x, head, t, use_reentrant=False) for x, t in chunks])
