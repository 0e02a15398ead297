"""A mask predictor from a folder or Hub name, strictly: every weight expected, found, and of the right shape.

Knows files and where special tokens may be named; does not know registries or hashes.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForMaskedLM

from llada_core.families import SpecialTokens, family_of
from llada_core.modeling.config import LLaDAConfig, LLaDAMoEConfig
from llada_core.modeling.masked_lm import MaskedLM
from llada_core.modeling.model import LLaDAModelLM, LLaDAMoEModelLM
from llada_core.modeling.predictor import MaskPredictor
from llada_core.tokenizer import named_ids


def load_config(name_or_path: str | Path) -> Any:
    """The transformers config of a model folder or Hub name, checked where it is of the LLaDA family."""
    _check_folder(Path(name_or_path), "config.json")
    config = AutoConfig.from_pretrained(str(name_or_path))
    if isinstance(config, LLaDAConfig):
        config.architecture()
    return config


def load_model(
    name_or_path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    device_map: str | dict[str, Any] | None = None,
    special_tokens: SpecialTokens | None = None,
) -> MaskPredictor:
    """A model in evaluation mode, its weights in `dtype` (None: as stored) on `device` or spread by `device_map`.

    Raises `FileNotFoundError` (no config or no weights) or `ValueError` (unsupported config, a missing, unexpected,
    mismatched or unreadable weight, special tokens that nobody names), each in one line.
    """
    folder = Path(name_or_path)
    config = load_config(folder)
    if folder.is_dir():
        _check_weights(folder)
    spread = device_map if device is None else {"": str(device)}
    if not isinstance(config, LLaDAConfig):
        backbone = _strict(AutoModelForMaskedLM, name_or_path, config, dtype, spread)
        found = _special_tokens(name_or_path, config, special_tokens)
        if found is None:
            raise ValueError(_nameless(name_or_path))
        return MaskedLM(backbone, found).eval()
    chosen = LLaDAMoEModelLM if isinstance(config, LLaDAMoEConfig) else LLaDAModelLM
    found = _special_tokens(name_or_path, config, special_tokens)
    if found is None:
        raise ValueError(_nameless(name_or_path))
    found.check(config.architecture().vocab_rows)
    model = _strict(chosen, name_or_path, config, dtype, spread)
    model.name_special_tokens(found)
    return model.eval()


def _strict(
    chosen: Any, name_or_path: str | Path, config: Any, dtype: torch.dtype | None, spread: str | dict[str, Any] | None
) -> Any:
    """transformers' loader, which alone only reports what is wrong."""
    try:
        model, info = chosen.from_pretrained(
            str(name_or_path),
            config=config,
            dtype="auto" if dtype is None else dtype,
            device_map=spread,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except SafetensorError as error:
        raise ValueError(f"{name_or_path}: a weight file is damaged or cut short: {error}") from None
    complaints = {
        "missing weights": sorted(info["missing_keys"]),
        "unexpected weights": sorted(info["unexpected_keys"]),
        "weights of another shape": sorted(f"{k} {tuple(a)} for {tuple(b)}" for k, a, b in info["mismatched_keys"]),
        "unreadable weights": sorted(str(m) for m in info["error_msgs"]),
    }
    told = [f"{what}: {', '.join(names[:3])}{' ...' * (len(names) > 3)}" for what, names in complaints.items() if names]
    if told:
        raise ValueError(f"{name_or_path}: the weights are not those of its config.json; {'; '.join(told)}")
    return model


def _check_folder(folder: Path, needed: str) -> None:
    if folder.exists() and not (folder / needed).is_file():
        raise FileNotFoundError(f"{folder}: no {needed} there, so it is no model folder")
    if not folder.exists() and (folder.is_absolute() or str(folder).startswith(".") or len(folder.parts) != 2):
        raise FileNotFoundError(f"{folder}: no such folder (a Hub name has the form owner/name)")


def _check_weights(folder: Path) -> None:
    if (folder / "model.safetensors").is_file():
        return
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        other = " (pickled weights are not read; convert them to safetensors)" if any(folder.glob("*.bin")) else ""
        raise FileNotFoundError(f"{folder}: neither model.safetensors nor its index is there{other}")
    shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    absent = sorted(s for s in shards if not (folder / s).is_file())
    if absent:
        raise FileNotFoundError(f"{folder}: the index names weight files that are not there: {', '.join(absent)}")


def _special_tokens(
    name_or_path: str | Path, config: Any, given: SpecialTokens | None
) -> SpecialTokens | None:
    """Given by the caller; else each id from config.json, else the tokenizer, else the published family."""
    if given is not None:
        return given
    ids: dict[str, int] = {}
    family = family_of(config.architectures or [], config.vocab_size)
    if family is not None:
        ids.update({k: v for k, v in vars(family.special).items() if v is not None})
    ids.update(named_ids(name_or_path))
    published = config.published() if isinstance(config, LLaDAConfig) else {}
    for short in ("mask", "eos", "pad", "bos", "eot"):
        if published.get(f"{short}_token_id") is not None:
            ids[f"{short}_id"] = published[f"{short}_token_id"]
    if not {"mask_id", "eos_id"} <= ids.keys():
        return None
    return SpecialTokens(**{"pad_id": ids["eos_id"], **ids})


def _nameless(name_or_path: str | Path) -> str:
    return (
        f"{name_or_path}: neither config.json nor a tokenizer names the mask and end tokens;"
        " pass special_tokens=SpecialTokens(mask_id=..., eos_id=..., pad_id=...)"
    )
