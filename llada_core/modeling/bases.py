"""Whose adapter a stored adapter is: how it names its base model, and where that lies on this machine.

Reads adapter_config.json alone, without torch. Knows that a project keeps weights as store/HASH; does not know how they
are hashed, kept or loaded.

An adapter is of no use without the weights it was trained on, so what it names must be found where it is moved to:

    GSAI-ML/LLaDA-8B-Base     on the Hub, with the commit in `revision`
    sha256:HASH               weights of a project, by their content; in a folder store/HASH
    ../base                   beside the adapter (adapters made elsewhere)
"""

import os
from pathlib import Path

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
