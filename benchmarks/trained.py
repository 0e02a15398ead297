"""The model that the benchmarks run: 20 M parameters, trained here on templated word problems, seeded and cached.

A trained model is needed because parallel decoding commits what it is sure of; random weights are sure of nothing.
"""

import random
from pathlib import Path

import torch
from torch import Tensor

from llada_core.modeling import load_model, new_model, save_model
from llada_core.modeling.families import ModelParams
from llada_core.modeling.predictor import MaskPredictor
from llada_core.tokenizer import SpecialTokens
from llada_core.training.accelerator import Muon

FOLDER = Path(__file__).parents[1] / ".cache" / "benchmark-20m"
SPECIAL = SpecialTokens(mask_id=8191, eos_id=0, pad_id=0, bos_id=1, eot_id=2)
VOCABULARY = 8192
SHAPE = ModelParams(d_model=384, n_layers=8, n_heads=6, mlp_hidden_size=1024, max_sequence_length=256)
PROMPT, NEW = 61, 128
STEPS, BATCH = 220, 8  # under four minutes on one core

NAMES = ["Ann", "Bob", "Cat", "Dan", "Eve", "Fay", "Gus", "Hal", "Ida", "Jon", "Kim", "Leo", "May", "Ned", "Oda", "Pat"]
ITEMS = ["apples", "pears", "coins", "books", "cards", "shells", "stones", "pens", "cups", "hats", "keys", "nuts"]
TEMPLATES = (
    "{n} has {a} {i} and finds {b} more {i} in the garden . How many {i} does {n} have now ? "
    "{n} starts with {a} {i} and adds {b} {i} , so {n} now has {a} + {b} = {c} {i} . The answer is {c} .",
    "There are {c} {i} on the table and {n} takes {b} of the {i} away . How many {i} are left on the table ? "
    "We take {b} from {c} , that is {c} - {b} = {a} , so {a} {i} are left on the table . The answer is {a} .",
    "{n} buys {a} {i} on Monday and {b} {i} on Friday . How many {i} did {n} buy in all ? "
    "On Monday {a} and on Friday {b} , in all {a} + {b} = {c} {i} . The answer is {c} .",
)


def word_ids() -> dict[str, int]:
    """Every word of the templates, spread over the vocabulary."""
    words = sorted({w for t in TEMPLATES for w in t.split() if "{" not in w} | set(NAMES) | set(ITEMS))
    words += [str(n) for n in range(200)]
    return {word: 3 + 16 * i for i, word in enumerate(words)}


def texts(count: int, seed: int, length: int = PROMPT + NEW) -> Tensor:
    """(count, length) int64: problem after problem, cut at both ends."""
    rng, ids, rows = random.Random(seed), word_ids(), []
    for _ in range(count):
        words: list[str] = []
        skip = rng.randrange(40)
        while len(words) < length + skip:
            a, b = rng.randrange(2, 90), rng.randrange(2, 90)
            n, i = rng.choice(NAMES), rng.choice(ITEMS)
            words += rng.choice(TEMPLATES).format(n=n, i=i, a=a, b=b, c=a + b).split()
        rows.append([ids[w] for w in words[skip : skip + length]])
    return torch.tensor(rows)


def trained_model() -> MaskPredictor:
    """The cached model in float32; trained first if it is not there."""
    if not (FOLDER / "config.json").exists():
        save_model(_train(), FOLDER)
    return load_model(FOLDER, device="cpu", special_tokens=SPECIAL)


def _train() -> MaskPredictor:
    model = new_model(SHAPE, VOCABULARY, SPECIAL, 0).train()
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "blocks" in n]
    rest = [p for n, p in model.named_parameters() if not (p.ndim == 2 and "blocks" in n)]
    optimisers = [
        Muon(hidden, lr=2e-3, weight_decay=0.0),
        torch.optim.AdamW(rest, lr=2e-3, weight_decay=0.0, fused=True),
    ]
    generator = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        for group in (g for o in optimisers for g in o.param_groups):
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 20, 3 * (1 - step / STEPS))
        tokens = texts(BATCH, seed=1_000_000 + step)
        t = ((torch.arange(BATCH) + torch.rand((), generator=generator)) / BATCH).clamp(min=0.02)
        masked = torch.rand(tokens.shape, generator=generator) < t[:, None]
        positions = masked.flatten().nonzero()[:, 0]
        with torch.autocast("cpu", torch.bfloat16):
            nll = model(
                tokens.masked_fill(masked, SPECIAL.mask_id), positions=positions, targets=tokens.flatten()[positions]
            ).nll
        loss = nll.sum() / masked.sum()
        loss.backward()
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        if step % 40 == 0 or step == STEPS - 1:
            print(f"training the benchmark model: step {step} of {STEPS}, loss {loss.item():.3f}", flush=True)
    return model.eval()
