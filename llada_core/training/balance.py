"""Balancing a router by its bias, without a loss: what is chosen too often is made less eligible after every update."""

from typing import cast

import torch
from torch import Tensor, nn

from llada_core.modeling.block import MoE
from llada_core.training.accelerator import Ranks


class RouterBalance:
    """Adds `rate` to the bias of each expert that got less than the mean load of an update, and takes it from one that got
    more (Wang et al., arXiv:2408.15664; DeepSeek-V3, arXiv:2412.19437, with a rate of 0.001; of LLaDA2 none is known here).

    The load is what real tokens chose in all micro-batches of all ranks. A bias takes no gradient and is no parameter of the
    optimiser. `ValueError` for a model without one.
    """

    def __init__(self, model: nn.Module, rate: float) -> None:
        self.rate = rate
        self.routers = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, MoE) and module.expert_bias is not None
        }
        if not self.routers:
            raise ValueError(
                f"router_bias_rate {rate}: no router of {type(model).__name__} has a bias to balance (LLaDA2's have, "
                "LLaDA-MoE's where its config.json has moe_router_enable_expert_bias); leave it out, router_balance is a loss"
            )
        for router in self.routers.values():
            router.load = torch.zeros_like(cast("Tensor", router.expert_bias), dtype=torch.int64)

    @property
    def state(self) -> dict[str, Tensor]:
        """The biases by their names in the model, as they are stored and gone on from."""
        return {f"{name}.expert_bias": cast("Tensor", router.expert_bias) for name, router in self.routers.items()}

    @torch.no_grad()
    def step(self, ranks: Ranks) -> Tensor:
        """One update; () fp32: the largest load over the mean one, averaged over the layers (1: even). Waits for no device."""
        routers = [*self.routers.values()]
        biases, loads = self.state.values(), [cast("Tensor", router.load) for router in routers]
        first = loads[0].device  # the layers may lie on several
        load_SE = ranks.total(torch.stack([load.to(first) for load in loads])).double()
        mean_S1 = load_SE.mean(1, keepdim=True)
        for bias, sign, load in zip(biases, (mean_S1 - load_SE).sign(), loads, strict=True):
            # By the sign alone: how far off a load is would make the step depend on how many tokens an update has.
            bias.add_(sign.to(bias), alpha=self.rate)
            load.zero_()
        return (load_SE.amax(1) / mean_S1[:, 0].clamp(min=1)).mean().float()
