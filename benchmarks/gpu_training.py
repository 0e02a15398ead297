"""Training and loading on one GPU: steps by the project's objective and optimiser at 1 B and at 8 B's width, LoRA, a folder of 8 B.

`benchmarks.gpu` calls these parts and prints their tables.
"""

import resource
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._dynamo import config
from torch._dynamo.utils import counters

from benchmarks.gpu_cells import Size, peak_memory, random_model, seconds_of, surviving
from llada_core.data.batches import Batch
from llada_core.diffusion import Noise, fed_copies
from llada_core.modeling import load_model, save_model
from llada_core.modeling.adapters import add_lora
from llada_core.modeling.families import LoraParams, ModelParams
from llada_core.modeling.predictor import MaskPredictor
from llada_core.training.accelerator import optimiser_for
from llada_core.training.objectives import DiffusionObjective
from llada_core.training.params import PretrainParams
from llada_core.training.progress import active_parameters

TIMED = 5


class Step:
    """One update: noisy loss under bf16 autocast, backward, clipping, fused AdamW."""

    def __init__(self, model: MaskPredictor, rows: int, length: int, vocabulary: int) -> None:
        self.model, self.device = model.train(), model.device.type
        self.params = PretrainParams(max_steps=1, learning_rate=1e-4, batch_size=rows)
        self.optimiser = optimiser_for(model, self.params)
        self.objective = DiffusionObjective(model, None, None, self.params, seed=0)  # type: ignore[arg-type]
        tokens = torch.randint(1, vocabulary - 400, (rows, length))
        self.batch = Batch(tokens, torch.ones_like(tokens).bool(), None, None, torch.arange(rows))
        self.noise = Noise(0, 0, self.batch.numbers, rows)

    def __call__(self) -> None:
        rows, length = self.batch.tokens.shape
        with torch.autocast(self.device, torch.bfloat16):
            times, uniforms = self.noise.times(self.params.noise), self.noise.uniforms(length)
            loss = self.objective.noisy_loss(self.model, self.batch, times, uniforms)
        (loss.sum / (rows * length)).backward()
        torch.nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)


@dataclass(frozen=True)
class Cell:
    """What is trained, and how."""

    name: str
    shape: ModelParams
    rows: int
    length: int
    lora: LoraParams | None = None
    compiled: bool = False

    def measure(self, size: Size, flops_per_second: float) -> dict[str, Any]:
        """Tokens a second and the share of the card's measured product rate that the model's FLOPs take."""
        model = random_model(self.shape, size, torch.float32 if self.lora is None else torch.bfloat16)
        parameters = active_parameters(model)
        if self.lora is not None:
            add_lora(model, self.lora)
            model.network.gradient_checkpointing_enable({"use_reentrant": False})
        counters.clear()
        for block in model.blocks if self.compiled else ():
            block.compile()
        step = Step(model, self.rows, self.length, size.vocabulary)
        with peak_memory(size.device) as memory, config.patch(fail_on_recompile_limit_hit=True):
            seconds = seconds_of(step, size.device, TIMED)
        # Half of the positions are hidden on average, and the head is asked for those alone. The FLOPs are those of a
        # plain step, for LoRA too: it spends none on gradients of frozen weights, and as many on making activations anew.
        head = size.vocabulary * self.shape.d_model
        per_token = 6 * (parameters - head / 2) + 12 * self.shape.n_layers * self.shape.d_model * self.length
        # By blocks the layers see each position twice, noisy and clean, each about half of all that is there.
        per_token += (fed_copies(model.block_length, self.length) - 1) * 6 * (parameters - head)
        rate = self.rows * self.length / seconds
        compiled = {"graphs": counters["stats"]["unique_graphs"], "breaks": sum(counters["graph_break"].values())}
        found = {"tok_s": round(rate), "of_product_rate": round(rate * per_token / flops_per_second, 3)}
        return found | (compiled if self.compiled else {}) | memory


def by_blocks(shape: ModelParams) -> ModelParams:
    """The same network as one that attends by blocks of 32, which is fed a noisy and a clean copy."""
    return shape.model_copy(update={"kind": "llada_blocks", "block_length": 32})


def training(size: Size, flops_per_second: float) -> list[dict[str, Any]]:
    """Every cell; one that fails, for want of memory or by compiling too often, says so and stops no other."""
    if size.device != "cuda":
        cells = [Cell("toy", size.dense, 2, 64), Cell("toy, LoRA r 4", size.dense, 2, 64, LoraParams(r=4))]
        cells.append(Cell("toy, by blocks of 32", by_blocks(size.dense), 2, 64))
    else:
        wide = size.dense.model_copy(update={"n_layers": 8})
        narrow = {"d_model": 2048, "n_layers": 16, "n_heads": 16, "mlp_hidden_size": 5632}
        both = [("8 B's width, 8 layers", wide, 4, 4096), ("1 B", size.dense.model_copy(update=narrow), 8, 2048)]
        both.append(("8 B's width, 8 layers, by blocks of 32", by_blocks(wide), 2, 4096))  # in FlexAttention, both ways
        cells = [Cell(*what, compiled=compiled) for what in both for compiled in (False, True)]
        cells.append(Cell("8 B, LoRA r 16", size.dense, 4, 2048, LoraParams(r=16)))
    found = []
    for cell in cells:
        told = {"what": cell.name, "compile": cell.compiled, "rows": cell.rows, "length": cell.length}
        found.append(told | surviving(lambda cell=cell: cell.measure(size, flops_per_second), size.device))
    return found


def loading(size: Size) -> list[dict[str, Any]]:
    """A sharded folder of the dense model, written and read; the host's peak while reading."""
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as place:
        model, folder = random_model(size.dense, size), Path(place) / "model"
        began = time.perf_counter()
        save_model(model, folder, max_shard_size="5GB")
        wrote = time.perf_counter() - began
        del model
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began = time.perf_counter()
        loaded = load_model(folder, device=size.device, special_tokens=size.special)
        read = time.perf_counter() - began
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        gigabytes = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 2**30
        return [
            {
                "gb": round(gigabytes, 2),
                "files": len(list(folder.glob("*.safetensors"))),
                "dtype": str(loaded.dtype),
                "save_s": round(wrote, 1),
                "load_s": round(read, 1),
                "host_peak_grew_gb": round((after - before) / 2**20, 2),
            }
        ]
