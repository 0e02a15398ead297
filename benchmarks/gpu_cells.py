"""What the parts of `benchmarks.gpu` share: the sizes, models of random weights, a clock that waits for the device."""

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from llada_core.modeling.families import ModelParams
from llada_core.modeling.predictor import MaskPredictor
from llada_core.modeling.pretrained import empty_model
from llada_core.tokenizer import SpecialTokens

TIMED = 8


@dataclass(frozen=True)
class Size:
    """Shapes of one run of this script: those of 8 B parameters on a GPU, toys elsewhere."""

    dense: ModelParams
    sparse: ModelParams
    blocks: ModelParams
    vocabulary: int
    prompts: tuple[int, ...]
    batches: tuple[int, ...]
    device: str

    @property
    def special(self) -> SpecialTokens:
        """Ids near the end of the vocabulary, where LLaDA has them."""
        v = self.vocabulary
        return SpecialTokens(mask_id=v - 128, eos_id=v - 383, pad_id=v - 383, bos_id=v - 384, eot_id=v - 116)


def size_of(*, toy: bool) -> Size:
    """LLaDA-8B's, LLaDA-MoE-7B-A1B's and LLaDA2.0-mini's shapes, or two layers of width 64."""
    common = {"max_sequence_length": 4096, "rope_theta": 500000.0}
    if toy:
        small = {**common, "d_model": 64, "n_layers": 2, "n_heads": 4, "mlp_hidden_size": 128}
        experts = {"num_experts": 8, "experts_per_token": 2, "expert_hidden_size": 32}
        sparse = ModelParams(kind="llada_moe", qk_norm=True, **small, **experts)
        blocks = ModelParams(kind="llada2", **small, **experts)
        return Size(ModelParams(**small), sparse, blocks, 512, (20, 40), (1, 2), "cpu")
    dense = ModelParams(**common, d_model=4096, n_layers=32, n_heads=32, mlp_hidden_size=12288)
    experts = {"num_experts": 64, "experts_per_token": 8, "expert_hidden_size": 1024}
    sparse = ModelParams(
        kind="llada_moe", qk_norm=True, **common, d_model=2048, n_layers=16, n_heads=16, mlp_hidden_size=8192, **experts
    )
    mini = {"d_model": 2048, "n_layers": 20, "n_heads": 16, "n_kv_heads": 4, "mlp_hidden_size": 5120}
    experts = {"num_experts": 256, "experts_per_token": 8, "expert_hidden_size": 512}
    blocks = ModelParams(kind="llada2", **{**common, "rope_theta": 600000.0}, **mini, **experts)
    return Size(dense, sparse, blocks, 126_464, (60, 900), (1, 8, 32), "cuda")


def random_model(params: ModelParams, size: Size, dtype: torch.dtype = torch.bfloat16) -> MaskPredictor:
    """A model with weights drawn on the device: gains 1, the rest N(0, 0.02)."""
    torch.manual_seed(0)
    model = empty_model(params, size.vocabulary, size.special).to(dtype).to_empty(device=size.device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0) if parameter.ndim == 1 else parameter.normal_(0, 0.02)
        for buffer in model.buffers():
            buffer.zero_()  # `to_empty` leaves in them whatever stood there
    return model.eval()


@dataclass
class Clock:
    """Seconds between calls of `mark`, the device waited for."""

    device: str
    marks: list[float] = field(default_factory=list)

    def mark(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.marks.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        return [after - before for before, after in zip(self.marks, self.marks[1:], strict=False)]


def seconds_of(call: Callable[[], object], device: str, times: int = TIMED, warm_up: int = 2) -> float:
    """The median of several calls."""
    for _ in range(warm_up):
        call()
    clock = Clock(device)
    clock.mark()
    for _ in range(times):
        call()
        clock.mark()
    return statistics.median(clock.seconds)


@contextlib.contextmanager
def peak_memory(device: str) -> Iterator[dict[str, float]]:
    """GB that the device held at most inside, weights included; nothing off a GPU."""
    found: dict[str, float] = {}
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    yield found
    if device == "cuda":
        found["peak_gb"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)


def surviving(measure: Callable[[], dict[str, Any]], device: str) -> dict[str, Any]:
    """What a cell found, or its error in one line; its memory is given back either way."""
    try:
        return measure()
    except RuntimeError as error:  # torch's own: out of memory, a kernel that is not there, one compilation too many
        return {"error": str(error).splitlines()[0][:160]}
    finally:
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
