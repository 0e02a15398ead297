"""Training on what a cached sampler sees: an answer half written, its prompt as it was before the first word.

Knows the mask predictor's cache; does not know noise, losses or steps.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from llada_core.modeling.cache import KVCache

CacheMaker = Callable[[int, int], KVCache]


class Glance(nn.Module):
    """A mask predictor that sees what stands before each row's column of `starts` (B,) through an earlier look's cache.

    The look, at the canvas (B, L) that was given, has no gradient. Fast-dLLM's caches (arXiv:2505.22618) make a sampler
    see its prompt so.
    """

    def __init__(
        self, model: nn.Module, new_cache: CacheMaker, canvas: Tensor, attention_mask: Tensor | None, starts: Tensor
    ) -> None:
        super().__init__()
        self.model, self.first, self.cache = model, int(starts.min()), new_cache(*canvas.shape)
        self.cache.kept = (torch.arange(canvas.shape[1]) < starts[:, None]).to(canvas.device)
        none = torch.zeros(0, dtype=torch.long, device=canvas.device)
        with torch.no_grad():
            model(canvas, attention_mask, positions=none, cache=self.cache)

    def forward(
        self,
        tokens: Tensor,
        attention_mask: Tensor | None = None,
        *,
        positions: Tensor,
        targets: Tensor,
        router_losses: bool = False,
    ) -> Any:
        """As the model's own for tokens (B, L) and positions (P,) in the flattened B*L, none before its row's start."""
        rows, length = tokens.shape
        slots = torch.arange(self.first, length, device=tokens.device).expand(rows, -1)
        positions = positions - self.first * (positions // length + 1)
        return self.model(
            tokens[:, self.first :],
            attention_mask,
            positions=positions,
            targets=targets,
            cache=self.cache,
            slots=slots,
            router_losses=router_losses,
        )
