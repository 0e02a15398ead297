"""Cross-entropy of a vocabulary projection without keeping all of its logits.

Knows hidden rows and target ids; does not know sequences, masks or weights of a loss.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

CHUNK_ELEMENTS = 1 << 25
"""Logits computed at a time; above this the rows are chunked and recomputed in the backward pass."""


Projection = Callable[[Tensor], Tensor]


def _nll(x_PD: Tensor, head: Projection, targets_P: Tensor) -> Tensor:
    return F.cross_entropy(head(x_PD).float(), targets_P, reduction="none")


def projected_nll(x_PD: Tensor, head: Projection, vocab_rows: int, targets_P: Tensor) -> Tensor:
    """-log p(target) of each row, (P,) fp32; with many rows in chunks, so that memory does not grow with P times V."""
    rows = max(1, CHUNK_ELEMENTS // vocab_rows)
    if x_PD.shape[0] <= rows:
        return _nll(x_PD, head, targets_P)
    chunks = zip(x_PD.split(rows), targets_P.split(rows), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([_nll(x, head, t) for x, t in chunks])
    return torch.cat([checkpoint(_nll, x, head, t, use_reentrant=False) for x, t in chunks])
