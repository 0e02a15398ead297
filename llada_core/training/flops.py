"""What training costs, by the usual count: 6 FLOPs per token and parameter trained, 2 per token and parameter of a forward."""

from llada_core.modeling.network import LLaDAModelLM
from llada_core.modeling.predictor import MaskPredictor

_PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # dense bf16 FLOP/s by accelerator name


def active_parameters(model: MaskPredictor) -> int:
    """Parameters that a token is multiplied with: all but the input table, and of the experts the share that is chosen."""
    dense = model if isinstance(model, LLaDAModelLM) else None
    experts = 1.0 if dense is None or dense.shape.moe is None else dense.shape.moe.per_token / dense.shape.moe.n_experts
    total = sum(p.numel() * (experts if ".experts." in name else 1.0) for name, p in model.named_parameters())
    outer = (model.get_input_embeddings(), model.get_output_embeddings())
    table, head = (None if layer is None else layer.get_parameter("weight") for layer in outer)
    tied = head is None or head is table
    return int(total) - (0 if tied or table is None else table.numel())


def training_flops(parameters: int, trained_tokens: float, inference_tokens: float = 0.0) -> float:
    """FLOPs of a step."""
    return 6.0 * parameters * trained_tokens + 2.0 * parameters * inference_tokens


def peak_flops(device_name: str) -> float | None:
    """The accelerator's dense bf16 peak; None when it is not in the table."""
    return next((peak for name, peak in _PEAK.items() if name in device_name), None)
