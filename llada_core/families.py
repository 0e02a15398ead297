"""The published families as data: special tokens, special strings and complete config.json templates.

Knows the checkpoints' conventions; does not know torch, transformers, or any file.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class SpecialTokens:
    """The token ids a masked-diffusion model cannot do without, and the two that only a chat needs."""

    mask_id: int
    eos_id: int
    pad_id: int
    bos_id: int | None = None
    eot_id: int | None = None

    def check(self, vocab_size: int) -> "SpecialTokens":
        """These tokens, once every id lies in `[0, vocab_size)` and MASK is none of the others; else `ValueError`."""
        named = {k: v for k, v in vars(self).items() if v is not None}
        for name, value in named.items():
            if not 0 <= value < vocab_size:
                raise ValueError(f"{name} {value} is outside the vocabulary (0..{vocab_size - 1})")
            if name != "mask_id" and value == self.mask_id:
                raise ValueError(f"{name} is {value}, which is also mask_id; the mask must be a token of its own")
        return self

    @property
    def end_ids(self) -> frozenset[int]:
        """The ids after which an answer is over."""
        return frozenset(i for i in (self.eos_id, self.eot_id) if i is not None)


BOS, EOS, MASK = "<|startoftext|>", "<|endoftext|>", "<|mdm_mask|>"
HEADER_START, HEADER_END, EOT = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
SPECIAL_STRINGS = (BOS, EOS, MASK, HEADER_START, HEADER_END, EOT)
"""LLaDA's special strings in the order in which a tokenizer trained here numbers them."""

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
"""LLaDA's chat format (LLaDA-8B-Instruct)."""

MASK_STRINGS = (MASK, "<|mask|>", "[MASK]", "<mask>")
EOT_STRINGS = (EOT, "<|role_end|>")


@dataclass(frozen=True)
class Family:
    """One published family: where its special tokens are when nothing nearer names them, and its config.json."""

    name: str
    special: SpecialTokens
    config: dict[str, Any] = field(repr=False)

    @property
    def vocab_size(self) -> int:
        return int(self.config["vocab_size"])


_DENSE_CONFIG: dict[str, Any] = {
    "activation_type": "silu",
    "alibi": False,
    "alibi_bias_max": 8.0,
    "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True,
    "auto_map": {
        "AutoConfig": "configuration_llada.LLaDAConfig",
        "AutoModel": "modeling_llada.LLaDAModelLM",
        "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
    },
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": 4096,
    "embedding_dropout": 0.0,
    "embedding_size": 126464,
    "eos_token_id": 126081,
    "flash_attention": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "init_cutoff_factor": None,
    "init_device": "meta",
    "init_fn": "mitchell",
    "init_std": 0.02,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": 126336,
    "max_sequence_length": 4096,
    "mlp_hidden_size": 12288,
    "mlp_ratio": 4,
    "model_type": "llada",
    "multi_query_attention": None,
    "n_heads": 32,
    "n_kv_heads": 32,
    "n_layers": 32,
    "pad_token_id": 126081,
    "precision": "amp_bf16",
    "residual_dropout": 0.0,
    "rms_norm_eps": 1e-05,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "use_cache": False,
    "vocab_size": 126464,
    "weight_tying": False,
}

_MOE_CONFIG: dict[str, Any] = {
    "architectures": ["LLaDAMoEModelLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_lladamoe.LLaDAConfig",
        "AutoModel": "modeling_lladamoe.LLaDAMoEModelLM",
        "AutoModelForCausalLM": "modeling_lladamoe.LLaDAMoEModelLM",
    },
    "clip_qkv": None,
    "dense_intermediate_size": 8192,
    "eos_token_id": 156892,
    "expert_intermediate_size": 1024,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "max_position_embeddings": 8192,
    "model_type": "llada",
    "moe_layer_freq": [1] * 16,
    "moe_router_enable_expert_bias": False,
    "moe_router_score_function": "softmax",
    "norm_topk_prob": None,
    "num_attention_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 16,
    "num_key_value_heads": 16,
    "output_router_logits": False,
    "pad_token_id": 156892,
    "partial_rotary_factor": 1,
    "qk_layernorm": True,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 50000,
    "routed_scaling_factor": 1,
    "router_aux_loss_coef": 0.01,
    "router_num_group": None,
    "router_topk_group": None,
    "shared_expert_intermediate_size": None,
    "tie_word_embeddings": False,
    "use_cache": False,
    "vocab_size": 157184,
}

LLADA = Family("LLaDA-8B", SpecialTokens(126336, 126081, 126081, bos_id=126080, eot_id=126348), _DENSE_CONFIG)
LLADA_MOE = Family("LLaDA-MoE-7B-A1B", SpecialTokens(156895, 156892, 156892), _MOE_CONFIG)
FAMILIES = (LLADA, LLADA_MOE)


def family_of(architectures: list[str], vocab_size: int) -> Family | None:
    """The published family with this architecture and exactly this vocabulary (same vocabulary, same ids)."""
    same = (f for f in FAMILIES if f.config["architectures"] == architectures and f.vocab_size == vocab_size)
    return next(same, None)
