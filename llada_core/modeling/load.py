"""A mask predictor from a folder or Hub name, strictly: every weight expected, found, and of the right shape.

Knows the ways in: published layouts, masked-LMs, adapters, quantised weights; does not know registries or hashes.
"""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, BitsAndBytesConfig

from llada_core.config.dotted import require_package
from llada_core.families import SpecialTokens
from llada_core.modeling.adapters import load_adapter, merge_adapter
from llada_core.modeling.bases import base_of, is_adapter
from llada_core.modeling.config import LLaDAConfig
from llada_core.modeling.masked_lm import MaskedLM, choose_attention
from llada_core.modeling.predictor import MaskPredictor
from llada_core.modeling.special import special_tokens_of
from llada_core.modeling.strict import require_folder, require_loaded, weight_shapes

Device = str | torch.device | dict[str, Any]


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
    device: Device | None = None,
    special_tokens: SpecialTokens | None = None,
    bits: Literal[4, 8] | None = None,
    double_quant: bool = False,
    attn_implementation: str | None = None,
    merge: bool = True,
) -> MaskPredictor:
    """A model in evaluation mode, its weights in `dtype` (None: as stored) on `device`.

    device: a device, "auto" to spread over all GPUs, or a device map. bits: 4 (nf4) or 8 bit weights, CUDA only;
    double_quant: the scales of 4 bits in 8 bits as well. attn_implementation: of a masked-LM, as transformers names it.
    A folder with an adapter gives its base model with the adapter in it, merged into the weights unless `merge` is
    False. Raises `FileNotFoundError` (no config, no weights) or `ValueError` (unsupported config; a missing,
    unexpected, mismatched or unreadable weight; special tokens that nobody names), each in one line.
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
    how = {
        "dtype": "auto" if dtype is None else dtype,
        "device_map": _device_map(device, bits),
        "quantization_config": _quantization(bits, dtype, double_quant),
    }
    how = {key: value for key, value in how.items() if value is not None}
    auto = AutoModelForCausalLM if ours else AutoModelForMaskedLM
    weight_shapes(folder)  # so that an absent or damaged file is told in one line, for masked-LMs too
    strictly = {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
    model, info = auto.from_pretrained(folder, config=config, **strictly, **how)
    require_loaded(str(folder), info)
    if device is not None and "device_map" not in how:
        model.to(device)
    predictor: MaskPredictor = model if ours else MaskedLM(model, special_tokens)
    if ours:
        model.name_special_tokens(special_tokens)
    if attn_implementation is not None:
        choose_attention(predictor, attn_implementation)
    return predictor.eval()


def _device_map(device: Device | None, bits: int | None) -> str | dict[str, Any] | None:
    """What transformers is told about places; without accelerate it can only load to the CPU, to be moved after."""
    if isinstance(device, dict) or device == "auto":
        return device
    if device is None:
        return None if bits is None else {"": "cuda:0"}
    kind = torch.device(device).type
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device}: no CUDA GPU is visible; use device='cpu'")
    return {"": str(device)} if kind != "cpu" and find_spec("accelerate") is not None else None


def _quantization(bits: int | None, dtype: torch.dtype | None, double_quant: bool) -> BitsAndBytesConfig | None:
    if bits is None:
        return None
    if bits not in (4, 8):
        raise ValueError(f"bits is {bits}; 4 and 8 are supported")
    if not torch.cuda.is_available():
        raise ValueError(f"bits={bits} needs a CUDA GPU; load without it")
    require_package("bitsandbytes", "4bit", f"bits={bits}")
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=dtype or torch.bfloat16,
    )
