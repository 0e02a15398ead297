"""The forward process and its weighted loss: which tokens are hidden, how much each counts, and what the model pays.

Randomness is counter-based: a number is a hash of (seed, step, row, column), so that it does not depend on the batch a
row sits in, on its padding, on the number of ranks, or on a generator whose state would have to be saved.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llada_core.modeling.attention import BlockCausal
from llada_core.modeling.predictor import Certainty, device_of
from llada_core.settings import NoiseParams

_WEIGHT_EPSILON = 1e-6  # dllm's guard in -alpha' / (1 - alpha), kept so that losses compare
_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64, splitmix64's increment
_STRIDE = 1 << 32  # rows and draws are told apart in the upper half of a key, columns are added to the lower one


@dataclass(frozen=True)
class Noise:
    """The random numbers of some rows of one step.

    `rows` (B,) int64 is each row's place in the global batch of `total` rows; nothing else tells rows apart.
    """

    seed: int
    step: int
    rows: Tensor
    total: int

    def uniforms(self, width: int, stream: int = 0) -> Tensor:
        """(B, width) float32 in [0, 1); column j is the same for every width above j."""
        return ((hashed(self._keys(stream), width) >> 40) & 0xFFFFFF).to(torch.float32) * 2.0**-24

    def times(self, params: NoiseParams, stream: int = 1) -> Tensor:
        """(B,) float32 in [epsilon, highest]; stratified times share one offset and are spread evenly over the global batch."""
        if params.stratified:
            offset = Noise(self.seed, self.step, torch.full_like(self.rows[:1], -1), 1).uniforms(1, stream)[:, 0]
            # Whole numbers first: a running row number divided in float32 loses its last digits within a few thousand
            # steps, and with them all but a handful of the strata.
            u = (offset + (self.rows % self.total) / self.total) % 1.0
        else:
            u = self.uniforms(1, stream)[:, 0]
        return at_time(u, params)

    def _keys(self, stream: int) -> Tensor:
        key = torch.tensor(self.seed * 1_000_003 + stream, dtype=torch.int64, device=self.rows.device)
        return keyed(_mix(_mix(key * _GOLDEN) + self.step), self.rows)


def keyed(keys: Tensor, numbers: Tensor) -> Tensor:
    """int64 keys, one for each pair of a key and a number from 0; both broadcast."""
    return _mix(keys + (numbers + 1) * _STRIDE)


def hashed(keys: Tensor, width: int) -> Tensor:
    """(R, width) int64, all 64 bits random: column j of row i hashes keys[i] (R,) and j, on any device to the same bits."""
    # splitmix64's sequence from each key on: multiples of the golden ratio's increment, then the finaliser.
    columns = torch.arange(width, dtype=torch.int64, device=keys.device)
    return _mix((keys[:, None] + columns + 1) * _GOLDEN)


def _mix(z: Tensor) -> Tensor:
    """splitmix64's finaliser; int64 arithmetic wraps, and the masks turn arithmetic shifts into logical ones."""
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


def at_time(u: Tensor, params: NoiseParams) -> Tensor:
    """The times of uniform numbers in [0, 1]."""
    return params.epsilon + (params.highest - params.epsilon) * u


def alpha(t: Tensor, schedule: str) -> Tensor:
    """Share of tokens still visible at time t."""
    return 1 - t if schedule == "linear" else 1 - torch.cos(math.pi / 2 * (1 - t))


def alpha_derivative(t: Tensor, schedule: str) -> Tensor:
    """d alpha / dt, negative."""
    return -torch.ones_like(t) if schedule == "linear" else -(math.pi / 2) * torch.sin(math.pi / 2 * (1 - t))


def loss_weight(t: Tensor, params: NoiseParams) -> Tensor:
    """Weight of a masked token's cross-entropy at time t: -alpha' / (1 - alpha), which makes the sum a likelihood bound."""
    if params.weight == "uniform":
        return torch.ones_like(t)
    return -alpha_derivative(t, params.schedule) / (1 - alpha(t, params.schedule) + _WEIGHT_EPSILON)


def hidden_at(probability: Tensor, uniforms: Tensor, maskable: Tensor) -> Tensor:
    """(B, L) bool: which maskable tokens are hidden, each with its row's probability (B,)."""
    return (uniforms < probability[:, None]) & maskable


def corrupt(
    tokens: Tensor, maskable: Tensor, probability: Tensor, mask_id: int, uniforms: Tensor
) -> tuple[Tensor, Tensor]:
    """Hide each maskable token with its row's probability.

    tokens (B, L) int64, maskable (B, L) bool, probability (B,), uniforms (B, L) in [0, 1).
    Returns noisy (B, L) int64 and masked (B, L) bool.
    """
    masked = hidden_at(probability, uniforms, maskable)
    return torch.where(masked, mask_id, tokens), masked


@dataclass(frozen=True)
class MaskedLoss:
    """Cross-entropy of hidden tokens, unreduced: `nll` (P,) float32, and the row each of the P positions lies in."""

    nll: Tensor
    rows: Tensor
    router_losses: tuple[Tensor, Tensor] | None = None
    certainty: Certainty | None = None  # of each of the P predictions, where it was asked for

    def per_row(self, rows: int) -> Tensor:
        """Sum over each row's hidden tokens, (rows,) float32."""
        return torch.zeros(rows, dtype=self.nll.dtype, device=self.nll.device).index_add(0, self.rows, self.nll)


def fed_copies(block_length: int | None, width: int) -> int:
    """How often a row of `width` is fed: twice, once clean, where blocks have others before them."""
    return 1 if block_length is None or block_length >= width else 2


def masked_nll(  # noqa: PLR0913 (the canvas, its noise, and two switches)
    model: nn.Module,
    noisy: Tensor,
    tokens: Tensor,
    masked: Tensor,
    attention_mask: Tensor | None = None,
    *,
    right_shift: bool = False,
    router_losses: bool = False,
    block_length: int | None = None,
    documents: bool = False,
    certainty: bool = False,
) -> MaskedLoss:
    """Cross-entropy at the masked positions only; the vocabulary projection is computed nowhere else, and in chunks.

    `model` is a `MaskPredictor`, perhaps wrapped. noisy, tokens, masked (B, L); attention_mask (B, L) or (B, L, L). Give the tensors on the CPU
    and the index of positions costs the accelerator no synchronisation.
    `right_shift`: logits at i-1 predict token i (position 0 predicts itself).
    `block_length`: of a model that attends by blocks; each then sees the clean tokens of the blocks before it, of a copy
    that is fed behind the noisy one (BD3-LM, arXiv:2503.09573). A row of one block has nothing before it, and no copy.
    `documents`: where there is one, attention_mask (B, L) has the number of each position's document.
    """
    device = device_of(model)
    index = masked.flatten().nonzero()[:, 0]
    width, targets = noisy.shape[1], tokens.flatten()[index]
    rows = index // width
    # Logits at i - 1 predict token i; the first position, which has none to its left, is read from itself.
    source = torch.where(index % width > 0, index - 1, index) if right_shift else index
    how: dict[str, Any] = {"certainty": True} if certainty else {}
    if fed_copies(block_length, width) > 1 and block_length is not None:
        how["block_causal"] = BlockCausal(block_length, copies=True, documents=documents)
        noisy, source = torch.cat([noisy, tokens], 1), source + rows * width
        attention_mask = None if attention_mask is None else torch.cat([attention_mask] * 2, -1)
    sent = [x.to(device, non_blocking=True) for x in (noisy, source, targets, rows)]
    if attention_mask is not None:
        attention_mask = attention_mask.to(device, non_blocking=True)
    output = model(sent[0], attention_mask, positions=sent[1], targets=sent[2], router_losses=router_losses, **how)
    losses = output.router_losses if router_losses else None
    return MaskedLoss(output.nll, sent[3], losses, output.certainty if certainty else None)
