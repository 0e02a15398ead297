"""The shape of a network, read key by key from a config.json.

A key that this package does not compute is refused by name: a checkpoint that loads is computed as it was trained.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from llada_core.modeling.families import FAMILIES, TOKEN_KEYS


@dataclass(frozen=True, kw_only=True)
class ExpertGroups:
    """Routing by groups: a token's experts are taken from `kept` of `n_groups`; `scale` multiplies their weights."""

    n_groups: int
    kept: int
    scale: float


@dataclass(frozen=True, kw_only=True)
class ExpertShape:
    """The mixture-of-experts part of an architecture; widths in features, `sparse` one flag per layer.

    `groups`: of a router by sigmoids whose weights are normalised; None of one by a softmax over all experts.
    """

    n_experts: int
    per_token: int
    width: int
    shared_width: int
    sparse: tuple[bool, ...]
    router_bias: bool
    groups: ExpertGroups | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.per_token <= self.n_experts:
            raise ValueError(f"config.json: num_experts_per_tok = {self.per_token} of {self.n_experts} experts")
        if self.groups is None:
            return
        n, kept = self.groups.n_groups, self.groups.kept
        # A group counts as much as its two best experts together, which a group of one does not have.
        if self.n_experts % n or self.n_experts < 2 * n:
            raise ValueError(f"config.json: n_group = {n} must divide {self.n_experts} experts, two or more in a group")
        # Experts of other groups score minus infinity: a top-k that reaches beyond the kept ones would take some of these.
        if not 1 <= kept <= n or self.per_token > kept * (self.n_experts // n):
            raise ValueError(
                f"config.json: topk_group = {kept} of {n} groups must hold {self.per_token} experts a token"
            )


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """All that determines the modules and the arithmetic of a LLaDA model.

    A head has its share of the width, and all of it is rotated, where `own_head_width` and `own_rotary_width` are None;
    `fused_qkv`: queries, keys and values are one projection. `shifted`: what is predicted for a position stands at the one
    before it (for the first, at itself). `block_length`: of the blocks by which it attends; None:
    every position sees every other.
    """

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
    own_head_width: int | None = None
    own_rotary_width: int | None = None
    fused_qkv: bool = False
    shifted: bool = False
    block_length: int | None = None

    def __post_init__(self) -> None:
        # Even, because a rotation (RoPE) turns the features of a head in pairs, one of each half.
        if self.own_head_width is None and self.width % (2 * self.n_heads):
            raise ValueError(f"config.json: width {self.width} is not an even multiple of {self.n_heads} heads")
        if self.rotary_width % 2 or not 0 < self.rotary_width <= self.head_width:
            raise ValueError(
                f"config.json: {self.rotary_width} rotated features of a head of {self.head_width} are no pairs"
            )
        # Grouped-query attention (arXiv:2305.13245): equally many query heads share each head of keys and values.
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"config.json: {self.n_kv_heads} key/value heads do not divide {self.n_heads} heads")

    @property
    def head_width(self) -> int:
        return self.width // self.n_heads if self.own_head_width is None else self.own_head_width

    @property
    def rotary_width(self) -> int:
        return self.head_width if self.own_rotary_width is None else self.own_rotary_width


# What each key must say (any of the listed values) for the arithmetic of this package to be the checkpoint's.
_DENSE_FIXED: dict[str, tuple[Any, ...]] = {
    # The activation "swiglu" would split the gate in two, which these shapes do not allow.
    "activation_type": ("silu",),
    "alibi": (False, None),
    "attention_dropout": (0.0,),
    "bias_for_layer_norm": (False, None),
    # Above 1 the weights have names with a group in them, which no published checkpoint has.
    "block_group_size": (1,),
    # The type "sequential" has queries, keys and values in one weight and no up projection.
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
    # The published code never normalises the weights of the chosen experts, whatever this key says.
    "norm_topk_prob": (False, None),
    "partial_rotary_factor": (1, 1.0),
    "rope_scaling": (None,),
    "routed_scaling_factor": (1, 1.0, None),
    "router_num_group": (None, 1),
    "router_topk_group": (None, 1),
}
_LLADA2_FIXED: dict[str, tuple[Any, ...]] = {
    "attention_dropout": (0.0,),
    "embedding_dropout": (0.0, None),
    "hidden_act": ("silu",),
    "model_type": ("llada2_moe",),
    "moe_router_enable_expert_bias": (True, None),
    "norm_head": (False, None),
    "norm_softmax": (False, None),
    # Here the weights of the chosen are divided by their sum, and scaled afterwards (routed_scaling_factor).
    "norm_topk_prob": (True, None),
    "output_dropout": (0.0, None),
    "rope_scaling": (None,),
    "router_dtype": ("fp32", None),
    # Sigmoids judge experts one by one (DeepSeek-V3, arXiv:2412.19437); a softmax would choose other groups and weigh otherwise.
    "score_function": ("sigmoid", None),
    "use_bias": (False,),
    "use_qk_norm": (True, None),  # absent means true: the published code norms always
    "use_qkv_bias": (False,),
    "use_rmsnorm": (True, None),
    "use_sliding_window": (False, None),
    "using_split_qkv_in_self_attention": (False, None),
}
_DREAM_FIXED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (True, None),
    "attention_dropout": (0.0,),
    "hidden_act": ("silu",),
    "rope_scaling": (None,),
    "use_mrope": (False, None),
    "use_sliding_window": (False, None),
}
_ILLADA_FIXED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "hidden_act": ("silu",),
    "layer_norm_eps": (None,),  # a number would make its norms LayerNorms
    "mlp_bias": (False, None),
    "rope_scaling": (None, {"rope_type": "default"}, {"type": "default"}, {"factor": 1.0, "type": "default"}),
}
# Keys that say nothing about the arithmetic of a forward pass here.
# How new weights are drawn, the slope of an ALiBi that is off, and which kernel or precision computes: the choice is ours.
_DENSE_SILENT = frozenset(
    ["alibi_bias_max", "flash_attention", "init_cutoff_factor", "init_device", "init_fn", "init_std", "precision"]
)
# The weight of the balance loss is a setting of the stage that trains; a forward pass knows none.
_MOE_SILENT = frozenset(["initializer_range", "output_router_logits", "router_aux_loss_coef"])
# Files give the width of a sliding window that use_sliding_window turns off.
_LLADA2_SILENT = frozenset(["initializer_range", "max_window_layers", "output_router_logits", "sliding_window"])
_DREAM_SILENT = frozenset(["initializer_range", "max_window_layers", "sliding_window"])
# Dropout is a matter of training, and ours drops nothing out.
_ILLADA_SILENT = frozenset(["attention_dropout", "embd_pdrop", "initializer_range", "pretraining_tp", "resid_pdrop"])
_GENERAL = frozenset(
    ["architectures", "auto_map", "dtype", "model_type", "name_or_path", "quantization_config", "tie_word_embeddings"]
) | frozenset(["torch_dtype", "transformers_version", "use_cache", *TOKEN_KEYS])


class _Reader:
    """Reads keys of one config.json and remembers which; refuses what this package cannot compute, by name."""

    def __init__(self, values: Mapping[str, Any], silent: frozenset[str]) -> None:
        self.values, self.seen = values, set(silent | _GENERAL)

    def need(self, key: str) -> Any:
        self.seen.add(key)
        # The published classes fill missing keys in as for a model of another kind (no RoPE, tied weights): no default is safe.
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
            # Absent is not the same as null: an absent key has a default in some published code, null means off.
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
    # Two keys may say how many heads there are of keys and values, and must not contradict each other.
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
    # The published file says both: its ratio of 4 is not what its weights have (12,288 for a width of 4,096), so it comes second.
    ratio = read.maybe("mlp_ratio", 4)
    architecture = Architecture(
        # Tables may be padded beyond the words of the tokenizer; the stored weights have the padded number of rows.
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
    # A list of flags where LLaDA2 counts its first dense layers: both become one flag a layer.
    frequency = read.maybe("moe_layer_freq", [1] * n_layers)
    if len(frequency) != n_layers or set(frequency) - {0, 1}:
        raise ValueError(f"config.json: moe_layer_freq = {frequency} must hold a 0 or 1 for each of {n_layers} layers")
    experts = ExpertShape(
        n_experts=int(read.need("num_experts")),
        per_token=int(read.need("num_experts_per_tok")),
        width=int(read.need("expert_intermediate_size")),
        # Published as null: an expert that every token goes through is left out then.
        shared_width=int(read.maybe("shared_expert_intermediate_size", 0)),
        sparse=tuple(bool(f) for f in frequency),
        router_bias=bool(read.maybe("moe_router_enable_expert_bias", False)),
    )
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


def refuse_merged(values: Mapping[str, Any]) -> None:
    """Raises `ValueError` for the config.json of a layout of dFactory's."""
    if values.get("model_type") == "llada2_moe_veomni":
        raise ValueError(
            "config.json: model_type llada2_moe_veomni is dFactory's merged layout, whose experts lie in one weight; "
            "split it with its scripts/moe_convertor.py, and write llada2_moe"
        )


def llada2_architecture(values: Mapping[str, Any]) -> Architecture:
    """What a config.json of LLaDA2.0 or 2.1 describes; errors as `dense_architecture`."""
    refuse_merged(values)
    # Keys that class defaults would fill in are read as those defaults, where the published code has them and the file may not.
    read = _Reader(values, _LLADA2_SILENT)
    read.fixed(_LLADA2_FIXED, {})
    n_layers, n_heads = int(read.need("num_hidden_layers")), int(read.need("num_attention_heads"))
    dense, width = int(read.need("first_k_dense_replace")), int(read.need("hidden_size"))
    expert_width, head_width = int(read.need("moe_intermediate_size")), read.maybe("head_dim", width // n_heads)
    # Both keys stand in the published file: where they disagree, nobody can tell which the weights were trained with.
    # Rounded down, as the published code does; the features behind are not rotated.
    rotary = int(head_width * float(read.need("partial_rotary_factor")))
    if read.maybe("rotary_dim", rotary) != rotary:
        raise ValueError(f"config.json: rotary_dim = {values['rotary_dim']} is not partial_rotary_factor's {rotary}")
    experts = ExpertShape(
        n_experts=int(read.need("num_experts")),
        per_token=int(read.need("num_experts_per_tok")),
        width=expert_width,
        shared_width=expert_width * int(read.maybe("num_shared_experts", 0)),
        sparse=tuple(layer >= dense for layer in range(n_layers)),
        # Published code has the bias whatever moe_router_enable_expert_bias says: without it other experts are chosen.
        router_bias=True,
        groups=ExpertGroups(
            n_groups=int(read.need("n_group")),
            kept=int(read.need("topk_group")),
            scale=float(read.need("routed_scaling_factor")),
        ),
    )
    architecture = Architecture(
        vocab_rows=int(read.need("vocab_size")),
        width=width,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=int(read.need("num_key_value_heads")),
        mlp_width=int(read.need("intermediate_size")),
        max_length=int(read.need("max_position_embeddings")),
        rope_theta=float(read.need("rope_theta")),
        norm_eps=float(read.need("rms_norm_eps")),
        tied=bool(values.get("tie_word_embeddings", False)),
        qkv_bias=False,
        qk_norm="head",
        moe=experts,
        own_head_width=int(head_width),
        own_rotary_width=rotary,
        fused_qkv=True,
        block_length=_block_length(read.maybe("block_length", FAMILIES["llada2"].block_length)),
    )
    read.finish()
    return architecture


def dream_architecture(values: Mapping[str, Any]) -> Architecture:
    """What a config.json of Dream-7B describes; errors as `dense_architecture`."""
    read = _Reader(values, _DREAM_SILENT)
    read.fixed(_DREAM_FIXED, {})
    # As in Qwen2, where Dream comes from: queries, keys and values have a bias, and no other projection. It began as an
    # autoregressive model and kept predicting the next token (arXiv:2508.15487).
    return replace(_named_as_transformers_does(read), qkv_bias=True, shifted=True)


def illada_architecture(values: Mapping[str, Any]) -> Architecture:
    """What a config.json of iLLaDA describes; errors as `dense_architecture`."""
    read = _Reader(values, _ILLADA_SILENT)
    read.fixed(_ILLADA_FIXED, {})
    read.need("tie_word_embeddings")
    return _named_as_transformers_does(read)


def _named_as_transformers_does(read: _Reader) -> Architecture:
    """A dense model by the keys that LLaMA and Qwen2 have; every key has been read then."""
    n_heads = int(read.need("num_attention_heads"))
    architecture = Architecture(
        vocab_rows=int(read.need("vocab_size")),
        width=int(read.need("hidden_size")),
        n_layers=int(read.need("num_hidden_layers")),
        n_heads=n_heads,
        n_kv_heads=int(read.maybe("num_key_value_heads", n_heads)),
        mlp_width=int(read.need("intermediate_size")),
        max_length=int(read.need("max_position_embeddings")),
        rope_theta=float(read.need("rope_theta")),
        norm_eps=float(read.need("rms_norm_eps")),
        tied=bool(read.values.get("tie_word_embeddings", False)),
        qkv_bias=False,
        qk_norm="none",
    )
    read.finish()
    return architecture


def blocks_architecture(values: Mapping[str, Any]) -> Architecture:
    """What a dense config.json with a `block_length` describes; errors as `dense_architecture`."""
    # The dense reader refuses every key that the published layout does not have, and this is the only new one.
    dense = dense_architecture({name: value for name, value in values.items() if name != "block_length"})
    return replace(dense, block_length=_block_length(values.get("block_length")))


def _block_length(value: Any) -> int:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"config.json: block_length = {value!r} must be a number of tokens from 1")
    return value
