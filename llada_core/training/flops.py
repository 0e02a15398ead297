"""What training costs, by the usual count: 6 FLOPs per token and parameter trained, 2 per token and parameter of a forward."""

from torch import nn

_PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # dense bf16 FLOP/s by accelerator name


def active_parameters(model: nn.Module, *, embedding: nn.Module | None, expert_share: float = 1.0) -> int:
    """Parameters that a token is multiplied with: all but the input table, experts by the share that is chosen."""
    total = 0.0
    table = {id(p) for p in embedding.parameters()} if embedding is not None else set()
    for name, parameter in model.named_parameters():
        if id(parameter) not in table:
            total += parameter.numel() * (expert_share if ".experts" in name else 1.0)
    return int(total)


def training_flops(parameters: int, trained_tokens: float, inference_tokens: float = 0.0) -> float:
    """FLOPs of a step."""
    return 6.0 * parameters * trained_tokens + 2.0 * parameters * inference_tokens


def peak_flops(device_name: str) -> float | None:
    """The accelerator's dense bf16 peak; None when it is not in the table."""
    return next((peak for name, peak in _PEAK.items() if name in device_name), None)
