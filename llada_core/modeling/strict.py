"""Is a folder a whole model, and did all of its weights fit? One line of error if not.

Knows transformers' loading report and the layout of weight files; does not know any architecture.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def require_all_weights(name: str, info: Mapping[str, Any], *, other_heads: bool = False) -> None:
    """`ValueError` unless every weight expected was found, fitted and (save `other_heads`) no other was there."""
    complaints = {
        "missing": sorted(info["missing_keys"]),
        "unexpected": [] if other_heads else sorted(info["unexpected_keys"]),
        "of another shape": sorted(f"{k} {tuple(a)} instead of {tuple(b)}" for k, a, b in info["mismatched_keys"]),
        "unreadable": sorted(str(message) for message in info["error_msgs"]),
    }
    told = [f"{what}: {', '.join(names[:3])}{_more(len(names) - 3)}" for what, names in complaints.items() if names]
    if told:
        raise ValueError(f"{name}: the weights are not those that config.json describes; {'; '.join(told)}")


def _more(count: int) -> str:
    return f" and {count} more" if count > 0 else ""


def require_folder_or_name(folder: Path, needed: str) -> None:
    """`FileNotFoundError` unless `folder` holds the file `needed`, or is no folder but reads like a Hub name."""
    if folder.is_dir():
        if not (folder / needed).is_file():
            raise FileNotFoundError(f"{folder}: no {needed} there, so it is no model folder")
    elif folder.exists() or folder.is_absolute() or str(folder).startswith(".") or len(folder.parts) != 2:
        raise FileNotFoundError(f"{folder}: no such folder (a Hub name has the form owner/name)")


def require_weight_files(folder: Path) -> None:
    """`FileNotFoundError` unless the folder has its safetensors, every shard that the index names included."""
    if (folder / "model.safetensors").is_file():
        return
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
        hint = "; pickled weights are not read, convert them to safetensors" if pickled else ""
        raise FileNotFoundError(f"{folder}: neither model.safetensors nor model.safetensors.index.json there{hint}")
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError):
        raise ValueError(f"{index}: not an index of weight files (JSON with a weight_map)") from None
    absent = sorted(shard for shard in shards if not (folder / shard).is_file())
    if absent:
        raise FileNotFoundError(f"{folder}: the index names weight files that are not there: {', '.join(absent)}")
