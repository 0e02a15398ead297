"""The table of families: all that tells LLaDA from LLaDA-MoE from a masked-LM; and the settings of a fresh model.

Needs neither torch nor transformers, so that settings are checked at once: classes are named, and fetched when used.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from llada_core.settings import SettingsBlock, nearest

TOKEN_KEYS = ("mask_token_id", "eos_token_id", "pad_token_id", "bos_token_id", "eot_token_id")


class ModelParams(SettingsBlock):
    """Shape of a fresh model; the first group means the same for dense and mixture-of-experts models."""

    kind: str = "llada"  # a family of the table
    d_model: int = Field(default=256, ge=8)
    n_layers: int = Field(default=6, ge=1)
    n_heads: int = Field(default=4, ge=1)
    n_kv_heads: int | None = Field(default=None, ge=1)
    mlp_hidden_size: int = Field(default=768, ge=8)
    max_sequence_length: int = Field(default=1024, ge=8)
    rope_theta: float = Field(default=500000.0, gt=0)
    rms_norm_eps: float = Field(default=1e-5, gt=0)
    weight_tying: bool = False
    qk_norm: bool = False
    # mixture of experts
    num_experts: int = Field(default=8, ge=2)
    experts_per_token: int = Field(default=2, ge=1)
    expert_hidden_size: int = Field(default=256, ge=8)
    # families that attend by blocks; None: the family's own
    block_length: int | None = Field(default=None, ge=1, exclude_if=lambda value: value is None)
    # any transformers masked-LM: its `model_type` and config keys
    backbone: dict[str, str | int | float | bool] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.kind not in FAMILIES:
            raise ValueError(f"kind {self.kind!r} is no family of models{nearest(self.kind, list(FAMILIES))}")
        if self.d_model % (2 * self.n_heads):
            raise ValueError(f"d_model {self.d_model} must be an even multiple of n_heads {self.n_heads} (RoPE pairs)")
        if self.n_kv_heads is not None and self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_kv_heads {self.n_kv_heads} must divide n_heads {self.n_heads}")
        if self.experts_per_token > self.num_experts:
            raise ValueError(f"experts_per_token {self.experts_per_token} is more than num_experts {self.num_experts}")
        for key, example in FAMILIES[self.kind].needs.items():
            if key not in self.backbone:
                raise ValueError(f"kind {self.kind} needs backbone.{key}, for example {example}")
        return self


class LoraParams(SettingsBlock):
    """Low-rank adapters through peft; `targets` are names or a regular expression, `all-linear` excludes the head."""

    r: int = Field(default=32, ge=1)
    alpha: int = Field(default=64, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: str | tuple[str, ...] = "all-linear"
    experts: bool = False  # routed experts too, each with an adapter of its own; with targets: [] they alone
    bias: Literal["none", "all", "lora_only"] = "none"  # biases that train: of the network, or of the adapted layers
    modules_to_save: tuple[str, ...] = ()  # trained whole beside the adapter, such as wte, ln_f and ff_out (the head)
    four_bit: bool = False  # QLoRA: the frozen weights in nf4 (needs a GPU and bitsandbytes)
    double_quant: bool = False  # four_bit: its scales in eight bits, 0.4 bit less for each weight
    merge: bool = True  # export the merged model rather than the adapter

    @model_validator(mode="after")
    def _four_bits_stay_frozen(self) -> Self:
        if self.four_bit and self.merge:
            raise ValueError("four_bit rounds the weights it freezes, so the adapter is not merged: set merge: false")
        if self.double_quant and not self.four_bit:
            raise ValueError("double_quant stores the scales of four_bit in fewer bits: set four_bit: true")
        return self

    @model_validator(mode="after")
    def _experts_drop_nothing_out(self) -> Self:
        if self.experts and self.dropout:
            raise ValueError(f"adapters on experts drop nothing out, and dropout is {self.dropout}: set dropout: 0")
        if not self.targets and not self.experts:
            raise ValueError("targets is empty: name layers, or all-linear; for routed experts alone set experts: true")
        return self


@dataclass(frozen=True)
class Published:
    """A family's published model: how its releases' names begin, its special ids (`mask_id`, ...), its config.json.

    The ids hold where nothing nearer names them: no key of a config.json, no tokenizer beside it.
    """

    name: str
    special: Mapping[str, int]

    @cached_property
    def config(self) -> dict[str, Any]:
        """The published config.json, kept beside this file."""
        found: dict[str, Any] = json.loads((Path(__file__).parent / f"{self.name}.json").read_text(encoding="utf-8"))
        return found

    @property
    def vocab_size(self) -> int:
        return int(self.config["vocab_size"])

    def template(self) -> dict[str, Any]:
        """The published keys without those of its vocabulary: where a fresh model's config.json starts from."""
        return {k: v for k, v in self.config.items() if k != "vocab_size" and k not in TOKEN_KEYS}


@dataclass(frozen=True, kw_only=True)
class Family:
    """One kind of network. Nobody else asks which it is: what differs stands here, or in the class named by `network`.

    claims: whether a config.json (its keys) is one of this family; None: one that no other claims.
    fresh: from settings and vocabulary rows to the keys of a fresh model's config.json, special tokens apart.
    renamed: published names of weights and their parts, to ours; empty where they are the same.
    stored_bytes: of a published weight whose config.json names no dtype.
    block_length: of the blocks by which it attends, where its config.json names no other; None: every position sees
    every other.
    by_blocks: the family that a model of this one becomes by being trained to attend by blocks, if there is one.
    recommended: names of settings of the sampler (`sampling.params.RECOMMENDED`), the first where nobody says which.
    named: how names of releases begin whose files do not tell them apart, to the name of what is recommended for them.
    needs: keys of `model.backbone` that a fresh one must be given, each with an example.
    """

    kind: str
    config: str  # dotted name: the transformers configuration
    network: str  # dotted name: the mask predictor
    claims: Callable[[Mapping[str, Any]], bool] | None
    fresh: Callable[[ModelParams, int], dict[str, Any]]
    published: Published | None = None
    renamed: Mapping[str, str] = field(default_factory=dict)
    stored_bytes: int = 2
    block_length: int | None = None
    recommended: tuple[str, ...] = ()
    named: Mapping[str, str] = field(default_factory=dict)
    by_blocks: str | None = None
    needs: Mapping[str, str] = field(default_factory=dict)

    @property
    def config_class(self) -> Any:
        """The configuration's class; imports transformers."""
        return resolve_name(self.config)

    @property
    def network_class(self) -> Any:
        """The mask predictor's class; imports torch."""
        return resolve_name(self.network)

    def own_name(self, published: str) -> str:
        """Our name of a published parameter that is not an expert's."""
        for theirs, ours in self.renamed.items():
            published = published.replace(theirs, ours)
        return published

    def published_name(self, own: str) -> str:
        """The published name of a parameter of ours that is not an expert's."""
        for theirs, ours in reversed([*self.renamed.items()]):
            own = own.replace(ours, theirs)
        return own

    def own_layer(self, published: str) -> str:
        """Our name of one layer as a peft adapter targets it, without the names around it."""
        last = {theirs.rpartition(".")[2]: ours.rpartition(".")[2] for theirs, ours in self.renamed.items()}
        return last.get(published, published)


def _has_experts(config: Mapping[str, Any]) -> bool:
    return "LLaDAMoEModelLM" in (config.get("architectures") or []) or "num_experts" in config


def _is_llada(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") == "llada" and not _has_experts(config)


def _is_llada_moe(config: Mapping[str, Any]) -> bool:
    """LLaDA-MoE also calls its `model_type` "llada"; what tells it is its class, or that it has experts."""
    return config.get("model_type") == "llada" and _has_experts(config)


def _fresh_llada(params: ModelParams, vocab_rows: int) -> dict[str, Any]:
    return {
        **LLADA.template(),
        "vocab_size": vocab_rows,
        "embedding_size": vocab_rows,
        "d_model": params.d_model,
        "n_layers": params.n_layers,
        "n_heads": params.n_heads,
        "n_kv_heads": params.n_kv_heads or params.n_heads,
        "mlp_hidden_size": params.mlp_hidden_size,
        "max_sequence_length": params.max_sequence_length,
        "rope_theta": params.rope_theta,
        "rms_norm_eps": params.rms_norm_eps,
        "weight_tying": params.weight_tying,
        "attention_layer_norm": params.qk_norm,
    }


def _is_illada(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") == "illada" or "ILLaDAForCausalLM" in (config.get("architectures") or [])


def _fresh_illada(params: ModelParams, vocab_rows: int) -> dict[str, Any]:
    n_kv_heads = params.n_kv_heads or math.gcd(params.n_heads, max(1, params.n_heads // 4))
    return {
        **ILLADA.template(),
        **_shape_of(params, vocab_rows),
        "num_key_value_heads": n_kv_heads,
        "intermediate_size": params.mlp_hidden_size,
        "tie_word_embeddings": True,
    }


def _is_llada_blocks(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") == "llada_blocks"


def _fresh_llada_blocks(params: ModelParams, vocab_rows: int) -> dict[str, Any]:
    length = params.block_length or FAMILIES["llada_blocks"].block_length
    dense = {k: v for k, v in _fresh_llada(params, vocab_rows).items() if k not in ("auto_map", "model_type")}
    return {**dense, "architectures": ["LLaDABlocksModelLM"], "block_length": length}


def _shape_of(params: ModelParams, vocab_rows: int) -> dict[str, Any]:
    """What LLaDA-MoE, LLaDA2, Dream and iLLaDA name as transformers does."""
    return {
        "vocab_size": vocab_rows,
        "hidden_size": params.d_model,
        "num_hidden_layers": params.n_layers,
        "num_attention_heads": params.n_heads,
        "num_key_value_heads": params.n_kv_heads or params.n_heads,
        "max_position_embeddings": params.max_sequence_length,
        "rope_theta": params.rope_theta,
        "rms_norm_eps": params.rms_norm_eps,
        "tie_word_embeddings": params.weight_tying,
    }


def _fresh_llada_moe(params: ModelParams, vocab_rows: int) -> dict[str, Any]:
    return {
        **LLADA_MOE.template(),
        **_shape_of(params, vocab_rows),
        "moe_layer_freq": [1] * params.n_layers,
        "dense_intermediate_size": params.mlp_hidden_size,
        "expert_intermediate_size": params.expert_hidden_size,
        "num_experts": params.num_experts,
        "num_experts_per_tok": params.experts_per_token,
        "qk_layernorm": params.qk_norm,
    }


def _is_llada2(config: Mapping[str, Any]) -> bool:
    """2.0 and 2.1, whose files are the same byte for byte; also dFactory's merged layout, to be refused by name."""
    return str(config.get("model_type")).startswith("llada2_moe")


def _fresh_llada2(params: ModelParams, vocab_rows: int) -> dict[str, Any]:
    head_width = params.d_model // params.n_heads
    experts, per_token = params.num_experts, params.experts_per_token
    n_groups = 1 if experts % 2 else math.gcd(experts // 2, LLADA2.config["n_group"])  # of two or more experts
    return {
        **LLADA2.template(),
        **_shape_of(params, vocab_rows),
        "head_dim": head_width,
        "rotary_dim": head_width // 2,
        "intermediate_size": params.mlp_hidden_size,
        "moe_intermediate_size": params.expert_hidden_size,
        "num_experts": experts,
        "num_experts_per_tok": per_token,
        "n_group": n_groups,
        "topk_group": max(-(-n_groups // 2), -(-per_token * n_groups // experts)),  # half, or as many as hold them
        **({} if params.block_length is None else {"block_length": params.block_length}),
    }


def _is_dream(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") == "Dream"


def _fresh_dream(params: ModelParams, vocab_rows: int) -> dict[str, Any]:
    return {
        **DREAM.template(),
        **_shape_of(params, vocab_rows),
        "intermediate_size": params.mlp_hidden_size,
    }


LLADA_NAMES = {
    "hidden_size": "d_model",
    "intermediate_size": "mlp_hidden_size",
    "max_position_embeddings": "max_sequence_length",
    "num_attention_heads": "n_heads",
    "num_hidden_layers": "n_layers",
    "num_key_value_heads": "n_kv_heads",
    "rms_norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "tie_word_embeddings": "weight_tying",
    "vocab_size": "vocab_size",
}
"""A LLaMA's keys of a config.json to LLaDA's."""


def _fresh_masked_lm(params: ModelParams, vocab_rows: int) -> dict[str, Any]:
    return {**params.backbone, "vocab_size": vocab_rows}


LLADA = Published(
    "LLaDA-8B",
    {"mask_id": 126336, "eos_id": 126081, "pad_id": 126081, "bos_id": 126080, "eot_id": 126348},
)
LLADA_MOE = Published("LLaDA-MoE-7B-A1B", {"mask_id": 156895, "eos_id": 156892, "pad_id": 156892})
# Names and keys: its published network, ILLaDAForCausalLM; the shape and the mask: its card. Its own config.json was not at
# hand: rope_theta, rms_norm_eps and its other ids stand beside this file as usual ones, and a checkpoint names its own.
ILLADA = Published("iLLaDA-8B", {"mask_id": 5})
# Names, keys and ids: ZHZisZZ/dllm@ca17675, dllm/pipelines/dream/models; the shape is Qwen2.5-7B's. bos and eot are its
# tokenizer's; its own config.json was not at hand, so the file beside this one holds the keys that its class reads.
DREAM = Published(
    "Dream-v0",
    {"mask_id": 151666, "eos_id": 151643, "pad_id": 151643, "bos_id": 151665, "eot_id": 151645},
)
LLADA2 = Published("LLaDA2.0-mini", {"mask_id": 156895, "eos_id": 156892, "pad_id": 156892})

_MOE_NAMES = {
    "model.embed_tokens": "model.transformer.wte",
    "model.norm": "model.transformer.ln_f",
    "model.layers": "model.transformer.blocks",
    "lm_head": "model.transformer.ff_out",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ff_norm",
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "self_attn.q_norm": "q_norm",
    "self_attn.k_norm": "k_norm",
}
# Qwen2's and LLaMA's names. The parts of the feed-forward come first, which their `ff_out` is told from the head by.
_QWEN_NAMES = {"mlp.gate_proj": "ff_proj", "mlp.up_proj": "up_proj", "mlp.down_proj": "ff_out", **_MOE_NAMES}
_LLADA2_NAMES = {
    "model.word_embeddings": "model.transformer.wte",
    "model.norm": "model.transformer.ln_f",
    "model.layers": "model.transformer.blocks",
    "lm_head": "model.transformer.ff_out",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ff_norm",
    "attention.query_key_value": "qkv_proj",
    "attention.query_layernorm": "q_norm",
    "attention.key_layernorm": "k_norm",
    "attention.dense": "attn_out",
    "mlp.gate.expert_bias": "mlp.expert_bias",
    "mlp.shared_experts": "shared_expert",
}

_TABLE = (
    Family(
        kind="illada",
        config="llada_core.modeling.configuration.ILLaDAConfig",
        network="llada_core.modeling.network.ILLaDAForCausalLM",
        claims=_is_illada,
        fresh=_fresh_illada,
        published=ILLADA,
        renamed=_QWEN_NAMES,
        recommended=("illada",),
        named={"iLLaDA": "illada"},
        by_blocks="llada_blocks",
    ),
    Family(
        kind="llada",
        config="llada_core.modeling.configuration.LLaDAConfig",
        network="llada_core.modeling.network.LLaDAModelLM",
        claims=_is_llada,
        fresh=_fresh_llada,
        published=LLADA,
        by_blocks="llada_blocks",
    ),
    Family(
        kind="llada_blocks",
        config="llada_core.modeling.configuration.LLaDABlocksConfig",
        network="llada_core.modeling.network.LLaDABlocksModelLM",
        claims=_is_llada_blocks,
        fresh=_fresh_llada_blocks,
        block_length=32,
        by_blocks="llada_blocks",
    ),
    Family(
        kind="llada_moe",
        config="llada_core.modeling.configuration.LLaDAMoEConfig",
        network="llada_core.modeling.network.LLaDAMoEModelLM",
        claims=_is_llada_moe,
        fresh=_fresh_llada_moe,
        published=LLADA_MOE,
        renamed=_MOE_NAMES,
    ),
    Family(
        kind="llada2",
        config="llada_core.modeling.configuration.LLaDA2Config",
        network="llada_core.modeling.network.LLaDA2MoeModelLM",
        claims=_is_llada2,
        fresh=_fresh_llada2,
        published=LLADA2,
        renamed=_LLADA2_NAMES,
        block_length=32,
        recommended=("llada2.0", "quality", "speed"),
        named={"LLaDA2.0": "llada2.0", "LLaDA2.1": "quality"},
        by_blocks="llada2",
    ),
    Family(
        kind="dream",
        config="llada_core.modeling.configuration.DreamConfig",
        network="llada_core.modeling.network.DreamModel",
        claims=_is_dream,
        fresh=_fresh_dream,
        published=DREAM,
        renamed=_QWEN_NAMES,
    ),
    Family(  # any other model that transformers knows as a masked-LM
        kind="masked_lm",
        config="transformers.AutoConfig",
        network="llada_core.modeling.masked_lm.MaskedLM",
        claims=None,
        fresh=_fresh_masked_lm,
        stored_bytes=4,
        needs={"model_type": "distilbert"},
    ),
)
FAMILIES = {family.kind: family for family in _TABLE}


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a config.json, given as its keys."""
    families = FAMILIES.values()
    claimed = next((family for family in families if family.claims is not None and family.claims(config)), None)
    return claimed or next(family for family in families if family.claims is None)


def recommended(name: str, config: Mapping[str, Any] | None = None) -> str:
    """Which settings of the sampler are for a model that brings none, by the keys of its config.json, if it is at hand, and
    by the name of its folder or repository; empty where its family recommends none.
    """
    families = FAMILIES.values() if config is None else [family_of(config)]
    named = (named.items() for named in (family.named for family in families))
    found = (which for each in named for start, which in each if Path(name).name.startswith(start))
    return next(found, "" if config is None else next(iter(family_of(config).recommended), ""))


def published_as(name: str) -> Family | None:
    """The family whose published model a folder or Hub name is named after."""
    last = Path(name).name
    return next((f for f in FAMILIES.values() if f.published and last.startswith(f.published.name)), None)


def published_with(config: Mapping[str, Any], vocab_size: int) -> Published | None:
    """The published model of this architecture and exactly this vocabulary (same vocabulary, same ids)."""
    known = [family.published for family in FAMILIES.values() if family.published is not None]
    architectures = config.get("architectures") or []
    same = (p for p in known if p.config["architectures"] == architectures and p.vocab_size == vocab_size)
    return next(same, None)
