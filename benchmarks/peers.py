"""One step of ML-GSAI's sampler and one of Fast-dLLM's dual cache, in plain code over our weights, on any device.

The oracle holds the layers (`benchmarks.oracle.Reference`); here stands what a step does around them. As in theirs, the
whole vocabulary is projected at every position that is fed, and logits are judged in float64 where Fast-dLLM does.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.oracle import Reference
from llada_core.modeling.families import ModelParams
from llada_core.modeling.predictor import MaskPredictor


def reference_of(model: MaskPredictor, params: ModelParams) -> Reference:
    """The oracle over the model's own weights."""
    weights = {name: value.detach() for name, value in model.state_dict().items()}
    return Reference(weights, params.n_heads, params.rope_theta, params.rms_norm_eps)


def canvas_of(model: MaskPredictor, prompts: Tensor, new: int) -> Tensor:
    """(B, P + new): prompts, then masks."""
    masks = torch.full((len(prompts), new), model.special_tokens.mask_id, device=prompts.device)
    return torch.cat([prompts, masks], 1)


def commit(logits: Tensor, tokens: Tensor, is_open: Tensor, dtype: torch.dtype) -> Tensor:
    """The surest proposal of each row is written (low-confidence remasking); tokens (B, W), logits (B, W, V)."""
    proposals = logits.argmax(-1)
    sure = F.softmax(logits.to(dtype), -1).gather(-1, proposals[..., None])[..., 0]
    chosen = sure.masked_fill(~is_open, -torch.inf).topk(1, -1).indices
    return tokens.scatter(1, chosen, proposals.gather(1, chosen))


def exact_step(
    model: MaskPredictor, params: ModelParams, prompts: Tensor, new: int, block: int
) -> Callable[[], Tensor]:
    """ML-GSAI's `generate`: all of the canvas is fed, projected and judged, and one token of the first block written."""
    reference, canvas = reference_of(model, params), canvas_of(model, prompts, new)
    is_open = canvas == model.special_tokens.mask_id
    is_open[:, prompts.shape[1] + block :] = False
    return lambda: commit(reference(canvas), canvas, is_open, model.dtype)


def window_step(
    model: MaskPredictor, params: ModelParams, prompts: Tensor, new: int, block: int
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Fast-dLLM's dual cache: the forward that fills it, and a step that feeds the block alone."""
    reference, canvas = reference_of(model, params), canvas_of(model, prompts, new)
    start = prompts.shape[1]
    window = canvas[:, start : start + block]
    is_open = window == model.special_tokens.mask_id
    kept: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def refresh() -> Tensor:
        kept.clear()
        logits = reference.cached(canvas, kept, 0)
        return commit(logits[:, start : start + block], window, is_open, torch.float64)

    @torch.no_grad()
    def step() -> Tensor:
        return commit(reference.cached(window, kept, start), window, is_open, torch.float64)

    refresh()
    return refresh, step
