"""A model read strictly from a folder or a Hub name, made from nothing, or written: all of it or nothing."""

import json
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, BitsAndBytesConfig

from llada_core.files import written_whole
from llada_core.modeling.adapters import load_adapter, merge_adapter
from llada_core.modeling.architecture import TOKEN_KEYS, ModelParams
from llada_core.modeling.block import Experts
from llada_core.modeling.families import LLaDAConfig, LLaDAMoEConfig, special_tokens_of
from llada_core.modeling.folder import base_of, is_adapter, require_folder, require_loaded, stored_weights
from llada_core.modeling.network import LLaDAModelLM, LLaDAMoEModelLM, MaskedLM, choose_attention, new_masked_lm
from llada_core.modeling.place import Need, Place, kind_of, place_for
from llada_core.modeling.predictor import MaskPredictor, SavesItself, feed_from_cpu
from llada_core.settings import Bits
from llada_core.tokenizer import LLADA, LLADA_MOE, SpecialTokens

Device = str | torch.device | dict[str, Any] | Place


def load_config(name_or_path: str | Path) -> Any:
    """The transformers config of a model folder or Hub name, checked where it is of the LLaDA family."""
    folder = _folder(name_or_path)
    require_folder(folder, "config.json")
    try:
        config = AutoConfig.from_pretrained(folder)
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder / 'config.json'}: not JSON: {error}") from None
    if isinstance(config, LLaDAConfig):
        config.architecture()
    return config


def _folder(name_or_path: str | Path) -> Path:
    """The folder itself, or the local copy of a Hub repository (fetched or cached), without pickles or code.

    A commit, branch or tag of a repository stands behind "@".
    """
    path = Path(name_or_path)
    if path.is_dir() or path.is_absolute() or str(path).startswith(".") or len(path.parts) != 2:
        return path
    name, _, revision = str(name_or_path).partition("@")
    wanted = ["*.json", "*.safetensors", "*.txt", "*.jinja"]
    return Path(snapshot_download(name, revision=revision or None, allow_patterns=wanted))


def load_model(  # noqa: PLR0913 - the one way in; everything after the name is keyword-only
    name_or_path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: Device = "auto",
    special_tokens: SpecialTokens | None = None,
    bits: Bits | None = None,
    double_quant: bool = False,
    attn_implementation: str | None = None,
    merge: bool = True,
) -> MaskPredictor:
    """A model in evaluation mode, its weights in `dtype` (None: as stored) on `device`.

    device: "auto" (this process's GPU, several where one is too small, else Apple's, else the CPU; or what
    LLADAFLOW_DEVICE says), a device, "meta" for shapes without weights, or a device map. bits: 4 (nf4) or 8 bit
    weights, CUDA only; double_quant: the scales of 4 bits in 8 bits as well. attn_implementation: of a masked-LM, as
    transformers names it. A folder with an adapter gives its base model with the adapter in it, merged into the weights
    unless `merge` is False. Raises `FileNotFoundError` (no config, no weights) or `ValueError` (unsupported config; a
    missing, unexpected, mismatched or unreadable weight; special tokens that nobody names; no such device, or too
    little of its memory), each in one line.
    """
    folder = _folder(name_or_path)
    if is_adapter(folder):
        base = load_model(
            base_of(folder),
            dtype=dtype,
            device=device,
            special_tokens=special_tokens,
            bits=bits,
            double_quant=double_quant,
            attn_implementation=attn_implementation,
        )
        if device == "meta":
            return base
        load_adapter(base, folder)
        if merge and bits is None:
            merge_adapter(base)
        return base.eval()
    config = load_config(folder)
    ours = isinstance(config, LLaDAConfig)
    rows = config.architecture().vocab_rows if ours else config.vocab_size
    if special_tokens is None:
        special_tokens = special_tokens_of(folder, {} if ours else config.to_dict(), rows)
    special_tokens.check(rows)
    if device == "meta":
        with torch.device("meta"):
            return _named(_auto(config).from_config(config), special_tokens)
    if isinstance(device, dict) and bits is not None:
        kind_of("cuda", bits)
    stored = stored_weights(folder)  # an absent or damaged file is told in one line, for masked-LMs too
    place = device if isinstance(device, dict | Place) else place_for(Need.of(stored, dtype, bits), str(device), bits)
    how = {"dtype": "auto" if dtype is None else dtype, "quantization_config": _quantization(bits, dtype, double_quant)}
    predictor = _named(_read(folder, config, place, how), special_tokens)
    if attn_implementation is not None:
        choose_attention(predictor, attn_implementation)
    if isinstance(place, Place) and place.kind == "mps":
        feed_from_cpu(predictor, torch.device(place.device))
    return predictor


def load_to_answer(
    name_or_path: str | Path, *, dtype: torch.dtype | None = None, device: str = "auto", bits: Bits | None = None
) -> MaskPredictor:
    """`load_model` for whatever asks a model: chats, the page, a served version, an evaluation.

    Also `ValueError` where main memory is too small (elsewhere the system's to decide, which may swap).
    """
    place = place_for(need_of(name_or_path, dtype, bits), device, bits)
    place.require_room()
    return load_model(name_or_path, dtype=dtype, device=place, bits=bits)


def need_of(name_or_path: str | Path, dtype: torch.dtype | None = None, bits: int | None = None) -> Need:
    """What the weights of a folder or Hub name take in memory, from the headers of its files."""
    folder = _folder(name_or_path)
    while is_adapter(folder):
        folder = _folder(base_of(folder))
    require_folder(folder, "config.json")
    return Need.of(stored_weights(folder), dtype, bits)


def _auto(config: Any) -> Any:
    return AutoModelForCausalLM if isinstance(config, LLaDAConfig) else AutoModelForMaskedLM


def _read(folder: Path, config: Any, place: Place | dict[str, Any], how: dict[str, Any]) -> Any:
    """The network with its weights in place; `ValueError` unless every one was found."""
    how = how | _device_map(place)
    strictly = {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
    model, info = _auto(config).from_pretrained(folder, config=config, **strictly, **how)
    require_loaded(str(folder), info)
    if isinstance(place, Place) and how["device_map"] is None:
        model.to(place.device)
    return model


def _named(model: Any, special_tokens: SpecialTokens) -> MaskPredictor:
    """A loaded network as a mask predictor that knows its special tokens."""
    if not isinstance(model, LLaDAModelLM):
        return MaskedLM(model, special_tokens).eval()
    model.name_special_tokens(special_tokens)
    return model.eval()


def _device_map(place: Place | dict[str, Any]) -> dict[str, Any]:
    """What transformers is told about places; without accelerate it can only load to the CPU, to be moved after."""
    if isinstance(place, dict):
        return {"device_map": place}
    if place.spread is not None:
        return {"device_map": "balanced", "max_memory": dict(place.spread)}
    placed = place.kind != "cpu" and find_spec("accelerate") is not None
    return {"device_map": {"": place.device} if placed else None}


def _quantization(bits: int | None, dtype: torch.dtype | None, double_quant: bool) -> BitsAndBytesConfig | None:
    if bits is None:
        return None
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=dtype or torch.bfloat16,
    )


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


def save_model(
    model: MaskPredictor,
    folder: str | Path,
    tokenizer: SavesItself | None = None,
    *,
    max_shard_size: str = "5GB",
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Writes config.json, safetensors and the tokenizer's files; `folder` appears, or is replaced, when complete.

    `weights`: whole tensors under the network's own names, for a model whose parameters are sharded over ranks.
    """
    with written_whole(Path(folder)) as staging:
        network: Any = model.backbone if isinstance(model, MaskedLM) else model
        network.save_pretrained(staging, max_shard_size=max_shard_size, state_dict=weights)
        if tokenizer is not None:
            tokenizer.save(staging)
