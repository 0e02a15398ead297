"""What every mask predictor offers, whichever network is behind it: the call, its result, its cache, its loss in chunks.

The legend of shape letters, for the whole of `modeling`:
B batch rows; L positions of a canvas; W tokens fed; T positions attended to (W, or those of a cache); P positions picked
out of the B*W, in a row; N heads, N_kv heads of keys and values, H head width; D width; V vocabulary rows; E experts,
K experts for a token, F expert width. `x_BWD` is a tensor (B, W, D).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.utils import ModelOutput

from llada_core.modeling.families import FAMILIES, Family
from llada_core.tokenizer import SpecialTokens


class KVCache:
    """Post-RoPE keys and values, per layer `(B, T, N_kv, H)`, preallocated with zeros and overwritten in place.

    A slot that was never written holds zeros: hide it with the attention mask. In this order a token's heads lie beside
    each other, as the projections give them: what is fed is written by one `index_copy_` over B*T rows, and attention
    reads the whole as a transposed view, the order in which torch's flash kernels see it themselves. Shapes never
    change and no value is read back: what capturing a step on a GPU as a graph asks for.
    `batch` rows and `length` slots are in use, the first ones; `keys` and `values` may have room for more (`reach` slots a
    row), so that rows come and go without a copy of those that stay.
    """

    def __init__(
        self, keys: list[Tensor], values: list[Tensor], batch: int | None = None, length: int | None = None
    ) -> None:
        self.keys, self.values = keys, values
        self.batch = keys[0].shape[0] if batch is None else batch
        self.length = keys[0].shape[1] if length is None else length

    @classmethod
    def empty(cls, shape: tuple[int, int, int, int], like: Sequence[Tensor]) -> Self:
        """A cache for `shape` = (B, T, N_kv, H), each layer with the dtype and device of its one of `like`."""
        keys, values = ([torch.zeros(shape, dtype=x.dtype, device=x.device) for x in like] for _ in range(2))
        return cls(keys, values)

    @property
    def reach(self) -> int:
        """Slots from one row to the next."""
        return self.keys[0].shape[1]

    def fits(self, batch: int, length: int) -> bool:
        """Whether there is room for so many rows and slots, and not more than twice of it."""
        # Room to spare is kept, since a smaller cache costs a copy of every row; beyond twice the need it costs memory.
        room = self.keys[0].shape[0] * self.reach
        return batch <= self.keys[0].shape[0] and length <= self.reach and room <= 2 * batch * length

    def part(self, batch: int, length: int) -> "KVCache":
        """The same memory with so many rows and slots in use; slots that were not are zero in the rows that were."""
        # Whatever a longer row left there would be read as this row's.
        for kept in self.keys + self.values:
            kept[: self.batch, self.length : length] = 0
        return KVCache(self.keys, self.values, batch, length)

    def rows(self, index: Tensor, length: int | None = None) -> "KVCache":
        """A new cache with the batch rows `index` (R,) int64 and the first `length` slots; the old one stays as it is."""
        length = self.length if length is None else length
        keys, values = (
            [x[:, :length].index_select(0, index.to(x.device)) for x in kept] for kept in (self.keys, self.values)
        )
        return KVCache(keys, values)

    def replace(self, index: Tensor, anew: "KVCache") -> None:
        """Puts all rows of `anew`, of no more slots than this one, in the place of the batch rows `index` (R,) int64."""
        for old, new in zip(self.keys + self.values, anew.keys + anew.values, strict=True):
            # Only where layers lie on several devices: a captured step moves nothing.
            there = index if index.device == old.device else index.to(old.device)
            old[:, : new.shape[1]].index_copy_(0, there, new)

    def write(self, layer: int, flat_slots: Tensor | None, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Stores (B, W, N_kv, H) at `flat_slots` (B*W,) = row * reach + slot, or everywhere if None; all T of the layer."""
        keys, values = self.keys[layer], self.values[layer]
        if flat_slots is not None:
            keys.flatten(0, 1).index_copy_(0, flat_slots, key.flatten(0, 1).to(keys.dtype))
            values.flatten(0, 1).index_copy_(0, flat_slots, value.flatten(0, 1).to(values.dtype))
        if keys.shape[:2] != (self.batch, self.length):
            # Views: attention reads what is in use, and nothing is copied.
            keys, values = keys[: self.batch, : self.length], values[: self.batch, : self.length]
        if flat_slots is None:
            keys.copy_(key)
            values.copy_(value)
        return keys, values


# In fp32 1 GiB: 2,000 positions of LLaDA's 126,464 words.
CHUNK_ELEMENTS = 1 << 28
"""Logits kept at a time; above this the rows are chunked and recomputed in the backward pass."""

# In fp32 4 MiB.
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
            # -log p = logsumexp - logit; then softmax = exp(logit - logsumexp) takes the logits' place, for backward
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
        table, targets_P = ctx.saved_tensors  # d(-log p)/d logits = softmax - onehot(target)
        table.mul_(gradient_P[:, None])
        table.scatter_add_(-1, targets_P[:, None], -gradient_P[:, None])
        return table, None


def _nll(x_PD: Tensor, head: Projection, targets_P: Tensor) -> Tensor:
    logits = head(x_PD)
    targets_P = targets_P.to(logits.device)  # where GPUs share a model
    # Without a gradient no second table is kept, and a compiler cannot trace a function that overwrites its input.
    if not logits.requires_grad or len(targets_P) == 0 or torch.compiler.is_compiling():
        return F.cross_entropy(logits.float(), targets_P, reduction="none")
    # In fp32 whatever the head computes in: of a sum over so many words bf16 keeps two to three digits.
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


class Certainty(NamedTuple):
    """Of each of P predictions: the entropy of its distribution, (P,) fp32, and whether its best token is the target."""

    entropy: Tensor
    right: Tensor


def projected_certainty(x_PD: Tensor, head: Projection, vocab_rows: int, targets_P: Tensor) -> tuple[Tensor, Certainty]:
    """As `projected_nll`, and how certain the predictions are; in smaller chunks, since more tables are kept of each."""
    rows = max(1, CHUNK_ELEMENTS // (4 * vocab_rows))
    chunks = [(x_PD, targets_P)] if len(x_PD) <= rows else zip(x_PD.split(rows), targets_P.split(rows), strict=True)
    parts = [checkpoint(_certain, x, head, targets, use_reentrant=False) for x, targets in chunks]
    nll, entropy, right = (torch.cat(part) for part in zip(*parts, strict=True))
    return nll, Certainty(entropy, right)


def _certain(x_PD: Tensor, head: Projection, targets_P: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    log_p = head(x_PD).float().log_softmax(-1)
    targets_P = targets_P.to(log_p.device)
    nll = -log_p.gather(-1, targets_P[:, None])[:, 0]
    return nll, -(log_p.exp() * log_p).sum(-1), log_p.argmax(-1) == targets_P


class RouterLosses(NamedTuple):
    """Mean over sparse layers of the balance loss per row (B,), 1 when even, and of the z-loss per token (B, W)."""

    balance: Tensor
    z: Tensor


@dataclass
class Prediction(ModelOutput):
    """Result of one forward pass; `logits` are (B, W, V), or (P, V) where positions were asked for.

    With `targets`, `nll` (P,) fp32 is given instead of logits, and with `certainty` how certain each prediction is.
    """

    logits: Tensor | None = None
    nll: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    router_losses: RouterLosses | None = None
    certainty: Certainty | None = None


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes, and so where its input belongs.

    FSDP with offload keeps its shards on the CPU and computes on the rank's GPU, which is the current one of its kind.
    """
    weight = next(module.parameters())
    if isinstance(weight, DTensor) and weight.device_mesh.device_type != weight.device.type:
        return torch.device(weight.device_mesh.device_type)
    return weight.device


class MaskPredictor(nn.Module):
    """Tokens with masks in, logits at every asked-for position out; bidirectional or by blocks, no time input.

    `forward(input_ids, attention_mask=None, *, positions=None, targets=None, inputs_embeds=None, cache=None,
    slots=None, block_causal=None, output_hidden_states=False, router_losses=False, certainty=False) -> Prediction`
    """

    kind: str = ""  # its family's; a model of somebody's own that is in no table has none
    supports_cache: bool = True
    ends_with_eos: bool = False  # whether a sequence ends with a token of its own, as [SEP] for BERT
    computes_in: torch.dtype | None = None  # what autocast makes of products while it trains; None: as it is stored
    _special: SpecialTokens | None = None
    _entrance: torch.device | None = None  # where input comes from and results go, if not to where the weights lie

    @classmethod
    def rows_of(cls, config: Any) -> int:
        """The vocabulary rows that a configuration describes; `ValueError` for one that cannot be computed."""
        raise NotImplementedError

    @classmethod
    def of_config(cls, config: Any, special: SpecialTokens) -> Self:
        """One of this shape, its weights as they happen to be; on the meta device, none."""
        raise NotImplementedError

    @classmethod
    def fresh(cls, config: Any, special: SpecialTokens, seed: int) -> Self:
        """One with initial weights in fp32, the same for the same seed, whatever torch's own is."""
        raise NotImplementedError

    @classmethod
    def read(cls, folder: Path, config: Any, special: SpecialTokens, **how: Any) -> tuple[Self, dict[str, Any]]:
        """One from a folder, by `from_pretrained` of transformers with its options, and the report of the loading."""
        raise NotImplementedError

    @property
    def network(self) -> Any:
        """The transformers model whose weights are stored, sharded and adapted: this one, or the one inside."""
        return self

    @property
    def family(self) -> Family:
        """The row of the family table that this model is of."""
        return FAMILIES[self.kind]

    @property
    def block_length(self) -> int | None:
        """Of the blocks by which it was trained to attend (`attention.BlockCausal`); None: each token sees all others."""
        return self.family.block_length if self.kind in FAMILIES else None

    @property
    def shifted(self) -> bool:
        """Whether its network predicts the token behind a position, which `forward` has moved to its own already."""
        return False

    def by_blocks(self, length: int) -> "MaskPredictor":
        """This model as one that attends by blocks of `length` and says so in its config.json, with the same weights.

        It is changed where its family attends by blocks; `ValueError` where no family that does has its network.
        """
        raise ValueError(
            f"a model of kind {self.kind} cannot attend by blocks; LLaDA 8B's layout becomes one that does, LLaDA2 is one"
        )

    @property
    def blocks(self) -> nn.ModuleList:
        """The repeated layers: the longest list of modules."""
        return max((part for part in self.modules() if isinstance(part, nn.ModuleList)), key=len)

    @property
    def widths(self) -> tuple[int, int]:
        """Of a token in the residual stream, and in a block's feed-forward (four times as wide, where nobody says)."""
        width = int(self.get_input_embeddings().get_parameter("weight").shape[1])
        return width, 4 * width

    @property
    def expert_share(self) -> float:
        """The share of the experts that a token goes through; 1 where there are none."""
        return 1.0

    def choose_attention(self, name: str) -> None:
        """Computes attention by transformers' `attn_implementation`; `ValueError` where the network cannot."""
        raise NotImplementedError

    def name_special_tokens(self, special: SpecialTokens) -> None:
        """Makes `special` this model's, and lets its config.json name them when it is saved."""
        self._special = special.check(self.vocab_rows)
        for name, value in vars(special).items():
            if value is not None:
                # As transformers spells them, so that its own tools read them too.
                setattr(self.network.config, name.replace("_id", "_token_id"), value)

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
            certainty=None if found.certainty is None else Certainty(*(x.cpu() for x in found.certainty)),
        )

    model.register_forward_pre_hook(enter, with_kwargs=True)
    model.register_forward_hook(leave)
    model._entrance = torch.device("cpu")


def require_in_vocabulary(model: MaskPredictor, ids: Tensor, what: str) -> None:
    """Every id of `ids` (n,) is one that the model has a row for."""
    # On a GPU an index out of range ends the whole process, with a message from some later call.
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


class SavesItself(Protocol):
    """A tokenizer, as far as saving goes."""

    def save(self, folder: str | Path) -> None:
        """Writes its files into `folder`."""
