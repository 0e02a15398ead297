"""What one GPU does with models of the sizes that people run, beside the floor that the same card sets and beside the peers' algorithms.

Random weights in bf16. A cell takes at most eight timed steps after its warm-up; rates of whole answers are computed from
them: the forward of all positions as a row enters its block, and the block's steps. `python -m benchmarks.gpu [--part
sampling,compiled,moe,blocks,training,loading] [--toy] [--out FILE]`; a part should take at most four minutes on one GPU, which has not been
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
from llada_core.modeling.fused import fuse_projections
from llada_core.modeling.predictor import MaskPredictor
from llada_core.sampling import generate
from llada_core.sampling.engine import Engine
from llada_core.sampling.graph import Compiled
from llada_core.sampling.params import SamplingParams
from llada_core.sampling.requests import to_answer
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


@dataclass(frozen=True)
class Steps:
    """Seconds of the first step of a block and of a later one, of the very first run, and the forwards of nine steps."""

    first: float
    later: float
    warm_up: float
    forwards: int


def steps_of(
    model: MaskPredictor, prompts: Tensor, mode: dict[str, Any], size: Size, compiled: Compiled = "off"
) -> Steps:
    """Nine steps of one engine, once to warm up (to compile and capture, if asked) and twice more, the last one measured."""
    params = SamplingParams(**{"max_new_tokens": 2 * BLOCK, "block_length": BLOCK, "steps": 2 * BLOCK, **mode})
    engine = Engine(model, rows=len(prompts), compiled=compiled)

    def run() -> tuple[list[float], int]:
        answers, before = engine.submit(to_answer(model, prompts, params)[0]), engine.forwards
        clock = Clock(size.device)
        clock.mark()
        for _ in range(TIMED + 1):
            engine.step()
            clock.mark()
        for answer in answers:
            engine.cancel(answer)
        if failed := next((answer.error for answer in answers if answer.error is not None), None):
            raise failed
        return clock.seconds, engine.forwards - before

    began = time.perf_counter()
    run()
    warm_up = time.perf_counter() - began
    run()  # torch captures what it has compiled when it runs for the second time
    seconds, forwards = run()
    return Steps(seconds[0], statistics.median(seconds[1:]), warm_up, forwards)


def rate(first: float, later: float, rows: int, per_forward: float) -> float:
    """Tokens a second of whole blocks that commit `per_forward` tokens a step, the first step of each a dear one."""
    return rows * BLOCK / (first + (BLOCK / per_forward - 1) * later)


def sampling(size: Size, floor: Floor, params: ModelParams, peers: bool) -> list[dict[str, Any]]:
    """Milliseconds a forward and tokens a second by mode, batch and prompt; a cell that fails says so."""
    model = random_model(params, size)
    fuse_projections(model)
    found = []
    for length in size.prompts:
        for rows in size.batches:
            prompts = prompts_of(size, rows, length)
            found += [
                _ours(model, prompts, Asked(name, mode, BLOCK if "cache" in mode else length + 2 * BLOCK), floor, size)
                for name, mode in MODES.items()
            ]
            if peers:
                found += _peers(model, params, prompts, floor, size)
    return found


def compiled(size: Size, floor: Floor) -> list[dict[str, Any]]:
    """One answer of the dense model whose steps are captured graphs, and beside it the same with projections apart."""
    model = random_model(size.dense, size)
    found = []
    for fused in (False, True):
        if fused:
            fuse_projections(model)
        for length in size.prompts:
            prompts = prompts_of(size, 1, length)
            dual = Asked("dual" if fused else "dual, not fused", {"cache": "dual"}, BLOCK, "graph" if fused else "off")
            found.append(_ours(model, prompts, dual, floor, size))
    exact = Asked("exact", {}, size.prompts[0] + 2 * BLOCK, "graph")
    return [*found, _ours(model, prompts_of(size, 1, size.prompts[0]), exact, floor, size)]


def blocks(size: Size, floor: Floor) -> list[dict[str, Any]]:
    """LLaDA2.0-mini's shape with its exact cache, at 1, 2.5 and 5 tokens a forward (the reports' range)."""
    model = random_model(size.blocks, size)
    fuse_projections(model)
    asked = Asked("blocks, exact cache", {"cache": "prefix"}, BLOCK, rates=(1.0, 2.5, 5.0))
    return [
        _ours(model, prompts_of(size, rows, length), asked, floor, size)
        for length in size.prompts
        for rows in size.batches
    ]


@dataclass(frozen=True)
class Asked:
    """What a cell measures: settings of the sampler, positions that a later step feeds, and tokens a forward to tell."""

    name: str
    mode: dict[str, Any]
    fed: int
    compiled: Compiled = "off"
    rates: tuple[float, ...] = (1.0, 2.8)


def _ours(model: MaskPredictor, prompts: Tensor, asked: Asked, floor: Floor, size: Size) -> dict[str, Any]:
    rows, length = prompts.shape
    told = {"who": "ours" if asked.compiled == "off" else "ours, compiled", "mode": asked.name}

    def measure() -> dict[str, Any]:
        with peak_memory(size.device) as memory:
            steps = steps_of(model, prompts, asked.mode, size, asked.compiled)
        figures = _figures(steps.first, steps.later, rows, floor.step(model, rows, asked.fed), asked.rates)
        waited = {} if asked.compiled == "off" else {"compile_s": round(steps.warm_up, 1)}
        return {"forwards": steps.forwards, **figures, **waited, **memory}

    return {**told, "rows": rows, "prompt": length} | surviving(measure, size.device)


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


def _figures(
    first: float, later: float, rows: int, floor: float, rates: tuple[float, ...] = (1.0, 2.8)
) -> dict[str, float]:
    return {
        "ms_first": round(1e3 * first, 2),
        "ms_step": round(1e3 * later, 2),
        "floor_ms": round(1e3 * floor, 2),
        **{f"tok_s_at_{each:g}": round(rate(first, later, rows, each), 1) for each in rates},
    }


def checks(size: Size) -> list[dict[str, Any]]:
    """Golden logits on the device, and the share of tokens that CPU and device agree on, by mode, seed and all."""
    found: list[dict[str, Any]] = []
    named = {
        "logits_llada.npz": ("llada_tiny", SpecialTokens(126, 120, 120, 121, 122)),
        "logits_moe.npz": ("llada_moe_tiny", SpecialTokens(155, 152, 152)),
        "logits_llada2.npz": ("llada2_tiny", SpecialTokens(157, 152, 152)),
    }
    drawn = {"drawn": {"temperature": 0.7, "seed": 3}, "guided": {"cfg_scale": 0.5}}
    asked = [[3, 4, 5, 6, 7], [9, 8, 7], list(range(20, 40))]
    for file, (folder, special) in named.items():
        golden = numpy.load(GOLDEN / file, allow_pickle=False)
        model = load_model(GOLDEN / folder, device=size.device, special_tokens=special)
        with torch.no_grad():
            case = "a" if "a_logits" in golden else "a_plain"
            ids = torch.tensor(golden[f"{case}_input_ids"]).to(size.device)
            worst = numpy.abs(model(ids).logits.float().cpu().numpy() - golden[f"{case}_logits"]).max()
        agreed = {}
        cached = MODES if model.block_length is None else {"exact": {}, "blocks, exact cache": {"cache": "prefix"}}
        for name, mode in {**cached, **drawn}.items():
            params = SamplingParams(**{"max_new_tokens": 64, "block_length": 16, "steps": 64, **mode})
            tokens = [generate(model.to(device), asked, params).tokens.cpu() for device in ("cpu", size.device)]
            agreed[name] = round((tokens[0] == tokens[1]).float().mean().item(), 4)
        found.append({"what": folder, "worst_logit": float(worst), **agreed})
    return found


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measures the named parts, prints their tables and writes all figures as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--part", default="sampling,compiled,moe,blocks,training,loading")
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    given = parser.parse_args(arguments)
    size = size_of(toy=given.toy or not torch.cuda.is_available())
    floor = Floor.measured(size.device)
    name = torch.cuda.get_device_name() if size.device == "cuda" else "CPU, toy size: these figures say nothing"
    result: dict[str, Any] = {"device": name, "torch": torch.__version__, **vars(floor)}
    parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "sampling": lambda: sampling(size, floor, size.dense, peers=True),
        "compiled": lambda: compiled(size, floor),
        "moe": lambda: sampling(size, floor, size.sparse, peers=False),
        "blocks": lambda: blocks(size, floor),
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
