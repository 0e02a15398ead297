"""The shape of a network: asked for in settings, or read key by key from a config.json. Knows no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from llada_core.settings import Block


class ModelParams(Block):
    """Shape of a fresh model; the first group means the same for dense and mixture-of-experts models."""

    kind: Literal["llada", "llada_moe", "masked_lm"] = "llada"
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
    # any transformers masked-LM: its `model_type` and config keys
    backbone: dict[str, str | int | float | bool] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.d_model % (2 * self.n_heads):
            raise ValueError(f"d_model {self.d_model} must be an even multiple of n_heads {self.n_heads} (RoPE pairs)")
        if self.n_kv_heads is not None and self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_kv_heads {self.n_kv_heads} must divide n_heads {self.n_heads}")
        if self.experts_per_token > self.num_experts:
            raise ValueError(f"experts_per_token {self.experts_per_token} is more than num_experts {self.num_experts}")
        if self.kind == "masked_lm" and "model_type" not in self.backbone:
            raise ValueError("kind masked_lm needs backbone.model_type, for example distilbert")
        return self


class LoraParams(Block):
    """Low-rank adapters through peft; `targets` are names or a regular expression, `all-linear` excludes the head."""

    r: int = Field(default=32, ge=1)
    alpha: int = Field(default=64, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: str | tuple[str, ...] = "all-linear"
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


@dataclass(frozen=True, kw_only=True)
class ExpertShape:
    """The mixture-of-experts part of an architecture; widths in features, `sparse` one flag per layer."""

    n_experts: int
    per_token: int
    width: int
    shared_width: int
    sparse: tuple[bool, ...]
    router_bias: bool


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """All that determines the modules and the arithmetic of a LLaDA model."""

    vocab_rows: int
    width: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    mlp_width: int
    max_length: int
    rope_theta: float
    norm_eps: float
    tied: bool
    qkv_bias: bool
    qk_norm: Literal["none", "projection", "head"]
    moe: ExpertShape | None = None

    def __post_init__(self) -> None:
        if self.width % (2 * self.n_heads):
            raise ValueError(f"config.json: width {self.width} is not an even multiple of {self.n_heads} heads")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"config.json: {self.n_kv_heads} key/value heads do not divide {self.n_heads} heads")

    @property
    def head_width(self) -> int:
        return self.width // self.n_heads


# What each key must say (any of the listed values) for the arithmetic of this package to be the checkpoint's.
_DENSE_FIXED: dict[str, tuple[Any, ...]] = {
    "activation_type": ("silu",),
    "alibi": (False, None),
    "attention_dropout": (0.0,),
    "bias_for_layer_norm": (False, None),
    "block_group_size": (1,),
    "block_type": ("llama",),
    "embedding_dropout": (0.0,),
    "include_bias": (False,),
    "input_emb_norm": (False, None),
    "layer_norm_type": ("rms",),
    "layer_norm_with_affine": (True,),
    "residual_dropout": (0.0,),
    "rope": (True,),
    "rope_full_precision": (True,),
    "scale_logits": (False, None),
}
_MOE_FIXED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "attention_dropout": (0.0,),
    "clip_qkv": (None,),
    "hidden_act": ("silu",),
    "moe_router_score_function": ("softmax",),
    "norm_topk_prob": (False, None),
    "partial_rotary_factor": (1, 1.0),
    "rope_scaling": (None,),
    "routed_scaling_factor": (1, 1.0, None),
    "router_num_group": (None, 1),
    "router_topk_group": (None, 1),
}
# Keys that say nothing about the arithmetic of a forward pass here.
_DENSE_SILENT = frozenset(
    ["alibi_bias_max", "flash_attention", "init_cutoff_factor", "init_device", "init_fn", "init_std", "precision"]
)
_MOE_SILENT = frozenset(["initializer_range", "output_router_logits", "router_aux_loss_coef"])
TOKEN_KEYS = ("mask_token_id", "eos_token_id", "pad_token_id", "bos_token_id", "eot_token_id")
_GENERAL = frozenset(
    ["architectures", "auto_map", "dtype", "model_type", "name_or_path", "quantization_config", "tie_word_embeddings"]
) | frozenset(["torch_dtype", "transformers_version", "use_cache", *TOKEN_KEYS])


class _Reader:
    """Reads keys of one config.json and remembers which; refuses what this package cannot compute, by name."""

    def __init__(self, values: Mapping[str, Any], silent: frozenset[str]) -> None:
        self.values, self.seen = values, set(silent | _GENERAL)

    def need(self, key: str) -> Any:
        self.seen.add(key)
        if self.values.get(key) is None:
            raise ValueError(f"config.json: the key {key!r} is missing; it determines the model, so nothing is assumed")
        return self.values[key]

    def maybe(self, key: str, default: Any) -> Any:
        self.seen.add(key)
        value = self.values.get(key)
        return default if value is None else value

    def fixed(self, allowed: Mapping[str, tuple[Any, ...]], optional_defaults: Mapping[str, Any]) -> None:
        for key, values in allowed.items():
            self.seen.add(key)
            if key not in self.values and key not in optional_defaults and None not in values:
                self.need(key)
            value = self.values.get(key, optional_defaults.get(key))
            if value not in values:
                raise ValueError(f"config.json: {key} = {value!r} is not supported; supported: {values[0]!r}")

    def finish(self) -> None:
        """Every key must have been read; an unread one that is switched off (null, false) changes nothing."""
        unread = {k: v for k, v in self.values.items() if k not in self.seen and v not in (None, False)}
        for key, value in unread.items():
            raise ValueError(f"config.json: the key {key!r} = {value!r} is not known, so the model cannot be trusted")


def dense_architecture(values: Mapping[str, Any]) -> Architecture:
    """What a dense config.json describes; `ValueError` naming the first missing, unknown or unsupported key."""
    read = _Reader(values, _DENSE_SILENT)
    read.fixed(_DENSE_FIXED, {"block_group_size": 1, "rope_full_precision": True, "layer_norm_with_affine": True})
    heads = int(read.need("n_heads"))
    kv_heads = read.maybe("n_kv_heads", None)
    if read.maybe("multi_query_attention", False):
        if kv_heads not in (None, 1):
            raise ValueError(f"config.json: multi_query_attention = True contradicts n_kv_heads = {kv_heads}")
        kv_heads = 1
    if read.maybe("attention_layer_norm", False) and not read.maybe("attention_layer_norm_with_affine", True):
        raise ValueError("config.json: attention_layer_norm_with_affine = False is not supported; supported: True")
    read.maybe("attention_layer_norm_with_affine", True)
    width, vocab = int(read.need("d_model")), int(read.need("vocab_size"))
    ratio = read.maybe("mlp_ratio", 4)
    architecture = Architecture(
        vocab_rows=int(read.maybe("embedding_size", vocab)),
        width=width,
        n_layers=int(read.need("n_layers")),
        n_heads=heads,
        n_kv_heads=heads if kv_heads is None else int(kv_heads),
        mlp_width=int(read.maybe("mlp_hidden_size", ratio * width)),
        max_length=int(read.need("max_sequence_length")),
        rope_theta=float(read.need("rope_theta")),
        norm_eps=float(read.need("rms_norm_eps")),
        tied=bool(read.need("weight_tying")),
        qkv_bias=bool(read.maybe("include_qkv_bias", False)),
        qk_norm="projection" if values.get("attention_layer_norm") else "none",
    )
    read.finish()
    return architecture


def moe_architecture(values: Mapping[str, Any]) -> Architecture:
    """What a LLaDA-MoE config.json describes; errors as `dense_architecture`."""
    read = _Reader(values, _MOE_SILENT)
    read.fixed(_MOE_FIXED, {})
    n_layers, n_heads = int(read.need("num_hidden_layers")), int(read.need("num_attention_heads"))
    frequency = read.maybe("moe_layer_freq", [1] * n_layers)
    if len(frequency) != n_layers or set(frequency) - {0, 1}:
        raise ValueError(f"config.json: moe_layer_freq = {frequency} must hold a 0 or 1 for each of {n_layers} layers")
    experts = ExpertShape(
        n_experts=int(read.need("num_experts")),
        per_token=int(read.need("num_experts_per_tok")),
        width=int(read.need("expert_intermediate_size")),
        shared_width=int(read.maybe("shared_expert_intermediate_size", 0)),
        sparse=tuple(bool(f) for f in frequency),
        router_bias=bool(read.maybe("moe_router_enable_expert_bias", False)),
    )
    if not 1 <= experts.per_token <= experts.n_experts:
        raise ValueError(f"config.json: num_experts_per_tok = {experts.per_token} of {experts.n_experts} experts")
    architecture = Architecture(
        vocab_rows=int(read.need("vocab_size")),
        width=int(read.need("hidden_size")),
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=int(read.maybe("num_key_value_heads", n_heads)),
        mlp_width=int(read.maybe("dense_intermediate_size", 0)),
        max_length=int(read.need("max_position_embeddings")),
        rope_theta=float(read.need("rope_theta")),
        norm_eps=float(read.need("rms_norm_eps")),
        tied=bool(values.get("tie_word_embeddings", False)),
        qkv_bias=False,
        qk_norm="head" if read.maybe("qk_layernorm", False) else "none",
        moe=experts,
    )
    read.finish()
    return architecture
