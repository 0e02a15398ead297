"""The shape of a network, read key by key from a config.json; and what transformers needs to read and write a LLaDA:
configurations and the published names of weights.

A key that this package does not compute is refused by name: a checkpoint that loads is computed as it was trained.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming

from llada_core.modeling.families import FAMILIES, TOKEN_KEYS, Family, family_of


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
        if self.n_experts % n or self.n_experts < 2 * n:
            raise ValueError(f"config.json: n_group = {n} must divide {self.n_experts} experts, two or more in a group")
        if not 1 <= kept <= n or self.per_token > kept * (self.n_experts // n):
            raise ValueError(
                f"config.json: topk_group = {kept} of {n} groups must hold {self.per_token} experts a token"
            )


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """All that determines the modules and the arithmetic of a LLaDA model.

    A head has its share of the width, and all of it is rotated, where `own_head_width` and `own_rotary_width` are None;
    `fused_qkv`: queries, keys and values are one projection.
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

    def __post_init__(self) -> None:
        if self.own_head_width is None and self.width % (2 * self.n_heads):
            raise ValueError(f"config.json: width {self.width} is not an even multiple of {self.n_heads} heads")
        if self.rotary_width % 2 or not 0 < self.rotary_width <= self.head_width:
            raise ValueError(
                f"config.json: {self.rotary_width} rotated features of a head of {self.head_width} are no pairs"
            )
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
_LLADA2_FIXED: dict[str, tuple[Any, ...]] = {
    "attention_dropout": (0.0,),
    "embedding_dropout": (0.0, None),
    "hidden_act": ("silu",),
    "model_type": ("llada2_moe",),
    "moe_router_enable_expert_bias": (True, None),
    "norm_head": (False, None),
    "norm_softmax": (False, None),
    "norm_topk_prob": (True, None),
    "output_dropout": (0.0, None),
    "rope_scaling": (None,),
    "router_dtype": ("fp32", None),
    "score_function": ("sigmoid", None),
    "use_bias": (False,),
    "use_qk_norm": (True, None),  # absent means true: the published code norms always
    "use_qkv_bias": (False,),
    "use_rmsnorm": (True, None),
    "use_sliding_window": (False, None),
    "using_split_qkv_in_self_attention": (False, None),
}
# Keys that say nothing about the arithmetic of a forward pass here.
_DENSE_SILENT = frozenset(
    ["alibi_bias_max", "flash_attention", "init_cutoff_factor", "init_device", "init_fn", "init_std", "precision"]
)
_MOE_SILENT = frozenset(["initializer_range", "output_router_logits", "router_aux_loss_coef"])
_LLADA2_SILENT = frozenset(["initializer_range", "max_window_layers", "output_router_logits", "sliding_window"])
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


def llada2_architecture(values: Mapping[str, Any]) -> Architecture:
    """What a config.json of LLaDA2.0 or 2.1 describes; errors as `dense_architecture`."""
    if values.get("model_type") == "llada2_moe_veomni":
        raise ValueError(
            "config.json: model_type llada2_moe_veomni is dFactory's merged layout, whose experts lie in one weight; "
            "split it with its scripts/moe_convertor.py, and write llada2_moe"
        )
    read = _Reader(values, _LLADA2_SILENT)
    read.fixed(_LLADA2_FIXED, {})
    n_layers, n_heads = int(read.need("num_hidden_layers")), int(read.need("num_attention_heads"))
    dense, width = int(read.need("first_k_dense_replace")), int(read.need("hidden_size"))
    expert_width, head_width = int(read.need("moe_intermediate_size")), read.maybe("head_dim", width // n_heads)
    rotary = int(head_width * float(read.need("partial_rotary_factor")))
    if read.maybe("rotary_dim", rotary) != rotary:
        raise ValueError(f"config.json: rotary_dim = {values['rotary_dim']} is not partial_rotary_factor's {rotary}")
    experts = ExpertShape(
        n_experts=int(read.need("num_experts")),
        per_token=int(read.need("num_experts_per_tok")),
        width=expert_width,
        shared_width=expert_width * int(read.maybe("num_shared_experts", 0)),
        sparse=tuple(layer >= dense for layer in range(n_layers)),
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
    )
    read.finish()
    return architecture


def published_shapes(own: Mapping[str, Tensor], family: Family) -> dict[str, tuple[int, ...]]:
    """Published name and shape of every weight of a state dict of ours; experts, which lie in stacks here, one by one."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, weight in own.items():
        stem, dot, stack = family.published_name(name).partition(".experts.")
        if not dot:
            shapes[stem] = tuple(weight.shape)
            continue
        n_experts, rows, columns = weight.shape
        parts = {"down_proj": rows} if stack == "down" else {"gate_proj": rows // 2, "up_proj": rows // 2}
        for part, height in parts.items():
            shapes.update({f"{stem}.experts.{e}.{part}.weight": (height, columns) for e in range(n_experts)})
    return shapes


def register_names(family: Family) -> None:
    """Makes transformers load and save a family's network under the published names; experts are stacked on the way."""
    experts = [
        WeightConverter(
            ["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"],
            "mlp.experts.gate_up",
            [MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter("mlp.experts.*.down_proj.weight", "mlp.experts.down", [MergeModulelist(dim=0)]),
    ]
    renamings = [WeightRenaming(published, own) for published, own in family.renamed.items()]
    network = family.network.rpartition(".")[2]
    register_checkpoint_conversion_mapping(network, [*renamings, *experts], overwrite=True)


@functools.cache
def _register_models() -> None:
    """Tells transformers' Auto classes which network a config stands for; with the first config, as it imports torch."""
    for family in FAMILIES.values():
        if family.claims is not None:
            for chooser in (AutoModel, AutoModelForCausalLM):
                chooser.register(family.config_class, family.network_class, exist_ok=True)


class LLaDAConfig(PreTrainedConfig):
    """config.json of the dense family (LLaDA 8B, 1.5, iLLaDA); `from_dict` gives the MoE one where the file is one."""

    model_type = "llada"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "max_position_embeddings": "max_sequence_length",
        "intermediate_size": "mlp_hidden_size",
    }

    def __init__(self, **values: Any) -> None:
        self._published = {k: v for k, v in values.items() if k != "name_or_path" and not k.startswith("_")}
        _register_models()
        # transformers keeps a RoPE standard of its own under this key; ours is read from what was published
        super().__init__(**{k: v for k, v in values.items() if k != "rope_scaling"})
        tied = values.get("weight_tying", values.get("tie_word_embeddings", False))
        self.tie_word_embeddings = bool(tied)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Self:
        """The config of whichever family the file is one of: two of them call their `model_type` "llada"."""
        chosen = family_of({**config_dict, "model_type": cls.model_type}).config_class
        return super(LLaDAConfig, chosen).from_dict(config_dict, **kwargs)

    @classmethod
    def for_model(cls, **values: Any) -> Self:
        """From the keys of a config.json, as transformers' `AutoConfig.for_model`."""
        return cls(**values)

    def architecture(self) -> Architecture:
        """What to build; raises `ValueError` naming the first key that is missing, unknown or unsupported."""
        return dense_architecture(self.published())

    def published(self) -> dict[str, Any]:
        """The published keys with their present values: those of the file read, or of the template."""
        now = {k: self.__dict__.get(k, v) for k, v in self._published.items()}
        tokens = {k: self.__dict__[k] for k in TOKEN_KEYS if self.__dict__.get(k) is not None}
        return {**now, **tokens}

    def to_diff_dict(self) -> dict[str, Any]:
        """What `save_pretrained` writes: the published layout of config.json and nothing else."""
        written = {**self.published(), "model_type": self.model_type, "architectures": self.architectures}
        for key in ("dtype", "torch_dtype"):
            if key in written and self.dtype is not None:
                written[key] = str(self.dtype).removeprefix("torch.")
        return written

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        values.pop("_published", None)
        return values


class LLaDAMoEConfig(LLaDAConfig):
    """config.json of LLaDA-MoE, which also calls its `model_type` "llada"."""

    attribute_map: ClassVar[dict[str, str]] = {}

    def __init__(self, **values: Any) -> None:  # transformers would replace an inherited one by a dataclass's
        super().__init__(**values)

    def architecture(self) -> Architecture:
        return moe_architecture(self.published())


class LLaDA2Config(LLaDAConfig):
    """config.json of LLaDA2.0 and 2.1, which are the same; which sampler a model is for is a setting of its own."""

    model_type = "llada2_moe"
    attribute_map: ClassVar[dict[str, str]] = {}

    def __init__(self, **values: Any) -> None:  # as in LLaDAMoEConfig
        super().__init__(**values)

    def architecture(self) -> Architecture:
        return llada2_architecture(self.published())


AutoConfig.register("llada2_moe", LLaDA2Config, exist_ok=True)
AutoConfig.register("llada", LLaDAConfig, exist_ok=True)  # importing this is enough for the Auto classes
