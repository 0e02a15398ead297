"""A mask predictor into a folder of the published layout, all or nothing.

Knows the order of writing; does not know which names the weights have (the model does).
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from llada_core.modeling.network import MaskedLM
from llada_core.modeling.predictor import MaskPredictor


class SavesItself(Protocol):
    """A tokenizer, as far as saving goes."""

    def save(self, folder: str | Path) -> None:
        """Writes its files into `folder`."""


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


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """An empty folder to write into, which becomes `folder` if all went well; what was there stays until then."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield staging
        staging.chmod(0o755)
        _replace(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _replace(staging: Path, folder: Path) -> None:
    if not folder.exists():
        staging.rename(folder)
        return
    old = staging.with_name(staging.name + ".old")
    folder.rename(old)
    staging.rename(folder)
    shutil.rmtree(old)
