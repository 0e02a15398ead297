"""Preference tuning as an objective of the loop: DPO whose log-likelihoods are bounds estimated under masks (VRPO).

VRPO (LLaDA 1.5, arXiv:2505.19223) lowers the variance of the preference score without moving its mean: the whole budget
goes to distinct times with one mask each, and policy and reference are measured under the same masks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llada_core.data.batches import BatchSampler
from llada_core.diffusion import Noise, alpha, at_time, corrupt, fed_copies, loss_weight, masked_nll
from llada_core.modeling import MaskPredictor
from llada_core.tokenizer import Tokenizer
from llada_core.training.objectives import Loss, Objective, StepWork, filled, stored_rows
from llada_core.training.params import PreferenceParams
from llada_core.training.reference import Reference

# No training step has this number, so held-out pairs share no noise with any of them.
_VALIDATION_STEP = -1
_POLICY, _REFERENCE = 10, 20  # streams of random numbers; one and the same when masks are shared


class PairTable(Protocol):
    """Rows with `prompt_ids`, `chosen_ids` and `rejected_ids`."""

    def __len__(self) -> int: ...
    def __getitem__(self, rows: list[int]) -> dict[str, list[Sequence[int]]]: ...


@dataclass(frozen=True)
class PairBatch:
    """Chosen and rejected rows: tokens (2P, L), all chosen ones first; answer, attention (2P, L); numbers (2P,)."""

    tokens: Tensor
    answer: Tensor
    attention: Tensor
    numbers: Tensor
    step: int


def pairs_of(table: PairTable, rows: Sequence[int], numbers: Sequence[int], eos_id: int, step: int) -> PairBatch:
    """Rows of a table, padded on the right; padding is hidden."""
    columns = table[[int(row) for row in rows]]
    prompts = list(columns["prompt_ids"]) * 2
    # All chosen rows first, then all rejected: `chunk(2)` takes the two apart again, and one forward holds both.
    answers = [*columns["chosen_ids"], *columns["rejected_ids"]]
    lengths = torch.tensor([[len(p), len(p) + len(a)] for p, a in zip(prompts, answers, strict=True)])
    places = torch.arange(int(lengths.max()))
    tokens = torch.full((len(answers), len(places)), eos_id)
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        tokens[i, : lengths[i, 1]] = torch.tensor([*prompt, *answer])
    attention = places < lengths[:, 1:]
    # Chosen and rejected have keys of their own: the two answers of a pair are hidden under independent masks.
    keys = torch.tensor([2 * n for n in numbers] + [2 * n + 1 for n in numbers])
    return PairBatch(tokens, attention & (places >= lengths[:, :1]), attention.long(), keys, step)


class Preference(Objective):
    """DPO on likelihood bounds; a step is `batch_size` pairs."""

    def __init__(
        self, model: MaskPredictor, train: PairTable, validation: PairTable, params: PreferenceParams, *, seed: int
    ) -> None:
        self.special, self.params, self.seed = model.special_tokens, params, seed
        self.block_length = model.block_length
        self.train, self.validation = train, validation
        self.reference = Reference(model, params)
        self.order = BatchSampler(len(train), params.batch_size, seed=seed)

    def steps_per_epoch(self) -> int:
        return self.order.batches_per_epoch

    def work(self, model: nn.Module, step: int, rank: int, ranks: int) -> StepWork:
        micros, rows = self.params.share(ranks), self.order.rows(step)
        size = len(rows) // (ranks * micros)
        batches = []
        for start in range(rank * micros * size, (rank + 1) * micros * size, size):
            # Numbered over the whole run, so that a pair has the same masks on any number of ranks and micro-batches.
            numbers = [step * len(rows) + i for i in range(start, start + size)]
            batches.append(
                pairs_of(self.train, rows[start : start + size].tolist(), numbers, self.special.eos_id, step)
            )
        fed = [batch.tokens.numel() * fed_copies(self.block_length, batch.tokens.shape[1]) for batch in batches]
        tokens = self.params.mask_samples * sum(fed)
        return StepWork(batches, [float(size)] * micros, tokens, inference_tokens=tokens)

    def loss(self, model: nn.Module, batch: PairBatch) -> Loss:
        score = self.score(model, batch)
        loss = -F.logsigmoid(score)
        seen = score.detach()
        logged = {"loss": loss.detach(), "margin": seen / self.params.beta, "preferred": (seen > 0).float()}
        return Loss(loss.sum(), {name: torch.stack([x.sum(), torch.ones_like(x).sum()]) for name, x in logged.items()})

    def score(self, model: nn.Module, batch: PairBatch) -> Tensor:
        """beta times how much more the policy prefers the chosen answer than the reference does, (P,)."""
        with torch.no_grad(), self.reference.active(model) as frozen:  # before the policy's activations are there
            base = self.bound(frozen, batch, _POLICY if self.params.shared_masks else _REFERENCE)
        bound = self.bound(model, batch, _POLICY)
        # Measured under the same masks, policy and reference share most of their noise, and it leaves with the difference.
        chosen, rejected = (bound - base).chunk(2)
        return self.params.beta * (chosen - rejected)

    def bound(self, model: nn.Module, batch: PairBatch, stream: int) -> Tensor:
        """Estimated lower bound of log p(answer | prompt) of each row, (2P,) fp32; unbiased for the bound."""
        params, samples = self.params, self.params.mask_samples
        copies = torch.arange(samples).repeat_interleave(len(batch.tokens))
        keys = batch.numbers.repeat(samples)
        offset = Noise(self.seed, batch.step, keys, 1).uniforms(1, stream)[:, 0]
        # One uniform a row, and its samples spaced evenly behind it: each time alone is uniform, so the mean stays unbiased,
        # and together they cannot crowd at one end. Times begin at epsilon because the weight grows as 1 / t.
        t = at_time((offset + copies / samples) % 1.0, params.noise)
        noise = Noise(self.seed, batch.step, keys * samples + copies, 1)
        tokens, answer = batch.tokens.repeat(samples, 1), batch.answer.repeat(samples, 1)
        hidden = 1 - alpha(t, params.noise.schedule)
        uniforms = noise.uniforms(tokens.shape[1], stream + 1)
        noisy, masked = corrupt(tokens, answer, hidden, self.special.mask_id, uniforms)
        attention = batch.attention.repeat(samples, 1)
        nll = masked_nll(model, noisy, tokens, masked, attention, block_length=self.block_length).per_row(len(t))
        weight = loss_weight(t, params.noise).to(nll.device, non_blocking=True)
        # Averaged before the sigmoid, which is not linear: how far the loss is off in the mean, and how noisy it is, is
        # bounded by the variance of this mean (VRPO), hence the samples and their spacing.
        return -(nll * weight).view(samples, -1).mean(0)

    def validate(self, model: nn.Module, rank: int, ranks: int) -> dict[str, Tensor]:
        """Loss, margin and share of preferred answers on held-out pairs, at the same masks at every call."""
        total = min(len(self.validation), self.params.validation_rows)
        parts = {f"validation_{name}": torch.zeros(2) for name in ("loss", "margin", "preferred")}
        size = self.params.micro_batch_size or max(self.params.batch_size // ranks, 1)
        for start in range(0, total - total % ranks, size * ranks):  # sharded ranks must run in step
            rows = list(range(start, min(start + size * ranks, total - total % ranks)))[rank::ranks]
            batch = pairs_of(self.validation, rows, rows, self.special.eos_id, _VALIDATION_STEP)
            with torch.no_grad():
                found = self.loss(model, batch).parts
            for name, part in found.items():
                parts[f"validation_{name}"] += part.cpu()
        return parts


def objective(
    params: PreferenceParams, model: MaskPredictor, tokenizer: Tokenizer, data: Path, *, seed: int
) -> Preference:
    """That of a stage on the pairs in `data`/train and validation; raises ValueError without any."""
    return Preference(model, filled(stored_rows(data / "train")), stored_rows(data / "validation"), params, seed=seed)
