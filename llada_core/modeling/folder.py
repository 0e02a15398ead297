"""What a model folder holds: weights by shape, an adapter and its base. Imports no torch.

An adapter is of no use without the weights it was trained on, so what its adapter_config.json names must be found where
the adapter is moved to:

    GSAI-ML/LLaDA-8B-Base     on the Hub, with the commit in `revision`
    sha256:HASH               weights of a project, by their content; in a folder store/HASH
    ../base                   beside the adapter (adapters made elsewhere)
"""

import json
import math
import os
import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from llada_core.files import document

ADAPTER_CONFIG = "adapter_config.json"
CONTENT = "sha256:"


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter rather than a model."""
    return (folder / ADAPTER_CONFIG).is_file()


def base_name(folder: Path) -> str:
    """How an adapter names its base, a revision behind "@"; `ValueError` if it names none."""
    file = folder / ADAPTER_CONFIG
    config = document(file)
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not base:
        raise ValueError(f"{file}: base_model_name_or_path is missing, so the adapter has no model")
    return f"{base}@{revision}" if revision else str(base)


def base_of(folder: Path) -> str:
    """The folder or Hub name of the model that an adapter belongs to; a relative path counts from the adapter.

    `FileNotFoundError` for weights named by their content that lie in no store near the adapter or the working
    directory.
    """
    name = base_name(folder)
    if not name.startswith(CONTENT):
        return str(folder / name) if (folder / name).is_dir() else name
    digest = name.removeprefix(CONTENT)
    if found := _stored(digest, folder):
        return str(found)
    raise FileNotFoundError(
        f"{folder}: the weights that this adapter changes, {digest[:12]}..., are in no store above it; copy "
        f"store/{digest} from the project that trained it into this one's store, or name that project in LLADAFLOW_HOME"
    )


def base_folder(folder: Path) -> Path | None:
    """The folder by whose place an adapter names its base; None where it names it by its content or for the Hub.

    `FileNotFoundError` for a place at which no folder lies.
    """
    name = base_name(folder)
    if name.startswith(CONTENT):
        return None
    if (found := Path(base_of(folder))).is_dir():
        return found
    if name.startswith((".", "/", "~")) or name.partition("@")[0].count("/") != 1:
        raise FileNotFoundError(
            f"{folder}: its base, {name!r}, is no folder that lies there, and no OWNER/NAME of the Hub; write where it is "
            f"as base_model_name_or_path into {ADAPTER_CONFIG}"
        )
    return None


def model_folders(folder: Path) -> list[Path]:
    """The folders that a model on this machine is made of: its own, for an adapter also its base's, and so on."""
    found = [folder]
    while is_adapter(found[-1]) and (base := Path(base_of(found[-1]))).is_dir():
        found.append(base)
    return found


def _stored(digest: str, near: Path) -> Path | None:
    """store/DIGEST of the project that LLADAFLOW_HOME names, that holds the adapter, or that is worked in."""
    homes = [Path(given)] if (given := os.environ.get("LLADAFLOW_HOME")) else []
    here = Path.cwd()
    # a run's outputs lie some folders below the project, and DVC may have linked them from its cache
    homes += [*near.absolute().parents, *near.resolve().parents, here, *here.parents]
    return next((place for home in homes if (place := home / "store" / digest).is_dir()), None)


Shapes = Mapping[str, tuple[int, ...]]
BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2}  # of a number, as safetensors names its dtype


def require_folder(folder: Path, needed: str) -> None:
    """`FileNotFoundError` unless `folder` is there and holds the file `needed`."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder (a Hub name has the form owner/name)")
    if not (folder / needed).is_file():
        raise FileNotFoundError(f"{folder}: no {needed} there, so it is no model folder")


def weight_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every weight stored in the folder, from the headers of its safetensors files.

    `FileNotFoundError` for an absent file, `ValueError` for a damaged one.
    """
    return {name: shape for name, (shape, _) in stored_weights(folder).items()}


def stored_weights(folder: Path) -> dict[str, tuple[tuple[int, ...], int]]:
    """Shape of every stored weight, and the bytes that one of its numbers takes; raises as `weight_shapes` does."""
    found: dict[str, tuple[tuple[int, ...], int]] = {}
    for file in _weight_files(folder):
        try:
            with safe_open(file, framework="pt") as stored:
                for key in stored.keys():  # noqa: SIM118
                    part = stored.get_slice(key)
                    found[key] = tuple(part.get_shape()), BYTES.get(part.get_dtype(), 1)
        except SafetensorError as error:
            raise ValueError(f"{file}: damaged or cut short: {error}") from None
    return found


def require_weights(folder: Path, expected: Shapes, twice: Mapping[str, str] | None = None) -> None:
    """`ValueError` unless the folder stores exactly the `expected` weights; tells the first of each kind of mistake.

    `twice`: weights that may be stored as well, each with the name of one that it must be equal to.
    """
    found = weight_shapes(folder)
    for name, first in (twice or {}).items():
        if name in found and found.get(first) == found[name]:
            _require_equal(folder, name, first)
            del found[name]
    complaints = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "of another shape": [
            f"{key} {found[key]}, not {shape}"
            for key, shape in expected.items()
            if key in found and found[key] != tuple(shape)
        ],
    }
    told = [f"{what}: {', '.join(names[:3])}{_more(len(names) - 3)}" for what, names in complaints.items() if names]
    if told:
        merged = any(re.fullmatch(r".*\.experts\.\w+_proj", name) for name in complaints["unexpected"])
        hint = "; experts in one weight are dFactory's merged layout: split it with its scripts/moe_convertor.py"
        raise ValueError(
            f"{folder}: the weights are not those that config.json describes; {'; '.join(told)}{hint if merged else ''}"
        )


def _require_equal(folder: Path, name: str, first: str) -> None:
    """`ValueError` unless two stored weights are the same: config.json says that the model has one for both."""
    with ExitStack() as opened:
        slices: dict[str, Any] = {}
        for file in _weight_files(folder):
            stored = opened.enter_context(safe_open(file, framework="pt"))
            slices |= {key: stored.get_slice(key) for key in stored.keys() if key in (name, first)}  # noqa: SIM118
        one, other = slices[name], slices[first]
        # A part at a time: two tables of an 8 B model are 2.5 GB.
        for start in range(0, one.get_shape()[0], 4096):
            if not (one[start : start + 4096] == other[start : start + 4096]).all():
                raise ValueError(f"{folder}: config.json ties {name} to {first}, and the two that are stored differ")


def require_loaded(name: str, info: Mapping[str, Any]) -> None:
    """`ValueError` if transformers' loading report lists a weight that was expected and not filled."""
    lost = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"]), *info["error_msgs"]]
    if lost:
        first = sorted(map(str, lost))[0]
        raise ValueError(f"{name}: weights that the model needs are missing or of another shape, such as {first}")


def _weight_files(folder: Path) -> list[Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
        hint = "; pickled weights are not read, convert them to safetensors" if pickled else ""
        raise FileNotFoundError(f"{folder}: neither {single.name} nor {index.name} there{hint}")
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError):
        raise ValueError(f"{index}: not an index of weight files (JSON with a weight_map)") from None
    absent = [shard for shard in shards if not (folder / shard).is_file()]
    if absent:
        raise FileNotFoundError(f"{folder}: the index names weight files that are not there: {', '.join(absent)}")
    return [folder / shard for shard in shards]


def _more(count: int) -> str:
    return f" and {count} more" if count > 0 else ""


def weight_distance(before: Path, after: Path) -> float | None:
    """L2 norm of the difference of all weights, tensor by tensor, in float64.

    None where the folders do not hold the same weights (an adapter beside its base, say).
    """
    first, second = _names(before), _names(after)
    if not first or first.keys() != second.keys():
        return None
    squares = 0.0
    for name, file in first.items():
        with safe_open(file, "pt") as old, safe_open(second[name], "pt") as new:
            squares += float((new.get_tensor(name).double() - old.get_tensor(name).double()).square().sum())
    return math.sqrt(squares)


def _names(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(file, "pt") as content:
            found |= dict.fromkeys(content.keys(), file)
    return found
