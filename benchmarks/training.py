"""How fast a training step is beside dllm's `MDLMTrainer.compute_loss`: same weights, batch, noise and optimiser, one thread.

The oracle computes logits at every position, casts them, takes the cross-entropy of all and multiplies most by zero; once
over the peers' plain body, once over ours. Losses must be equal first. Memory is the peak of a process of its own.
`python -m benchmarks.training` prints the tables; `... SIZE ENTRY` measures one entry's memory.
"""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor

from benchmarks.oracle import Reference
from benchmarks.timing import interleaved, matmul_rate, table
from llada_core.data.batches import Batch, BatchSampler, RowBatches
from llada_core.diffusion import Noise, alpha, corrupt, loss_weight
from llada_core.modeling import new_model
from llada_core.modeling.families import ModelParams
from llada_core.tokenizer import SpecialTokens
from llada_core.training.accelerator import optimiser_for
from llada_core.training.objectives import DiffusionObjective
from llada_core.training.params import PretrainParams, SFTParams, TrainingParams
from llada_core.training.progress import active_parameters

SHAPE = ModelParams(d_model=384, n_layers=8, n_heads=6, mlp_hidden_size=1024, max_sequence_length=512)
SIZES = {"8k": 8192, "126k": 126_464}
ROWS, LENGTH, SEED = 8, 256, 0
# Tokens per row of alpaca in LLaDA's chat format, every 5th percentile (a token taken as four characters).
ALPACA = (27, 34, 38, 41, 45, 48, 53, 59, 66, 75, 86, 97, 109, 120, 132, 144, 159, 176, 201, 271)


@dataclass
class Entry:
    """One way to take a training step, with weights and optimiser of its own."""

    loss: Callable[[], Tensor]
    optimiser: torch.optim.Optimizer
    last: float = 0.0

    def __call__(self) -> None:
        loss = self.loss()
        loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.last = float(loss.detach())


def entry(name: str, vocabulary: int, batches: Callable[[], Batch], params: TrainingParams) -> Entry:
    """`ours`, or the oracle over `our body` or `their body`."""
    special = SpecialTokens(mask_id=vocabulary - 1, eos_id=0, pad_id=0)
    model = new_model(SHAPE, vocabulary, special, SEED).train()
    optimiser = optimiser_for(model, params)
    objective = DiffusionObjective(model, None, None, params, seed=SEED)

    def noise_of(rows: Batch) -> tuple[Tensor, Tensor]:
        noise = Noise(SEED, 0, rows.numbers, ROWS)
        return noise.times(params.noise), noise.uniforms(rows.tokens.shape[1])

    def ours() -> Tensor:
        rows = batches()
        return objective.noisy_loss(model, rows, *noise_of(rows)).sum / objective.count(rows)

    def theirs() -> Tensor:
        rows = batches()
        t, uniforms = noise_of(rows)
        noisy, masked = corrupt(rows.tokens, rows.maskable, 1 - alpha(t, "linear"), special.mask_id, uniforms)
        logits = model(noisy).logits if name == "our body" else plain(noisy)
        loss = F.cross_entropy(logits.transpose(1, 2).float(), rows.tokens, reduction="none")
        weighted = loss * loss_weight(t, params.noise)[:, None] * masked
        if params.normalise == "sequence":
            return (weighted.sum(1) / rows.maskable.sum(1)).mean()
        return weighted.sum() / rows.maskable.sum()

    reference = Reference(dict(model.named_parameters()), SHAPE.n_heads, SHAPE.rope_theta, SHAPE.rms_norm_eps)
    plain = Reference.__call__.__wrapped__.__get__(reference)
    return Entry(ours if name == "ours" else theirs, optimiser)


def packed(vocabulary: int) -> Batch:
    """Full rows, as in pretraining."""
    tokens = torch.randint(1, vocabulary - 1, (ROWS, LENGTH), generator=torch.Generator().manual_seed(SEED))
    return Batch(tokens, torch.ones_like(tokens).bool(), None, None, torch.arange(ROWS))


def memory(size: str, name: str) -> float:
    """Peak GB of a process that takes two steps."""
    command = [sys.executable, "-m", "benchmarks.training", size, name]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def pretraining(size: str, rounds: int) -> list[list[str]]:
    """The table's rows for one vocabulary."""
    vocabulary, params = SIZES[size], PretrainParams(max_steps=1, learning_rate=1e-4)
    batch = packed(vocabulary)
    names = ["their body", "our body", "ours"]
    entries = {name: entry(name, vocabulary, lambda: batch, params) for name in names}
    timings = interleaved(entries, "our body", rounds)
    first = entries["ours"].last
    assert all(abs(e.last - first) < 1e-3 * first for e in entries.values()), {n: e.last for n, e in entries.items()}
    parameters = active_parameters(new_model(SHAPE, vocabulary, SpecialTokens(vocabulary - 1, 0, 0), SEED))
    head = vocabulary * SHAPE.d_model
    per_token = 6 * (parameters - head / 2) + 12 * SHAPE.n_layers * SHAPE.d_model * LENGTH
    floor = ROWS * LENGTH * per_token / matmul_rate(ROWS * LENGTH, torch.float32)
    used = {name: memory(size, name) for name in names}
    return [
        [size, name, f"{ROWS * LENGTH / min(timings[name].seconds):.0f}", f"{timings[name].ratio:.2f}",
         timings[name].spread, f"{used[name]:.1f}", f"{used[name] / used['our body']:.2f}",
         f"{floor / min(timings[name].seconds):.0%}"]
        for name in names
    ]  # fmt: skip


def fine_tuning(steps: int, rounds: int) -> list[list[str]]:
    """Rows of alpaca's lengths: the oracle pads random rows to the longest, we bucket by length; real tokens count."""
    vocabulary, params = SIZES["8k"], SFTParams(max_steps=1, learning_rate=1e-4)
    draw = torch.Generator().manual_seed(SEED)
    lengths = [ALPACA[int(i)] for i in torch.randint(0, len(ALPACA), (ROWS * 64,), generator=draw)]
    rows = {"input_ids": [torch.randint(1, 8000, (n,), generator=draw).tolist() for n in lengths],
            "maskable": [[int(i >= n // 3) for i in range(n)] for n in lengths]}  # fmt: skip
    found = {}
    for name, by_length in (("their body", None), ("our body", None), ("ours", lengths)):
        order = BatchSampler(len(lengths), ROWS, seed=SEED, lengths=by_length)
        batches = RowBatches(Dataset.from_dict(rows), order, eos_id=0, padding="longest")
        step = iter(range(10**6))
        found[name] = entry(name, vocabulary, lambda b=batches, s=step: b.batch(next(s)), params)
    runs = {name: lambda e=e: [e() for _ in range(steps)] for name, e in found.items()}
    timings = interleaved(runs, "our body", rounds)
    real = steps * ROWS * sum(lengths) / len(lengths)
    return [[name, f"{real / min(t.seconds):.0f}", f"{t.ratio:.2f}", t.spread] for name, t in timings.items()]


def main(rounds: int = 5) -> None:
    """Print both tables."""
    torch.set_num_threads(1)
    header = ["vocabulary", "entry", "tokens/CPU-s", "ratio", "spread", "peak GB", "memory", "of the fp32 floor"]
    print(table(header, [row for size in SIZES for row in pretraining(size, rounds)]))
    print()
    print(table(["fine-tuning", "real tokens/CPU-s", "ratio", "spread"], fine_tuning(8, rounds)))


if __name__ == "__main__":
    if len(sys.argv) == 3:
        torch.set_num_threads(1)
        single = packed(SIZES[sys.argv[1]])
        one = entry(sys.argv[2], SIZES[sys.argv[1]], lambda: single, PretrainParams(max_steps=1))
        one()
        one()
        # Not getrusage, whose peak a child inherits from the process that starts it.
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        print(int(status["VmHWM"].split()[0]) / 2**20)
    else:
        main()
