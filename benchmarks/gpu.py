"""What one GPU does with models of the sizes that people run, beside the floor that the same card sets and beside the peers' algorithms.

Random weights in bf16. A cell takes at most eight timed steps after its warm-up; rates of whole answers are computed from
them: the forward of all positions as a row enters its block, and the block's steps. `python -m benchmarks.gpu [--part
sampling,moe,training,loading] [--toy] [--out FILE]`; a part should take at most four minutes on one GPU, which has not been
measured; without a GPU, or with --toy, the same script at toy size, so that it never rots (its figures then say nothing).
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from benchmarks.gpu_cells import TIMED, Clock, Size, peak_memory, random_model, seconds_of, size_of, surviving
from benchmarks.gpu_training import loading, training
from benchmarks.peers import exact_step, window_step
from benchmarks.timing import table
from llada_core.modeling import load_model
from llada_core.modeling.families import ModelParams
from llada_core.modeling.predictor import MaskPredictor
from llada_core.sampling import generate, stream
from llada_core.sampling.params import SamplingParams
from llada_core.tokenizer import SpecialTokens
from llada_core.training.progress import active_parameters

BLOCK = 32
GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
MODES: dict[str, dict[str, Any]] = {
    "exact": {},
    "dual": {"cache": "dual"},
    "dual + threshold 0.9": {"cache": "dual", "threshold": 0.9},
}


@dataclass(frozen=True)
class Floor:
    """What the card reaches with nothing of ours: bytes a second of a copy (read and written), FLOP/s of a product."""

    bytes_per_second: float
    flops_per_second: float

    @classmethod
    def measured(cls, device: str) -> "Floor":
        """A copy of 2 GB and a bf16 product of 8,192 squared (64 MB and 512 squared off a GPU)."""
        count, side = (2**30, 8192) if device == "cuda" else (2**25, 512)
        source = torch.empty(count, dtype=torch.bfloat16, device=device)
        target = torch.empty_like(source)
        copied = 4 * count / seconds_of(lambda: target.copy_(source), device)
        a = torch.randn(side, side, dtype=torch.bfloat16, device=device)
        product = 2 * side**3 / seconds_of(lambda: a @ a, device)
        return cls(copied, product)

    def step(self, model: MaskPredictor, rows: int, positions: int) -> float:
        """Seconds of a forward over `positions` of `rows` rows: its active weights read once, or its products, the slower.

        The head is asked for the block alone, and attention is left out: the floor is a floor. For a sparse model the
        weights are those of one token, which is too low once the tokens of a batch choose different experts.
        """
        active = active_parameters(model)
        head = model.vocab_rows * model.widths[0]
        read = active * model.dtype.itemsize / self.bytes_per_second
        flops = 2 * rows * ((active - head) * positions + head * min(positions, BLOCK))
        return max(read, flops / self.flops_per_second)


def prompts_of(size: Size, rows: int, length: int) -> Tensor:
    """(rows, length) random ids that are no special ones."""
    drawn = torch.randint(1, size.vocabulary - 400, (rows, length), generator=torch.Generator().manual_seed(1))
    return drawn.to(size.device)


def steps_of(model: MaskPredictor, prompts: Tensor, mode: dict[str, Any], size: Size) -> tuple[float, float, int]:
    """Seconds of the first step of a block and of a later one, and the forwards of nine steps."""
    params = SamplingParams(**{"max_new_tokens": 2 * BLOCK, "block_length": BLOCK, "steps": 2 * BLOCK, **mode})

    def run() -> tuple[list[float], int]:
        clock, forwards = Clock(size.device), 0
        clock.mark()
        for number, step in enumerate(stream(model, prompts, params)):
            clock.mark()
            forwards = step.forwards
            if number == TIMED:
                break
        return clock.seconds, forwards

    run()
    seconds, forwards = run()
    return seconds[0], statistics.median(seconds[1:]), forwards


def rate(first: float, later: float, rows: int, per_forward: float) -> float:
    """Tokens a second of whole blocks that commit `per_forward` tokens a step, the first step of each a dear one."""
    return rows * BLOCK / (first + (BLOCK / per_forward - 1) * later)


def sampling(size: Size, floor: Floor, params: ModelParams, peers: bool) -> list[dict[str, Any]]:
    """Milliseconds a forward and tokens a second by mode, batch and prompt; a cell that fails says so."""
    model = random_model(params, size)
    found = []
    for length in size.prompts:
        for rows in size.batches:
            prompts = prompts_of(size, rows, length)
            for name, mode in MODES.items():
                cell = surviving(
                    lambda mode=mode, prompts=prompts: _ours(model, prompts, mode, floor, size), size.device
                )
                found.append({"who": "ours", "mode": name, "rows": rows, "prompt": length} | cell)
            if peers:
                found += _peers(model, params, prompts, floor, size)
    return found


def _ours(model: MaskPredictor, prompts: Tensor, mode: dict[str, Any], floor: Floor, size: Size) -> dict[str, Any]:
    rows, length = prompts.shape
    with peak_memory(size.device) as memory:
        first, later, forwards = steps_of(model, prompts, mode, size)
    fed = BLOCK if "cache" in mode else length + 2 * BLOCK
    return {"forwards": forwards, **_figures(first, later, rows, floor.step(model, rows, fed)), **memory}


def _peers(
    model: MaskPredictor, params: ModelParams, prompts: Tensor, floor: Floor, size: Size
) -> list[dict[str, Any]]:
    """ML-GSAI's step over the whole canvas and Fast-dLLM's over one block between its two caches, in plain code."""
    rows, length = prompts.shape

    def exact() -> dict[str, Any]:
        seconds = seconds_of(exact_step(model, params, prompts, 2 * BLOCK, BLOCK), size.device)
        return _figures(seconds, seconds, rows, floor.step(model, rows, length + 2 * BLOCK))

    def dual() -> dict[str, Any]:
        refresh, step = window_step(model, params, prompts, 2 * BLOCK, BLOCK)
        first, later = seconds_of(refresh, size.device), seconds_of(step, size.device)
        return _figures(first, later, rows, floor.step(model, rows, BLOCK))

    algorithms = (("ML-GSAI's algorithm", "exact", exact), ("Fast-dLLM's algorithm", "dual", dual))
    return [
        {"who": who, "mode": mode, "rows": rows, "prompt": length} | surviving(measure, size.device)
        for who, mode, measure in algorithms
    ]


def _figures(first: float, later: float, rows: int, floor: float) -> dict[str, float]:
    return {
        "ms_first": round(1e3 * first, 2),
        "ms_step": round(1e3 * later, 2),
        "floor_ms": round(1e3 * floor, 2),
        "tok_s_at_1": round(rate(first, later, rows, 1.0), 1),
        "tok_s_at_2.8": round(rate(first, later, rows, 2.8), 1),
    }


def checks(size: Size) -> list[dict[str, Any]]:
    """Golden logits on the device, and the share of tokens that CPU and device agree on, by mode, seed and all."""
    found: list[dict[str, Any]] = []
    named = {
        "logits_llada.npz": ("llada_tiny", SpecialTokens(126, 120, 120, 121, 122)),
        "logits_moe.npz": ("llada_moe_tiny", SpecialTokens(155, 152, 152)),
    }
    modes = {**MODES, "drawn": {"temperature": 0.7, "seed": 3}, "guided": {"cfg_scale": 0.5}}
    asked = [[3, 4, 5, 6, 7], [9, 8, 7], list(range(20, 40))]
    for file, (folder, special) in named.items():
        golden = numpy.load(GOLDEN / file, allow_pickle=False)
        model = load_model(GOLDEN / folder, device=size.device, special_tokens=special)
        with torch.no_grad():
            ids = torch.tensor(golden["a_input_ids"]).to(size.device)
            worst = numpy.abs(model(ids).logits.float().cpu().numpy() - golden["a_logits"]).max()
        agreed = {}
        for name, mode in modes.items():
            params = SamplingParams(**{"max_new_tokens": 64, "block_length": 16, "steps": 64, **mode})
            tokens = [generate(model.to(device), asked, params).tokens.cpu() for device in ("cpu", size.device)]
            agreed[name] = round((tokens[0] == tokens[1]).float().mean().item(), 4)
        found.append({"what": folder, "worst_logit": float(worst), **agreed})
    return found


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measures the named parts, prints their tables and writes all figures as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--part", default="sampling,moe,training,loading")
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    given = parser.parse_args(arguments)
    size = size_of(toy=given.toy or not torch.cuda.is_available())
    floor = Floor.measured(size.device)
    name = torch.cuda.get_device_name() if size.device == "cuda" else "CPU, toy size: these figures say nothing"
    result: dict[str, Any] = {"device": name, "torch": torch.__version__, **vars(floor)}
    parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "sampling": lambda: sampling(size, floor, size.dense, peers=True),
        "moe": lambda: sampling(size, floor, size.sparse, peers=False),
        "training": lambda: training(size, floor.flops_per_second),
        "loading": lambda: loading(size),
    }
    print(
        f"{name}: copies {floor.bytes_per_second / 1e12:.2f} TB/s, {floor.flops_per_second / 1e12:.0f} TFLOP/s in bf16"
    )
    for part in ["checks", *given.part.split(",")]:
        began = time.perf_counter()
        rows = checks(size) if part == "checks" else parts[part]()
        result[part] = rows
        given.out.write_text(json.dumps(result, indent=1), encoding="utf-8")
        header = list(dict.fromkeys(key for row in rows for key in row))
        print(f"\n{part} ({time.perf_counter() - began:.0f} s)\n")
        print(table(header, [[str(row.get(key, "")) for key in header] for row in rows]), flush=True)
        if size.device == "cuda":
            torch.cuda.empty_cache()
    return result


if __name__ == "__main__":
    main()
