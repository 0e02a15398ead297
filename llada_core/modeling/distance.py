"""How far training moved the weights: a norm of the difference of two checkpoints. Knows files, not networks."""

import math
from pathlib import Path

from safetensors import safe_open


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
