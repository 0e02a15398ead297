"""How sure the model is of each proposal: logits and proposed tokens -> a number between 0 and 1.

Does not know positions, blocks or what is done with the number.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# (P, V) float32 logits, (P,) proposed tokens, (P,) uniforms in [0, 1) -> (P,) float64, higher is surer
Confidence = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def probability(logits_PV: Tensor, tokens_P: Tensor, uniforms_P: Tensor | None = None) -> Tensor:
    """The probability of the proposed token.

    Taken from its odds against all others, in float64: near 1, where float32 knows no difference, the order still
    holds.
    """
    weight_PV = (logits_PV - logits_PV.amax(-1, keepdim=True)).exp_()
    own = weight_PV.gather(1, tokens_P[:, None])
    others = weight_PV.scatter_(1, tokens_P[:, None], 0.0).sum(-1).double()
    own = own[:, 0].double()
    return own / (own + others)


def margin(logits_PV: Tensor, tokens_P: Tensor, uniforms_P: Tensor | None = None) -> Tensor:
    """The lead of the likeliest token over the next one, in probability (Dream's margin)."""
    first, second = logits_PV.softmax(-1).topk(2, dim=-1).values.unbind(-1)
    return (first - second).double()


def certainty(logits_PV: Tensor, tokens_P: Tensor, uniforms_P: Tensor | None = None) -> Tensor:
    """exp(-entropy): 1 for one certain token, 1/V for none."""
    return (-entropy(logits_PV)).exp()


def entropy(logits_PV: Tensor) -> Tensor:
    """(P,) float64, in nats."""
    log_p = logits_PV.log_softmax(-1)
    return -(log_p.exp() * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(-1).double()


def chance(logits_PV: Tensor, tokens_P: Tensor, uniforms_P: Tensor | None = None) -> Tensor:
    """No confidence at all: the given uniforms, so that positions are chosen at random."""
    if uniforms_P is None:
        raise ValueError("random remasking needs uniforms")
    return uniforms_P


CONFIDENCES: dict[str, Confidence] = {
    "low_confidence": probability,
    "margin": margin,
    "entropy": certainty,
    "random": chance,
}
