"""The LLaDA mask predictor, dense or sparse, as a transformers model in the published checkpoint layout.

Its forward is the one function that a step of sampling or training is: a CUDA graph, a compiler or other kernels would
go in here and in `block`. Shape letters: the legend in `predictor`.
"""

import math
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from llada_core.modeling.architecture import Architecture
from llada_core.modeling.attention import BlockCausal, Spans
from llada_core.modeling.block import (
    Experts,
    LLaDABlock,
    MoE,
    RMSNorm,
    RotaryTables,
    Routing,
    Surroundings,
    autocast_dtype,
    count_loads,
    key_bias,
    router_losses,
)
from llada_core.modeling.configuration import (
    DreamConfig,
    ILLaDAConfig,
    LLaDA2Config,
    LLaDABlocksConfig,
    LLaDAConfig,
    LLaDAMoEConfig,
    published_shapes,
    register_names,
)
from llada_core.modeling.families import FAMILIES, TOKEN_KEYS
from llada_core.modeling.folder import require_weights
from llada_core.modeling.predictor import (
    KVCache,
    MaskPredictor,
    Prediction,
    RouterLosses,
    device_of,
    projected_certainty,
    projected_nll,
)
from llada_core.tokenizer import SpecialTokens


class Transformer(nn.Module):
    """The modules under the published prefix `model.transformer`; `ff_out` is the head, absent when tied."""

    def __init__(self, shape: Architecture) -> None:
        super().__init__()
        self.wte = nn.Embedding(shape.vocab_rows, shape.width)
        self.blocks = nn.ModuleList(LLaDABlock(shape, layer) for layer in range(shape.n_layers))
        self.ln_f = RMSNorm(shape.width, shape.norm_eps)
        self.ff_out = None if shape.tied else nn.Linear(shape.width, shape.vocab_rows, bias=False)


class Body(nn.Module):
    """The published prefix `model`."""

    def __init__(self, shape: Architecture) -> None:
        super().__init__()
        self.transformer = Transformer(shape)


class LLaDAModelLM(PreTrainedModel, MaskPredictor):
    """Predicts every masked token of a sequence at once (LLaDA, arXiv:2502.09992)."""

    kind = "llada"
    config_class = LLaDAConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LLaDABlock"]  # noqa: RUF012 - transformers declares it so
    _keys_to_ignore_on_load_unexpected = [r"ff_out\.weight$", r"^lm_head\.weight$"]  # noqa: RUF012 - see `from_pretrained`
    _supports_sdpa = True

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__(config)
        self.shape = config.architecture()
        # Nested as published, so that names of weights need no translation for the dense family.
        self.model: Any = Body(self.shape)
        self.tables = RotaryTables(self.shape.rope_theta, self.shape.rotary_width)
        self._special = _special_in(config, self.shape.vocab_rows)
        self.post_init()  # type: ignore[operator]

    @classmethod
    def rows_of(cls, config: LLaDAConfig) -> int:
        return config.architecture().vocab_rows

    @classmethod
    def of_config(cls, config: LLaDAConfig, special: SpecialTokens) -> Self:
        model = cls(config)
        model.name_special_tokens(special)
        return model

    @classmethod
    def fresh(cls, config: LLaDAConfig, special: SpecialTokens, seed: int) -> Self:
        with torch.device("meta"):  # transformers would draw weights of its own first
            model = cls.of_config(config, special)
        model.to_empty(device="cpu")
        _initialise(model, torch.Generator().manual_seed(seed))
        return model

    @classmethod
    def read(cls, folder: Path, config: LLaDAConfig, special: SpecialTokens, **how: Any) -> tuple[Self, dict[str, Any]]:
        model, info = cls.from_pretrained(folder, config=config, output_loading_info=True, **how)
        model.name_special_tokens(special)
        return model, info

    @classmethod
    def from_pretrained(cls, name: str | Path, *args: Any, **kwargs: Any) -> Any:
        """As transformers', but a folder must hold exactly the weights of its config.json, else `ValueError`.

        One matrix for both ends may be stored twice, as iLLaDA's is, if both are the same.
        """
        if Path(name).is_dir():
            config = kwargs.get("config") or cls.config_class.from_pretrained(name)
            with torch.device("meta"):
                network = cls(config)
            head, table = (
                FAMILIES[cls.kind].published_name(f"model.transformer.{part}.weight") for part in ("ff_out", "wte")
            )
            twice = {head: table} if network.shape.tied else {}
            require_weights(Path(name), published_shapes(network.state_dict(), FAMILIES[cls.kind]), twice)
        return super().from_pretrained(name, *args, **kwargs)

    @property
    def device(self) -> torch.device:  # transformers has one of its own, which would come first
        return device_of(self) if self._entrance is None else self._entrance

    @property
    def vocab_rows(self) -> int:
        return self.shape.vocab_rows

    @property
    def max_length(self) -> int:
        return self.shape.max_length

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.transformer.blocks

    @property
    def block_length(self) -> int | None:
        return self.shape.block_length

    @property
    def shifted(self) -> bool:
        return self.shape.shifted

    def by_blocks(self, length: int) -> MaskPredictor:
        kind = self.family.by_blocks
        if kind is None:
            return super().by_blocks(length)
        config: LLaDAConfig = self.config  # type: ignore[assignment]
        if kind == self.kind:
            # The family attends by blocks already: only their length is another, and the weights need not be moved.
            config.name_block_length(length)
            self.shape = config.architecture()
            return self
        family = FAMILIES[kind]
        values = {k: v for k, v in config.dense().items() if k not in ("auto_map", "model_type")}
        values |= {"architectures": [family.network_class.__name__], "block_length": length}
        with torch.device("meta"):
            made: LLaDAModelLM = family.network_class.of_config(
                family.config_class.for_model(**values), self.special_tokens
            )
        # The tensors themselves, not copies: a model of 8 B would not fit twice.
        made.load_state_dict(self.state_dict(), assign=True)
        return made.train(self.training)

    @property
    def widths(self) -> tuple[int, int]:
        moe = self.shape.moe
        return self.shape.width, self.shape.mlp_width if moe is None else moe.per_token * moe.width + moe.shared_width

    @property
    def expert_share(self) -> float:
        return 1.0 if self.shape.moe is None else self.shape.moe.per_token / self.shape.moe.n_experts

    def choose_attention(self, name: str) -> None:
        """There is nothing to choose: the blocks call torch's function, which looks for the fastest way itself."""
        if name != "sdpa":
            raise ValueError(
                f"attn_implementation {name!r} is none of {type(self).__name__}'s: it calls torch's"
                " scaled_dot_product_attention, which takes FlashAttention by itself; use sdpa"
            )

    def get_input_embeddings(self) -> nn.Module:
        return self.model.transformer.wte

    def get_output_embeddings(self) -> nn.Module | None:
        return self.model.transformer.ff_out

    def new_cache(self, batch: int, length: int) -> KVCache:
        def like(block: Any) -> Tensor:  # its norms are never quantised
            dtype = self.computes_in or block.attn_norm.weight.dtype
            return torch.empty(0, dtype=dtype, device=device_of(block))

        # Where layers lie on several devices, each has its part of the cache beside it.
        shape = (batch, length, self.shape.n_kv_heads, self.shape.head_width)
        return KVCache.empty(shape, [like(block) for block in self.blocks])

    def forward(  # noqa: PLR0913 - the one call of the library; everything after the mask is keyword-only
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        targets: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache: KVCache | None = None,
        slots: Tensor | None = None,
        block_causal: BlockCausal | None = None,
        output_hidden_states: bool = False,
        router_losses: bool = False,
        certainty: bool = False,
    ) -> Prediction:
        """Logits for `input_ids` (B, W) int64, or for `inputs_embeds` (B, W, D).

        attention_mask: (B, T) with 1 at positions that may be attended to, or (B, W, T) per query; None means all.
        positions: (P,) int64 into the flattened B*W rows; only these are projected to the vocabulary.
        targets: (P,) int64 token ids; then `nll` (P,) fp32 is returned and no logits are kept.
        cache, slots: the W tokens sit at canvas positions `slots` (B, W); they attend to all T cached positions.
        block_causal: they attend by blocks, of those positions only to their own and to earlier blocks.
        router_losses: also the balance loss (B,) and z-loss (B, W) of a mixture-of-experts model.
        certainty: with targets, also the entropy of each prediction and whether it is right.
        """
        x = self._embedded(input_ids) if inputs_embeds is None else inputs_embeds
        if self.shape.shifted and positions is not None:  # where their predictions stand
            positions = positions - (positions % x.shape[1] > 0).long()
        around = self._surroundings(x, attention_mask, cache, slots, block_causal)
        # Where nobody wants all positions of the last block, only the asked-for ones are finished there.
        early = None if output_hidden_states or router_losses else positions
        hidden, routings = [x], []
        for block in self.blocks:
            last = len(hidden) == len(self.blocks)
            x, routing = block(x, around, early if last else None)
            hidden.append(x)
            routings.append(routing)
        if self.training and torch.is_grad_enabled():
            # Here and not in the routers, whose blocks may be computed a second time for the backward pass.
            sparse = [(b.mlp, r) for b, r in zip(self.blocks, routings, strict=True) if isinstance(b.mlp, MoE)]
            count_loads([router for router, _ in sparse], [r for _, r in sparse], attention_mask, early)
        if early is None and not output_hidden_states and positions is not None:
            x = x.flatten(0, 1)[positions.to(x.device)]  # where GPUs share a model, the last has what the blocks made
        x = self.model.transformer.ln_f(x)
        states = (*hidden[:-1], x) if output_hidden_states else None
        if output_hidden_states and positions is not None:
            x = x.flatten(0, 1)[positions.to(x.device)]
        elif self.shape.shifted and positions is None:
            x = torch.cat([x[:, :1], x[:, :-1]], dim=1)
        losses = self._router_losses(routings, hidden[0], attention_mask) if router_losses else None
        # With targets the logits never exist as a whole: a row of 4,096 positions over 126,000 words is 2 GB in fp32.
        if targets is not None and certainty:
            nll, certain = projected_certainty(x, self._project, self.vocab_rows, targets)
            return Prediction(nll=nll, hidden_states=states, router_losses=losses, certainty=certain)
        if targets is not None:
            nll = projected_nll(x, self._project, self.vocab_rows, targets)
            return Prediction(nll=nll, hidden_states=states, router_losses=losses)
        return Prediction(logits=self._project(x), hidden_states=states, router_losses=losses)

    def _embedded(self, ids: Tensor | None) -> Tensor:
        """The residual stream's beginning. Under autocast it is fp32, of rows rounded as all weights are (`RMSNorm`)."""
        x = self.model.transformer.wte(ids)
        low = autocast_dtype(x)
        return x if low is None else x.to(low).float()

    def _project(self, x: Tensor) -> Tensor:
        # Tied, the table of token vectors is the head; it lies with the first layer where several devices share a model.
        transformer = self.model.transformer
        if transformer.ff_out is not None:
            return transformer.ff_out(x)
        return F.linear(x.to(transformer.wte.weight.device), transformer.wte.weight)

    def _surroundings(
        self,
        x: Tensor,
        mask: Tensor | None,
        cache: KVCache | None,
        slots: Tensor | None,
        block_causal: BlockCausal | None,
    ) -> Surroundings:
        width = x.shape[1]
        if cache is not None and slots is None and cache.length != width:
            raise ValueError(f"{width} tokens for a cache of {cache.length} positions need slots")
        # slots may name positions past the fed width, so without a cache only the model's own limit is known
        span = width if slots is None else (self.max_length if cache is None else cache.length)
        cos, sin = self.tables.upto(span, x.device)
        if slots is not None:
            # Rows of a batch may be at windows of their own, so that each has its own angles.
            cos, sin = cos[slots], sin[slots]
        flat = None
        if cache is not None and slots is not None:
            # Once for all layers: each writes to the same rows of its own B*T slots.
            first = torch.arange(cache.batch, device=slots.device)[:, None] * cache.reach
            flat = (slots + first).flatten()
        if block_causal is None:
            return Surroundings(cos.unsqueeze(-2), sin.unsqueeze(-2), key_bias(mask, x.dtype), cache, flat)
        if block_causal.copies:  # both copies are at positions 0 to half of the width
            cos, sin = (table[: width // 2].repeat(2, 1) for table in (cos, sin))
        spans = Spans.of(block_causal, width, x.device, mask, slots, None if cache is None else cache.length)
        return Surroundings(cos.unsqueeze(-2), sin.unsqueeze(-2), None, cache, flat, spans)

    def _router_losses(self, routings: list[Routing | None], embedded: Tensor, mask: Tensor | None) -> RouterLosses:
        sparse = [r for r in routings if r is not None]
        if not sparse:
            raise ValueError("router_losses was asked of a model without sparse layers")
        return router_losses(sparse, embedded.shape[0], mask)


class LLaDABlocksModelLM(LLaDAModelLM):
    """The dense network, trained to attend by blocks: as `LLaDAModelLM.by_blocks` makes it, or from nothing."""

    kind = "llada_blocks"
    config_class = LLaDABlocksConfig


class LLaDAMoEModelLM(LLaDAModelLM):
    """The same network with sparse layers; stored under LLaDA-MoE's published names, which the table of families has."""

    kind = "llada_moe"
    config_class = LLaDAMoEConfig


class LLaDA2MoeModelLM(LLaDAModelLM):
    """LLaDA2.0 and 2.1: attention by blocks where it is asked for, and experts chosen by groups."""

    kind = "llada2"
    config_class = LLaDA2Config
    _keep_in_fp32_modules_strict = ["expert_bias"]  # noqa: RUF012 - as 2.1 stores it beside weights in bf16


class ILLaDAForCausalLM(LLaDAModelLM):
    """iLLaDA-8B (arXiv:2606.25331): the dense network with grouped heads of keys and values and one matrix for both ends."""

    kind = "illada"
    config_class = ILLaDAConfig


class DreamModel(LLaDAModelLM):
    """Dream-7B (arXiv:2508.15487): Qwen2's layers, bidirectional, still predicting the token behind each position.

    The shift is made here, so that whoever calls finds each prediction at its own position. What is read for a block's
    first position stands before the block, which a cache does not feed again: it has none.
    """

    kind = "dream"
    config_class = DreamConfig
    supports_cache = False


@torch.no_grad()
def _initialise(model: LLaDAModelLM, generator: torch.Generator) -> None:
    """LLaDA's "mitchell" initialisation: truncated normal at 3 sigma with std 1/sqrt(d_in), residual outputs smaller.

    Projections back into the residual stream are divided by sqrt(2 (layer + 1)); embedding and head have std
    1/sqrt(d_model); norms are one, biases zero.
    """
    width = model.shape.width
    for name, module in model.named_modules():
        layer = next((int(part) for part in name.split(".") if part.isdigit()), None)
        # The deeper, the smaller: each layer adds to the stream, whose variance would else grow with their number.
        shrink = 1.0 if layer is None else 1.0 / math.sqrt(2 * (layer + 1))
        residual = name.rpartition(".")[2] in ("attn_out", "ff_out", "down_proj") and layer is not None
        if isinstance(module, nn.Linear):
            _normal(module.weight, (shrink if residual else 1.0) / math.sqrt(module.in_features), generator)
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.Embedding):
            _normal(module.weight, 1.0 / math.sqrt(width), generator)
        elif isinstance(module, Experts):
            _normal(module.gate_up, 1.0 / math.sqrt(width), generator)
            _normal(module.down, shrink / math.sqrt(module.down.shape[-1]), generator)
        else:
            for parameter in module.parameters(recurse=False):
                parameter.fill_(1.0)
            for buffer in module.buffers(recurse=False):
                buffer.zero_()


def _normal(weight: Tensor, std: float, generator: torch.Generator) -> None:
    nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std, generator=generator)


def _special_in(config: LLaDAConfig, vocab_rows: int) -> SpecialTokens | None:
    """The special tokens that a config.json names by itself, if it names those that are needed."""
    values = config.published()
    ids = {key.replace("_token_id", "_id"): values[key] for key in TOKEN_KEYS if values.get(key) is not None}
    if not {"mask_id", "eos_id"} <= ids.keys():
        return None
    # LLaDA pads with its EOS.
    return SpecialTokens(**{"pad_id": ids["eos_id"], **ids}).check(vocab_rows)


for _family in FAMILIES.values():
    if _family.renamed:
        register_names(_family)
