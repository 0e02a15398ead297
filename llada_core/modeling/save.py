"""A mask predictor into a folder of the published layout, all or nothing.

Knows the order of writing; does not know which names the weights have (the model does).
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from llada_core.files import written_whole
from llada_core.modeling.network import MaskedLM
from llada_core.modeling.predictor import MaskPredictor, SavesItself


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
