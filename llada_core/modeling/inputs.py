"""Does an input fit a mask predictor? One line of `ValueError` if not.

Knows a model's vocabulary and length; does not know what the input is for.
"""

from torch import Tensor

from llada_core.modeling.predictor import MaskPredictor


def require_in_vocabulary(model: MaskPredictor, ids: Tensor, what: str) -> None:
    """Every id of `ids` (n,) is one that the model has a row for."""
    wrong = ids[(ids < 0) | (ids >= model.vocab_rows)]
    if len(wrong):
        allowed = f"0..{model.vocab_rows - 1}"
        raise ValueError(f"{what} holds token id {int(wrong[0])}, outside the model's vocabulary {allowed}")


def require_no_mask(model: MaskPredictor, ids: Tensor, what: str, remedy: str) -> None:
    """No id of `ids` (n,) is MASK."""
    masks = (ids == model.special_tokens.mask_id).nonzero()
    if len(masks):
        mask = model.special_tokens.mask_id
        raise ValueError(f"{what} holds the mask id {mask} at position {int(masks[0])}; {remedy}")


def require_length(model: MaskPredictor, needed: int, remedy: str) -> None:
    """A sequence of `needed` tokens is not longer than the model's longest."""
    if needed > model.max_length:
        raise ValueError(f"a sequence of {needed} tokens is longer than the model's {model.max_length}; {remedy}")
