"""A model from nothing: the published config.json of its family, filled in, and seeded initial weights.

Knows templates and initialisation; does not know files or training.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from llada_core.modeling.architecture import TOKEN_KEYS, ModelParams
from llada_core.modeling.block import Experts
from llada_core.modeling.families import LLaDAConfig, LLaDAMoEConfig
from llada_core.modeling.network import LLaDAModelLM, LLaDAMoEModelLM, new_masked_lm
from llada_core.modeling.predictor import MaskPredictor
from llada_core.tokenizer import LLADA, LLADA_MOE, SpecialTokens


def new_model(params: ModelParams, vocab_size: int, special_tokens: SpecialTokens, seed: int = 0) -> MaskPredictor:
    """A freshly initialised fp32 model on the CPU; the same seed gives the same weights, whatever torch's own is."""
    special_tokens.check(vocab_size)
    if params.kind == "masked_lm":
        return new_masked_lm(dict(params.backbone), vocab_size, special_tokens, seed)
    model = empty_model(params, vocab_size, special_tokens)
    model.to_empty(device="cpu")
    initialise(model, torch.Generator().manual_seed(seed))
    return model


def empty_model(params: ModelParams, vocab_size: int, special_tokens: SpecialTokens) -> LLaDAModelLM:
    """A model of the LLaDA family without memory for its weights: its shapes alone."""
    sparse = params.kind == "llada_moe"
    ids = {name.replace("_id", "_token_id"): i for name, i in vars(special_tokens).items() if i is not None}
    sizes = _moe_config(params) if sparse else {**_dense_config(params), "embedding_size": vocab_size}
    config = (LLaDAMoEConfig if sparse else LLaDAConfig)(**sizes, **ids, vocab_size=vocab_size)
    with torch.device("meta"):
        return (LLaDAMoEModelLM if sparse else LLaDAModelLM)(config)


def _template(config: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k != "vocab_size" and k not in TOKEN_KEYS}


def _dense_config(params: ModelParams) -> dict[str, Any]:
    return {
        **_template(LLADA.config),
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


def _moe_config(params: ModelParams) -> dict[str, Any]:
    return {
        **_template(LLADA_MOE.config),
        "hidden_size": params.d_model,
        "num_hidden_layers": params.n_layers,
        "moe_layer_freq": [1] * params.n_layers,
        "num_attention_heads": params.n_heads,
        "num_key_value_heads": params.n_kv_heads or params.n_heads,
        "dense_intermediate_size": params.mlp_hidden_size,
        "expert_intermediate_size": params.expert_hidden_size,
        "num_experts": params.num_experts,
        "num_experts_per_tok": params.experts_per_token,
        "max_position_embeddings": params.max_sequence_length,
        "rope_theta": params.rope_theta,
        "rms_norm_eps": params.rms_norm_eps,
        "tie_word_embeddings": params.weight_tying,
        "qk_layernorm": params.qk_norm,
    }


@torch.no_grad()
def initialise(model: LLaDAModelLM, generator: torch.Generator) -> None:
    """LLaDA's "mitchell" initialisation: truncated normal at 3 sigma with std 1/sqrt(d_in), residual outputs smaller.

    Projections back into the residual stream are divided by sqrt(2 (layer + 1)); embedding and head have std
    1/sqrt(d_model); norms are one, biases zero.
    """
    width = model.shape.width
    for name, module in model.named_modules():
        layer = next((int(part) for part in name.split(".") if part.isdigit()), None)
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
