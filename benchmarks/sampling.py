"""How fast the sampler is beside ML-GSAI's algorithm, mode by mode, on a trained 20 M model, one thread.

Prompt 61, 128 new tokens, block 32, greedy. Tokens per forward and agreement with the oracle of the same precision
stand beside every ratio; the floor is what the model's products alone would take at the rate that the machine reaches
here.

`python -m benchmarks.sampling [fp32-b1] [bf16-b1] [bf16-b8]`
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import oracle
from benchmarks.peers import reference_of
from benchmarks.timing import interleaved, machine, matmul_rate, table
from benchmarks.trained import NEW, PROMPT, SHAPE, SPECIAL, VOCABULARY, texts, trained_model
from llada_core.modeling.predictor import MaskPredictor
from llada_core.sampling import Generation, generate
from llada_core.sampling.params import SamplingParams

BLOCK = 32
ROWS = {"fp32-b1": (torch.float32, 1), "bf16-b1": (torch.bfloat16, 1), "bf16-b8": (torch.bfloat16, 8)}
BASE = {"max_new_tokens": NEW, "block_length": BLOCK, "steps": NEW}
MODES: dict[str, dict[str, object]] = {
    "exact": {},
    "prefix cache": {"cache": "prefix"},
    "dual cache": {"cache": "dual"},
    "threshold 0.9": {"threshold": 0.9},
    "dual cache + threshold 0.9": {"cache": "dual", "threshold": 0.9},
    "dual cache, window 8, + threshold 0.9": {"cache": "dual", "cache_window": 8, "threshold": 0.9},
}
LARGE = ["exact", "dual cache", "dual cache + threshold 0.9"]  # of a larger batch, which takes minutes


@dataclass
class Last:
    """Runs something and keeps its latest result."""

    run: Callable[[], object]
    result: object = None

    def __call__(self) -> None:
        self.result = self.run()


def floor_seconds(fed: int, forwards: int, batch: int, rate: float) -> float:
    """Seconds that the products of the body over the `fed` tokens, half a block's heads and attention take at `rate`."""
    layers, width = SHAPE.n_layers, SHAPE.d_model
    body = layers * (4 * width * width + 3 * width * SHAPE.mlp_hidden_size)
    head = batch * forwards * BLOCK / 2 * width * VOCABULARY
    attention = 2 * fed * (PROMPT + NEW) * width * layers
    return 2 * (fed * body + head + attention) / rate


def measure(model: MaskPredictor, batch: int, rounds: int) -> list[list[str]]:
    """One table row per mode for one precision and batch size."""
    dtype = str(model.dtype).removeprefix("torch.")
    prompts: Tensor = texts(batch, seed=77)[:, :PROMPT]
    reference = reference_of(model, SHAPE)
    entries = {
        "ML-GSAI generate (oracle)": Last(
            lambda: oracle.generate(reference, prompts, steps=NEW, new=NEW, block=BLOCK, mask_id=SPECIAL.mask_id)
        )
    }
    for name in list(MODES) if batch == 1 else LARGE:
        params = SamplingParams(**BASE, **MODES[name])
        entries[name] = Last(lambda params=params: generate(model, prompts, params))
    timings = interleaved(entries, "ML-GSAI generate (oracle)", rounds)
    rate = matmul_rate(batch * (PROMPT + NEW), model.dtype)
    truth = entries["ML-GSAI generate (oracle)"].result
    rows = []
    for name, entry in entries.items():
        result, timing = entry.result, timings[name]
        tokens = result.tokens if isinstance(result, Generation) else result
        forwards = result.forwards if isinstance(result, Generation) else NEW
        agreement = (tokens == truth)[:, PROMPT:].float().mean().item()
        fed = result.fed if isinstance(result, Generation) else NEW * batch * (PROMPT + NEW)
        floor = floor_seconds(fed, forwards, batch, rate)
        best = min(timing.seconds)
        rows.append(
            [f"{dtype} b{batch}", name, f"{batch * NEW / best:.0f}", f"{timing.ratio:.2f}", timing.spread, str(forwards),
             f"{NEW / forwards:.2f}", f"{agreement:.3f}", f"{floor / best:.0%}"]
        )  # fmt: skip
    return rows


def main(rows: list[str] | None = None, rounds: int = 3) -> None:
    """Prints the table of the named rows, or of all."""
    torch.set_num_threads(1)
    found: list[list[str]] = []
    for name in rows or ROWS:
        dtype, batch = ROWS[name]
        found += measure(trained_model().to(dtype), batch, rounds)
    header = [
        "",
        "mode",
        "tokens/CPU-s",
        "ratio",
        "least-greatest",
        "forwards",
        "tokens/forward",
        "agreement",
        "of floor",
    ]
    print(f"\nsampling: {machine()}\n\n{table(header, found)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
