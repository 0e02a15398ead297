"""Linear layers that read the same input, computed as one product: queries, keys and values; gate and up."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class FusedLayers:
    """Rows of several linear layers under each other: `weight` (sum of `widths`, D), `bias` (sum of `widths`,) or None."""

    weight: Tensor
    bias: Tensor | None
    widths: list[int]


class FusableModule(nn.Module):
    """A module that computes some of its linear layers as one product, once it was told to `fuse`.

    The layers stay as they are, under their names: the weight of each becomes a view of its rows of a common table, which
    holds the only copy. What saves, counts or updates them in place needs to know nothing of it. With gradients the
    layers are called one by one, since the table has none.
    """

    fusable: tuple[tuple[str, ...], ...] = ()  # names of the layers of each product

    def __init__(self) -> None:
        super().__init__()
        self._fused: dict[str, FusedLayers] = {}  # by the name of the first layer

    def projected(self, x: Tensor, *names: str) -> Sequence[Tensor]:
        """What each of these layers makes of `x` (..., D): tensors (..., F); fused, they are views of one."""
        fused = self._fused.get(names[0])
        if fused is None or torch.is_grad_enabled():
            return [self._modules[name](x) for name in names]  # type: ignore[misc]
        return F.linear(x, fused.weight, fused.bias).split(fused.widths, dim=-1)

    @torch.no_grad()
    def fuse(self) -> None:
        """Takes one product's weights in memory on top while it works; no more than before once it has.

        Layers stay apart where one is adapted, quantised, or lies on another device or none (offloaded, shapes alone).
        """
        self._fused = {}
        for names in self.fusable:
            layers = [layer for name in names if type(layer := self._modules.get(name)) is nn.Linear]
            kinds = {(each.weight.dtype, each.weight.device, each.bias is None) for each in layers}
            if len(layers) < len(names) or len(kinds) > 1 or layers[0].weight.is_meta:
                continue
            widths = [layer.out_features for layer in layers]
            # A table made under inference_mode could not be updated through its views by a later training step.
            with torch.inference_mode(False):
                weight, bias = _stacked([layer.weight for layer in layers]), None
                if layers[0].bias is not None:
                    bias = _stacked([layer.bias for layer in layers])
            self._fused[names[0]] = FusedLayers(weight, bias, widths)

    def unfuse(self) -> None:
        """Each layer is called by itself again, so that it may be exchanged. Its weight stays a view of the table."""
        self._fused = {}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Moved or cast, each layer gets memory of its own: the table would stay behind, and go stale.
        was = bool(self._fused)
        self.unfuse()
        super()._apply(fn, recurse)
        if was:
            self.fuse()
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *rest: Any) -> None:
        if local_metadata.get(
            "assign_to_params_buffers"
        ):  # then the layers get other tensors; else the table is written
            self.unfuse()
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_fused": {}}  # of a copy, each layer has memory of its own


def _stacked(weights: Sequence[Tensor]) -> Tensor:
    """(sum of rows, ...): all `weights`, each of which is then its rows of it."""
    table = torch.cat([weight.detach() for weight in weights])
    for weight, rows in zip(weights, table.split([len(weight) for weight in weights]), strict=True):
        weight.data = rows
    return table


def fuse_projections(model: nn.Module) -> None:
    """For a model that only answers: all its blocks compute their projections fused, one after the other made so."""
    for module in model.modules():
        if isinstance(module, FusableModule):
            module.fuse()


def unfuse_projections(model: nn.Module) -> None:
    """For a model whose layers are about to be exchanged."""
    for module in model.modules():
        if isinstance(module, FusableModule):
            module.unfuse()
