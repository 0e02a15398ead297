"""Which special tokens a stored model has: asked of the caller, config.json, the tokenizer and the family, in turn.

Knows the order; does not know weights.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llada_core.families import SpecialTokens, family_of
from llada_core.modeling.architecture import TOKEN_KEYS
from llada_core.tokenizer import named_ids


def special_tokens_of(name_or_path: str | Path, config: Mapping[str, Any], rows: int) -> SpecialTokens:
    """Each id from config.json, else the tokenizer beside it, else the published family with this very vocabulary.

    `ValueError` if nobody names MASK and EOS, if config.json and tokenizer disagree on MASK, or an id is not below
    `rows`, the number of vocabulary rows.
    """
    family = family_of(config.get("architectures") or [], config["vocab_size"])
    usual = {} if family is None else vars(family.special)
    spoken = named_ids(name_or_path)
    written = {key.replace("_token_id", "_id"): config.get(key) for key in TOKEN_KEYS}
    ids = {k: v for source in (usual, spoken, written) for k, v in source.items() if v is not None}
    if not {"mask_id", "eos_id"} <= ids.keys():
        raise ValueError(
            f"{name_or_path}: neither config.json nor a tokenizer names the mask and end tokens;"
            " pass special_tokens=SpecialTokens(mask_id=..., eos_id=..., pad_id=...)"
        )
    if "mask_id" in spoken and spoken["mask_id"] != ids["mask_id"]:
        raise ValueError(
            f"{name_or_path}: config.json says mask_token_id {ids['mask_id']}, its tokenizer {spoken['mask_id']};"
            " pass special_tokens=SpecialTokens(...) to decide"
        )
    return SpecialTokens(**{"pad_id": ids["eos_id"], **ids}).check(rows)
