"""The networks behind the call: LLaDA, dense and sparse, and any masked language model of transformers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedModel

from llada_core.modeling.architecture import TOKEN_KEYS, Architecture
from llada_core.modeling.block import (
    LLaDABlock,
    RMSNorm,
    RotaryTables,
    Routing,
    Surroundings,
    autocast_dtype,
    key_bias,
    router_losses,
)
from llada_core.modeling.families import LLaDAConfig, LLaDAMoEConfig, published_shapes, register_names
from llada_core.modeling.folder import require_weights
from llada_core.modeling.predictor import KVCache, MaskPredictor, Prediction, RouterLosses, device_of, projected_nll
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

    config_class = LLaDAConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LLaDABlock"]  # noqa: RUF012 - transformers declares it so
    _supports_sdpa = True

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__(config)
        self.shape = config.architecture()
        self.model: Any = Body(self.shape)
        self.tables = RotaryTables(self.shape.rope_theta, self.shape.head_width)
        self._special = _special_in(config, self.shape.vocab_rows)
        self.post_init()  # type: ignore[operator]

    @classmethod
    def from_pretrained(cls, name: str | Path, *args: Any, **kwargs: Any) -> Any:
        """As transformers', but a folder must hold exactly the weights of its config.json, else `ValueError`."""
        if Path(name).is_dir():
            config = kwargs.get("config") or cls.config_class.from_pretrained(name)
            with torch.device("meta"):
                expected = cls(config).state_dict()
            require_weights(Path(name), published_shapes(expected, sparse=config.architecture().moe is not None))
        return super().from_pretrained(name, *args, **kwargs)

    def name_special_tokens(self, special: SpecialTokens) -> None:
        """Makes `special` this model's, and lets its config.json name them when it is saved."""
        self._special = special.check(self.shape.vocab_rows)
        for name, value in vars(special).items():
            if value is not None:
                setattr(self.config, name.replace("_id", "_token_id"), value)

    @property
    def device(self) -> torch.device:  # transformers has one of its own, which would come first
        return device_of(self) if self._entrance is None else self._entrance

    @property
    def vocab_rows(self) -> int:
        return self.shape.vocab_rows

    @property
    def max_length(self) -> int:
        return self.shape.max_length

    def get_input_embeddings(self) -> nn.Module:
        return self.model.transformer.wte

    def get_output_embeddings(self) -> nn.Module | None:
        return self.model.transformer.ff_out

    def new_cache(self, batch: int, length: int) -> KVCache:
        def like(block: LLaDABlock) -> Tensor:  # its norms are never quantised
            dtype = self.computes_in or block.attn_norm.weight.dtype
            return torch.empty(0, dtype=dtype, device=device_of(block))

        shape = (batch, length, self.shape.n_kv_heads, self.shape.head_width)
        return KVCache.empty(shape, [like(block) for block in self.model.transformer.blocks])

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
        output_hidden_states: bool = False,
        router_losses: bool = False,
    ) -> Prediction:
        """Logits for `input_ids` (B, W) int64, or for `inputs_embeds` (B, W, D).

        attention_mask: (B, T) with 1 at positions that may be attended to, or (B, W, T) per query; None means all.
        positions: (P,) int64 into the flattened B*W rows; only these are projected to the vocabulary.
        targets: (P,) int64 token ids; then `nll` (P,) fp32 is returned and no logits are kept.
        cache, slots: the W tokens sit at canvas positions `slots` (B, W); they attend to all T cached positions.
        router_losses: also the balance loss (B,) and z-loss (B, W) of a mixture-of-experts model.
        """
        x = self._embedded(input_ids) if inputs_embeds is None else inputs_embeds
        around = self._surroundings(x, attention_mask, cache, slots)
        early = None if output_hidden_states or router_losses else positions
        hidden, routings = [x], []
        for block in self.model.transformer.blocks:
            last = len(hidden) == len(self.model.transformer.blocks)
            x, routing = block(x, around, early if last else None)
            hidden.append(x)
            routings.append(routing)
        if early is None and not output_hidden_states and positions is not None:
            x = x.flatten(0, 1)[positions.to(x.device)]  # where GPUs share a model, the last has what the blocks made
        x = self.model.transformer.ln_f(x)
        states = (*hidden[:-1], x) if output_hidden_states else None
        if output_hidden_states and positions is not None:
            x = x.flatten(0, 1)[positions.to(x.device)]
        losses = self._router_losses(routings, hidden[0], attention_mask) if router_losses else None
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
        transformer = self.model.transformer
        if transformer.ff_out is not None:
            return transformer.ff_out(x)
        return F.linear(x.to(transformer.wte.weight.device), transformer.wte.weight)

    def _surroundings(
        self, x: Tensor, mask: Tensor | None, cache: KVCache | None, slots: Tensor | None
    ) -> Surroundings:
        width = x.shape[1]
        if cache is not None and slots is None and cache.length != width:
            raise ValueError(f"{width} tokens for a cache of {cache.length} positions need slots")
        # slots may name positions past the fed width, so without a cache only the model's own limit is known
        span = width if slots is None else (self.max_length if cache is None else cache.length)
        cos, sin = self.tables.upto(span, x.device)
        if slots is not None:
            cos, sin = cos[slots], sin[slots]
        flat = None
        if cache is not None and slots is not None:
            first = torch.arange(cache.batch, device=slots.device)[:, None] * cache.length
            flat = (slots + first).flatten()
        return Surroundings(cos.unsqueeze(-2), sin.unsqueeze(-2), key_bias(mask, x.dtype), cache, flat)

    def _router_losses(self, routings: list[Routing | None], embedded: Tensor, mask: Tensor | None) -> RouterLosses:
        sparse = [r for r in routings if r is not None]
        if not sparse:
            raise ValueError("router_losses was asked of a model without sparse layers")
        return router_losses(sparse, embedded.shape[0], mask)


class LLaDAMoEModelLM(LLaDAModelLM):
    """The same network with sparse layers, under LLaDA-MoE's published names (see `names.py`)."""

    config_class = LLaDAMoEConfig


register_names()


def _special_in(config: LLaDAConfig, vocab_rows: int) -> SpecialTokens | None:
    """The special tokens that a config.json names by itself, if it names those that are needed."""
    values = config.published()
    ids = {key.replace("_token_id", "_id"): values[key] for key in TOKEN_KEYS if values.get(key) is not None}
    if not {"mask_id", "eos_id"} <= ids.keys():
        return None
    return SpecialTokens(**{"pad_id": ids["eos_id"], **ids}).check(vocab_rows)


class MaskedLM(MaskPredictor):
    """A masked-LM as mask predictor: no cache, learned positions, its own length limit."""

    supports_cache = False
    closes = True

    def __init__(self, backbone: PreTrainedModel, special_tokens: SpecialTokens) -> None:
        super().__init__()
        self.backbone = backbone
        self._special = special_tokens.check(backbone.config.vocab_size)
        for name, value in vars(special_tokens).items():  # so that a saved copy names them by itself
            if value is not None:
                setattr(backbone.config, name.replace("_id", "_token_id"), value)

    @property
    def config(self) -> Any:
        """The backbone's transformers config."""
        return self.backbone.config

    @property
    def device(self) -> torch.device:
        return device_of(self) if self._entrance is None else self._entrance

    @property
    def dtype(self) -> torch.dtype:
        return self.backbone.dtype

    @property
    def vocab_rows(self) -> int:
        return int(self.backbone.config.vocab_size)

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module | None:
        return self.backbone.get_output_embeddings()

    @property
    def max_length(self) -> int:
        embeddings = dict(self.backbone.base_model.named_modules()).get("embeddings.position_embeddings")
        first = getattr(embeddings, "padding_idx", None)  # RoBERTa counts positions from behind its padding id
        return int(self.backbone.config.max_position_embeddings) - (0 if first is None else first + 1)

    def forward(  # noqa: PLR0913 - the one call of the library, see LLaDAModelLM.forward
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        targets: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache: KVCache | None = None,
        slots: Tensor | None = None,
        output_hidden_states: bool = False,
        router_losses: bool = False,
    ) -> Prediction:
        """As `LLaDAModelLM.forward`; `cache`, `slots` and `router_losses` are refused by name."""
        if attention_mask is not None and attention_mask.dim() == 3:
            attention_mask = attention_mask[:, None].bool()
        if cache is not None or slots is not None or router_losses:
            raise ValueError(f"{type(self.backbone).__name__} knows no cache, slots or router_losses")
        head = _head_of(self.backbone)
        network = self.backbone if head is None else self.backbone.base_model
        out = network(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            output_hidden_states=output_hidden_states,
        )
        x = out.logits if head is None else out.last_hidden_state
        states = out.hidden_states if output_hidden_states else None
        if positions is not None:
            x = x.flatten(0, 1)[positions]
        if targets is not None:
            return Prediction(nll=projected_nll(x, self._project, self.vocab_rows, targets), hidden_states=states)
        return Prediction(logits=self._project(x), hidden_states=states)

    def _project(self, x: Tensor) -> Tensor:
        """All that the masked-LM applies after its body, position by position."""
        for step in _head_of(self.backbone) or ():
            x = step(x)
        return x


def choose_attention(model: MaskPredictor, name: str) -> None:
    """Lets a masked-LM compute attention by transformers' `attn_implementation`; `ValueError` where it cannot.

    LLaDA's networks call torch's scaled_dot_product_attention, so for them there is nothing but "sdpa".
    """
    why = "it calls torch's scaled_dot_product_attention, which takes FlashAttention by itself; use sdpa"
    if isinstance(model, MaskedLM):
        try:
            model.backbone.set_attn_implementation(name)
        except (ImportError, ValueError) as error:
            why = str(error).strip().splitlines()[0]
        else:
            why = f"it does {model.config._attn_implementation} alone"
        if model.config._attn_implementation == name:
            return
    elif name == "sdpa":
        return
    network = type(model.backbone if isinstance(model, MaskedLM) else model).__name__
    raise ValueError(f"attn_implementation {name!r} is none of {network}'s: {why}")


def _head_of(backbone: Any) -> list[Callable[[Tensor], Tensor]] | None:
    """The modules after the body, in order; None for a masked-LM not known here, which then projects every position."""
    parts: dict[str, Any] = dict(backbone.named_children())
    if "vocab_transform" in parts:  # DistilBERT
        return [parts["vocab_transform"], backbone.activation, parts["vocab_layer_norm"], parts["vocab_projector"]]
    if "cls" in parts:  # BERT and its kin
        return [parts["cls"]]
    if "head" in parts and "decoder" in parts:  # ModernBERT
        return [parts["head"], parts["decoder"]]
    if "lm_head" in parts:  # RoBERTa and its kin
        return [parts["lm_head"]]
    return None


def new_masked_lm(values: dict[str, Any], vocab_size: int, special_tokens: SpecialTokens, seed: int) -> MaskedLM:
    """A freshly initialised masked-LM from its `model_type` and config keys."""
    kind = values.pop("model_type")
    eos, bos = special_tokens.eos_id, special_tokens.bos_id
    ids = {"pad_token_id": special_tokens.pad_id, "eos_token_id": eos, "sep_token_id": eos}
    if bos is not None:
        ids |= {"bos_token_id": bos, "cls_token_id": bos}
    config = AutoConfig.for_model(kind, **{**values, **ids, "vocab_size": vocab_size})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MaskedLM(AutoModelForMaskedLM.from_config(config), special_tokens)
