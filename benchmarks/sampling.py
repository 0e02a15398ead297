"""How fast the sampler is beside ML-GSAI's algorithm, mode by mode, on a trained 20 M model, one thread.

Prompt 61, 128 new tokens, block 32, greedy. Tokens per forward and agreement with the oracle of the same precision
stand beside every ratio; the floor is what the model's products alone would take at the rate that the machine reaches
here.
"""

import platform
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import oracle
from benchmarks.timing import interleaved, matmul_rate, table
from benchmarks.trained import NEW, PROMPT, SHAPE, SPECIAL, VOCABULARY, texts, trained_model
from llada_core.config.sampling import SamplingParams
from llada_core.modeling.predictor import MaskPredictor
from llada_core.sampling import Generation, generate

BLOCK = 32
BASE = {"max_new_tokens": NEW, "block_length": BLOCK, "steps": NEW}
MODES: dict[str, dict[str, object]] = {
    "exact": {},
    "prefix cache": {"cache": "prefix"},
    "dual cache": {"cache": "dual"},
    "threshold 0.9": {"threshold": 0.9},
    "dual cache + threshold 0.9": {"cache": "dual", "threshold": 0.9},
    "dual cache, window 8, + threshold 0.9": {"cache": "dual", "cache_window": 8, "threshold": 0.9},
}


@dataclass
class Last:
    """Runs something and keeps its latest result."""

    run: Callable[[], object]
    result: object = None

    def __call__(self) -> None:
        self.result = self.run()


def reference_of(model: MaskPredictor) -> oracle.Reference:
    """The oracle with the same weights."""
    weights = {name: value.detach() for name, value in model.state_dict().items()}
    return oracle.Reference(weights, SHAPE.n_heads, SHAPE.rope_theta, SHAPE.rms_norm_eps)


def floor_seconds(mode: dict[str, object], forwards: int, batch: int, rate: float) -> float:
    """Seconds that the products of the body, the asked-for part of the head and attention take at `rate` FLOP/s."""
    layers, width, total = SHAPE.n_layers, SHAPE.d_model, PROMPT + NEW
    body = layers * (4 * width * width + 3 * width * SHAPE.mlp_hidden_size)
    refreshes = NEW // BLOCK if mode.get("cache") else forwards
    fed = refreshes * total + (forwards - refreshes) * (BLOCK if mode.get("cache") == "dual" else total - PROMPT)
    head = forwards * BLOCK / 2 * width * VOCABULARY
    attention = 2 * fed * total * width * layers
    return batch * 2 * (fed * body + head + attention) / rate


def measure(model: MaskPredictor, batch: int, rounds: int) -> list[list[str]]:
    """One table row per mode for one precision and batch size."""
    dtype = str(model.dtype).removeprefix("torch.")
    model.fuse_for_inference()
    prompts: Tensor = texts(batch, seed=77)[:, :PROMPT]
    reference = reference_of(model)
    entries = {
        "ML-GSAI generate (oracle)": Last(
            lambda: oracle.generate(reference, prompts, steps=NEW, new=NEW, block=BLOCK, mask_id=SPECIAL.mask_id)
        )
    }
    for name, mode in MODES.items():
        params = SamplingParams(**BASE, **mode)
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
        floor = floor_seconds(MODES.get(name, {}), forwards, batch, rate)
        best = min(timing.seconds)
        rows.append(
            [f"{dtype} b{batch}", name, f"{batch * NEW / best:.0f}", f"{timing.ratio:.2f}", timing.spread, str(forwards),
             f"{NEW / forwards:.2f}", f"{agreement:.3f}", f"{floor / best:.0%}"]
        )  # fmt: skip
    return rows


def main(rounds: int = 3) -> None:
    """Prints the table."""
    torch.set_num_threads(1)
    model = trained_model()
    rows = measure(model, 1, rounds)
    rows += measure(model.to(torch.bfloat16), 1, rounds)
    rows += measure(model, 8, rounds)
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
    flags = torch.backends.cpu.get_cpu_capability()
    amx = torch.cpu._is_amx_tile_supported()
    print(
        f"\nsampling: {platform.processor() or platform.machine()}, {flags}, AMX {'yes' if amx else 'no'}, one thread\n"
    )
    print(table(header, rows), flush=True)


if __name__ == "__main__":
    main()
