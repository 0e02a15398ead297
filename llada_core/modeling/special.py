"""Which special tokens a stored model has: asked of its config.json, its tokenizer and its family, in turn.

Knows the order; does not know weights.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llada_core.files import document
from llada_core.modeling.architecture import TOKEN_KEYS
from llada_core.tokenizer import SpecialTokens, family_of, named_ids


def special_tokens_of(folder: Path, defaults: Mapping[str, Any], rows: int) -> SpecialTokens:
    """Each id as config.json writes it, else as the tokenizer beside it, else `defaults`, else the published family.

    The family is that with this architecture and this very vocabulary; `defaults` are a configuration class's own.
    `ValueError` if nobody names MASK and EOS, if config.json and tokenizer disagree on MASK, or an id is not below
    `rows`, the number of vocabulary rows.
    """
    config = document(folder / "config.json")
    family = family_of(config.get("architectures") or [], config.get("vocab_size", rows))
    usual = {} if family is None else vars(family.special)
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
