"""A model read strictly from a folder or a Hub name, made from nothing, or written: all of it or nothing."""

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import BitsAndBytesConfig

from llada_core.files import document, written_whole
from llada_core.modeling.adapters import load_adapter, merge_adapter
from llada_core.modeling.families import FAMILIES, TOKEN_KEYS, ModelParams, family_of, published_with
from llada_core.modeling.folder import base_of, is_adapter, require_folder, require_loaded, stored_weights
from llada_core.modeling.fused import fuse_projections
from llada_core.modeling.place import Place, WeightBytes, kind_of, place_for
from llada_core.modeling.predictor import MaskPredictor, SavesItself, feed_from_cpu
from llada_core.settings import Bits
from llada_core.tokenizer import SpecialTokens, named_ids

Device = str | torch.device | dict[str, Any] | Place


def load_config(name_or_path: str | Path) -> Any:
    """The transformers config of a model folder or Hub name, as its family reads and checks it."""
    folder = _folder(name_or_path)
    require_folder(folder, "config.json")
    family = family_of(document(folder / "config.json"))
    config = family.config_class.from_pretrained(folder)
    family.network_class.rows_of(config)  # refuses what cannot be computed
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
    network = family_of(document(folder / "config.json")).network_class
    rows = network.rows_of(config)
    if special_tokens is None:
        special_tokens = special_tokens_of(folder, config.to_dict(), rows)
    special_tokens.check(rows)
    if device == "meta":
        with torch.device("meta"):
            return network.of_config(config, special_tokens).eval()
    if isinstance(device, dict) and bits is not None:
        kind_of("cuda", bits)
    stored = stored_weights(folder)  # an absent or damaged file is told in one line, for masked-LMs too
    place = (
        device
        if isinstance(device, dict | Place)
        else place_for(WeightBytes.of(stored, dtype, bits), str(device), bits)
    )
    how = {"dtype": "auto" if dtype is None else dtype, "quantization_config": _quantization(bits, dtype, double_quant)}
    predictor = _read(network, folder, config, special_tokens, place, how)
    if attn_implementation is not None:
        predictor.choose_attention(attn_implementation)
    return predictor.eval()


def special_tokens_of(folder: Path, defaults: Mapping[str, Any], rows: int) -> SpecialTokens:
    """Each id as config.json writes it, else as the tokenizer beside it, else `defaults`, else its published like.

    Its published like has this architecture and this very vocabulary; `defaults` are a configuration class's own.
    `ValueError` if nobody names MASK and EOS, if config.json and tokenizer disagree on MASK, or an id is not below
    `rows`, the number of vocabulary rows.
    """
    config = document(folder / "config.json")
    published = published_with(config, config.get("vocab_size", rows))
    usual = {} if published is None else published.special
    spoken = named_ids(folder)
    sources = (usual, _ids(defaults), spoken, _ids(config))
    ids = {name: value for source in sources for name, value in source.items() if value is not None}
    if not {"mask_id", "eos_id"} <= ids.keys():
        raise ValueError(
            f"{folder}: neither config.json nor a tokenizer names the mask and end tokens;"
            " pass special_tokens=SpecialTokens(mask_id=..., eos_id=..., pad_id=...)"
        )
    if "mask_id" in spoken and spoken["mask_id"] != ids["mask_id"]:
        raise ValueError(
            f"{folder}: config.json says mask_token_id {ids['mask_id']}, its tokenizer {spoken['mask_id']};"
            " pass special_tokens=SpecialTokens(...) to decide"
        )
    return SpecialTokens(**{"pad_id": ids["eos_id"], **ids}).check(rows)


def _ids(config: Mapping[str, Any]) -> dict[str, int | None]:
    return {key.replace("_token_id", "_id"): config.get(key) for key in TOKEN_KEYS}


def load_to_answer(
    name_or_path: str | Path, *, dtype: torch.dtype | None = None, device: str = "auto", bits: Bits | None = None
) -> MaskPredictor:
    """`load_model` for whatever asks a model: chats, the page, a served version, an evaluation. Its projections are fused.

    Also `ValueError` where main memory is too small (elsewhere the system's to decide, which may swap).
    """
    place = place_for(need_of(name_or_path, dtype, bits), device, bits)
    place.require_room()
    model = load_model(name_or_path, dtype=dtype, device=place, bits=bits)
    fuse_projections(model)
    return model


def need_of(name_or_path: str | Path, dtype: torch.dtype | None = None, bits: int | None = None) -> WeightBytes:
    """What the weights of a folder or Hub name take in memory, from the headers of its files."""
    folder = _folder(name_or_path)
    while is_adapter(folder):
        folder = _folder(base_of(folder))
    require_folder(folder, "config.json")
    return WeightBytes.of(stored_weights(folder), dtype, bits)


def _read(
    network: type[MaskPredictor],
    folder: Path,
    config: Any,
    special: SpecialTokens,
    place: Place | dict[str, Any],
    how: dict[str, Any],
) -> MaskPredictor:
    """The model with its weights in place; `ValueError` unless every one was found."""
    how = how | _device_map(place)
    strictly = {"use_safetensors": True, "ignore_mismatched_sizes": True}
    predictor, info = network.read(folder, config, special, **strictly, **how)
    require_loaded(str(folder), info)
    if isinstance(place, Place) and how["device_map"] is None:
        predictor.to(place.device)
    if isinstance(place, Place) and place.kind == "mps":
        feed_from_cpu(predictor, torch.device(place.device))
    return predictor


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
    network, config = _fresh(params, vocab_size, special_tokens)
    return network.fresh(config, special_tokens, seed)


def empty_model(params: ModelParams, vocab_size: int, special_tokens: SpecialTokens) -> MaskPredictor:
    """A fresh model without memory for its weights: its shapes alone."""
    network, config = _fresh(params, vocab_size, special_tokens)
    with torch.device("meta"):
        return network.of_config(config, special_tokens)


def _fresh(params: ModelParams, vocab_size: int, special: SpecialTokens) -> tuple[type[MaskPredictor], Any]:
    """The network of a fresh model and its configuration."""
    special.check(vocab_size)
    family = FAMILIES[params.kind]
    ids = {name.replace("_id", "_token_id"): i for name, i in vars(special).items() if i is not None}
    return family.network_class, family.config_class.for_model(**family.fresh(params, vocab_size), **ids)


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
        model.network.save_pretrained(staging, max_shard_size=max_shard_size, state_dict=weights)
        if weights:
            _name_dtype(staging / "config.json", next(iter(weights.values())).dtype)
        if tokenizer is not None:
            tokenizer.save(staging)


def _name_dtype(file: Path, dtype: torch.dtype) -> None:
    """A config.json that names a dtype names that of the stored weights; transformers writes that of the model at hand."""
    config = document(file)
    named = {key: str(dtype).removeprefix("torch.") for key in ("dtype", "torch_dtype") if key in config}
    file.write_text(json.dumps(config | named, indent=2, sort_keys=True) + "\n", encoding="utf-8")
