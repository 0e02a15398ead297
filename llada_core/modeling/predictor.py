"""What every mask predictor offers, whichever network is behind it; and whether an input fits one.

Knows the call and its result; does not know any architecture.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.utils import ModelOutput

from llada_core.modeling.cache import KVCache
from llada_core.tokenizer import SpecialTokens


class RouterLosses(NamedTuple):
    """Mean over sparse layers of the balance loss per row (B,), 1 when even, and of the z-loss per token (B, W)."""

    balance: Tensor
    z: Tensor


@dataclass
class Prediction(ModelOutput):
    """Result of one forward pass; `logits` are (B, W, V), or (P, V) where positions were asked for.

    With `targets`, `nll` (P,) fp32 is given instead of logits.
    """

    logits: Tensor | None = None
    nll: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    router_losses: RouterLosses | None = None


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes, and so where its input belongs.

    FSDP with offload keeps its shards on the CPU and computes on the rank's GPU, which is the current one of its kind.
    """
    weight = next(module.parameters())
    if isinstance(weight, DTensor) and weight.device_mesh.device_type != weight.device.type:
        return torch.device(weight.device_mesh.device_type)
    return weight.device


class MaskPredictor(nn.Module):
    """Tokens with masks in, logits at every asked-for position out; bidirectional, no time input.

    `forward(input_ids, attention_mask=None, *, positions=None, targets=None, inputs_embeds=None, cache=None,
    slots=None, output_hidden_states=False, router_losses=False) -> Prediction`
    """

    supports_cache: bool = True
    closes: bool = False  # whether a sequence ends with a token of its own, as [SEP] for BERT
    computes_in: torch.dtype | None = None  # what autocast makes of products while it trains; None: as it is stored
    _special: SpecialTokens | None = None
    _entrance: torch.device | None = None  # where input comes from and results go, if not to where the weights lie

    @property
    def special_tokens(self) -> SpecialTokens:
        """The model's special token ids; `ValueError` if neither its files nor the caller named them."""
        if self._special is None:
            raise ValueError("nobody named this model's special tokens; pass special_tokens=SpecialTokens(...)")
        return self._special

    @property
    def device(self) -> torch.device:
        """Where the input belongs."""
        return device_of(self) if self._entrance is None else self._entrance

    @property
    def vocab_rows(self) -> int:
        """The number of tokens that logits are given for."""
        raise NotImplementedError

    @property
    def max_length(self) -> int:
        """The longest sequence that the model was made for."""
        raise NotImplementedError

    def get_input_embeddings(self) -> nn.Module:
        """The table of token vectors."""
        raise NotImplementedError

    def get_output_embeddings(self) -> nn.Module | None:
        """The vocabulary projection; None where it is the table of token vectors."""
        raise NotImplementedError

    def new_cache(self, batch: int, length: int) -> KVCache:
        """An empty cache for `batch` canvases of `length`; `ValueError` if the network cannot use one."""
        raise ValueError(f"{type(self).__name__} cannot use a key/value cache; use an exact mode (cache='none')")

    def fuse_for_inference(self) -> None:
        """Prepares faster inference where the network can, for a copy of its linear weights; `train()` undoes it."""


def feed_from_cpu(model: MaskPredictor, device: torch.device) -> None:
    """Lets a model whose weights lie on `device` take its input from the CPU and give its results there.

    For Apple's GPUs: they have no float64, in which a sampler tells near certainties apart and a likelihood is summed.
    Memory is shared there, so that the way back costs little.
    """

    def enter(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(map(moved, args)), {name: moved(value) for name, value in named.items()}

    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    def leave(_: nn.Module, __: Any, found: Prediction) -> Prediction:
        states = found.hidden_states
        return Prediction(
            logits=None if found.logits is None else found.logits.cpu(),
            nll=None if found.nll is None else found.nll.cpu(),
            hidden_states=None if states is None else tuple(state.cpu() for state in states),
            router_losses=None
            if found.router_losses is None
            else RouterLosses(*(x.cpu() for x in found.router_losses)),
        )

    model.register_forward_pre_hook(enter, with_kwargs=True)
    model.register_forward_hook(leave)
    model._entrance = torch.device("cpu")


def require_in_vocabulary(model: MaskPredictor, ids: Tensor, what: str) -> None:
    """Every id of `ids` (n,) is one that the model has a row for."""
    wrong = ids[(ids < 0) | (ids >= model.vocab_rows)]
    if len(wrong):
        allowed = f"0..{model.vocab_rows - 1}"
        raise ValueError(f"{what} holds token id {int(wrong[0])}, outside the model's vocabulary {allowed}")


def require_no_mask(model: MaskPredictor, ids: Tensor, what: str, remedy: str) -> None:
    """No id of `ids` (n,) is MASK."""
    masks = (ids == model.special_tokens.mask_id).nonzero()
    if len(masks):
        mask = model.special_tokens.mask_id
        raise ValueError(f"{what} holds the mask id {mask} at position {int(masks[0])}; {remedy}")


def require_length(model: MaskPredictor, needed: int, remedy: str) -> None:
    """A sequence of `needed` tokens is not longer than the model's longest."""
    if needed > model.max_length:
        raise ValueError(f"a sequence of {needed} tokens is longer than the model's {model.max_length}; {remedy}")
