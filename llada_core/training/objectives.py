"""What training minimises, as sums that only the loop divides: the masked-diffusion bound of pretraining and fine-tuning.

Other objectives have a file of their own, with a function like `objective` here, which the settings of their stage name
by its path.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from datasets import Dataset, load_from_disk
from torch import Tensor, nn

from llada_core.data.batches import Batch, BatchSampler, RowBatches
from llada_core.diffusion import MaskedLoss, Noise, alpha, fed_copies, hidden_at, loss_weight, masked_nll
from llada_core.modeling.predictor import MaskPredictor
from llada_core.tokenizer import Tokenizer
from llada_core.training.accelerator import Ranks
from llada_core.training.params import BlockParams, PretrainParams, SFTParams, TrainingParams

# By tenths of time it can be seen whether nearly clean or nearly empty canvases make a loss move.
BUCKETS = 10
# No training step has this number: held-out rows share no noise with any of them, and have the same at every call.
_VALIDATION_STEP = -1


@dataclass(frozen=True)
class Loss:
    """The differentiable sum of one micro-batch, and detached (sum, count) pairs worth logging."""

    # A sum: the mean of means of micro-batches would weigh a token by how few others share its micro-batch.
    sum: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)
    extra: Tensor | None = None  # a term that already is this micro-batch's share of a mean over the step


@dataclass(frozen=True)
class StepWork:
    """One rank's micro-batches of one step: `counts[i]` is what the sum of `batches[i]` is to be divided by, in total.

    `inference_tokens`: tokens that went through a forward without gradient to make these batches.
    """

    batches: list[Any]
    counts: list[float]
    tokens: int
    inference_tokens: int = 0
    notes: Mapping[str, float] = field(default_factory=dict)


class Objective(Protocol):
    """What the loop asks of a stage.

    best_by, held, patience: the validation figure by which the weights to keep are chosen (None: the last ones), the
    shares that must not fall meanwhile and of how many rows each is one, and after how many validations without a
    better one the run ends (0: never).
    """

    best_by: str | None = None
    held: Mapping[str, int] = {}
    patience: int = 0

    def work(self, model: nn.Module, step: int, rank: int, ranks: int) -> StepWork: ...
    def loss(self, model: nn.Module, batch: Any) -> Loss: ...
    def validate(self, model: nn.Module, rank: int, ranks: int) -> dict[str, Tensor]: ...
    def steps_per_epoch(self) -> int: ...
    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        return None


@dataclass(frozen=True)
class Hidden:
    """Rows and which of their tokens are hidden, (B, L) bool, at times (B,); in blocks of what length they are seen."""

    rows: Batch
    masked: Tensor
    times: Tensor
    block_length: int | None

    @property
    def fed(self) -> int:
        """Positions that go through a forward."""
        return self.masked.numel() * fed_copies(self.block_length, self.masked.shape[1])


class DiffusionObjective(Objective):
    """Pretraining and fine-tuning (LLaDA, arXiv:2502.09992, eq. 3 and 5): cross-entropy of hidden tokens over their probability."""

    def __init__(
        self,
        model: MaskPredictor,
        train: RowBatches,
        validation: RowBatches | None,
        params: TrainingParams,
        *,
        seed: int,
    ) -> None:
        self.train, self.validation, self.params, self.seed = train, validation, params, seed
        self.mask_id = model.special_tokens.mask_id
        self.blocks = BlockParams() if params.blocks is None else params.blocks
        self.block_length = self.blocks.length or model.block_length  # at the end; None: everybody sees everybody
        self.complementary = isinstance(params, SFTParams) and params.complementary
        self.confidence = params.confidence if isinstance(params, SFTParams) else 0.0
        weighs = params.router_balance > 0 or params.router_z > 0
        self.routed = weighs and any("experts" in name for name, _ in model.named_parameters())

    def steps_per_epoch(self) -> int:
        return self.train.order.batches_per_epoch

    def work(self, model: nn.Module, step: int, rank: int, ranks: int) -> StepWork:
        micros = self.params.share(ranks)
        batches = [
            self._hidden(self.train.batch(step, part=rank * micros + i, parts=ranks * micros), step)
            for i in range(micros)
        ]
        return StepWork(batches, [self.count(hidden) for hidden in batches], sum(hidden.fed for hidden in batches))

    def _hidden(self, rows: Batch, step: int) -> Hidden:
        noise = Noise(self.seed, step, rows.numbers, self.params.batch_size)
        length = None if self.block_length is None else self.blocks.at(step, self.block_length)
        return self.hide(rows, noise.times(self.params.noise), noise.uniforms(rows.tokens.shape[1]), length)

    def hide(self, rows: Batch, t: Tensor, uniforms: Tensor, block_length: int | None) -> Hidden:
        """Rows and what is hidden of them at times (B,) by uniforms (B, L); of a complementary pair, all rows twice."""
        masked = hidden_at(1 - alpha(t, self.params.noise.schedule), uniforms, rows.maskable)
        if not self.complementary:
            return Hidden(rows, masked, t, block_length)
        # What one copy hides the other shows (LLaDA2.0, arXiv:2512.15745): every token is learnt once in each pair.
        twice = {name: torch.cat([x, x]) for name, x in vars(rows).items() if x is not None}
        # The complement of a linear schedule hides each token with chance 1 - t, so that is its time, and its weight follows.
        both, times = torch.cat([masked, rows.maskable & ~masked]), torch.cat([t, 1 - t])
        return Hidden(replace(rows, **twice), both, times, block_length)

    def count(self, hidden: Hidden) -> float:
        """What a batch adds to the divisor: its scored or its hidden tokens, or its rows."""
        rows, by = hidden.rows, self.params.normalise
        # By all that could be hidden: to divide by what was, beside its chance, would count time twice, and is no bound.
        if by in ("token", "masked"):
            return float((rows.maskable if by == "token" else hidden.masked).sum())
        return float(len(rows.tokens))

    def noisy_loss(self, model: nn.Module, rows: Batch, t: Tensor, uniforms: Tensor) -> Loss:
        """The loss for given times (B,) and uniforms (B, L), with the blocks of the finished model."""
        return self.loss(model, self.hide(rows, t, uniforms, self.block_length))

    def loss(self, model: nn.Module, batch: Hidden) -> Loss:
        params, rows, masked, t = self.params, batch.rows, batch.masked, batch.times
        noisy = torch.where(masked, self.mask_id, rows.tokens)
        # A canvas fed twice would need a mask of four times the entries; the numbers of its documents say the same.
        by_blocks = fed_copies(batch.block_length, noisy.shape[1]) > 1
        result = masked_nll(
            model,
            noisy,
            rows.tokens,
            masked,
            visible(rows, numbered=by_blocks),
            right_shift=params.right_shift,
            router_losses=self.routed,
            block_length=batch.block_length,
            documents=by_blocks and rows.document_ids is not None,
            certainty=self.confidence > 0,
        )
        # Not blocking: these copies would wait for the whole forward pass that was queued before them.
        device = result.nll.device
        lengths = rows.maskable.sum(1).float().to(device, non_blocking=True)
        weight = loss_weight(t, params.noise).to(device, non_blocking=True)
        t = t.to(device, non_blocking=True)
        # One time a row, so one weight: rows are added up first and weighed after.
        bound = result.per_row(len(t)) * weight
        # By sequence every row counts alike, as in LLaDA's fine-tuning; by token long rows count for more.
        total = (bound / lengths.clamp(min=1)).sum() if params.normalise == "sequence" else bound.sum()
        parts = {"loss": sum_and_count(total.detach(), self.count(batch)), **bound_parts(bound.detach(), t, lengths)}
        extra = [self._router(result, rows, parts), self._confidence(result, rows, parts)]
        given = [term for term in extra if term is not None]
        return Loss(total, parts, sum(given[1:], given[0]) if given else None)

    def _confidence(self, result: MaskedLoss, rows: Batch, parts: dict[str, Tensor]) -> Tensor | None:
        """The mean entropy of right predictions, of each micro-batch for itself: how many there are no one knows before."""
        if result.certainty is None:
            return None
        entropy, right = result.certainty
        total, count = torch.where(right, entropy, 0.0).sum(), right.sum()
        parts["confidence"] = torch.stack([total.detach(), count.to(total.dtype)])
        # A mean of this micro-batch, times its share of the rows of the step (twice as many with complements).
        share = len(rows.tokens) / (self.params.batch_size * (1 + self.complementary))
        return self.confidence * share * total / count.clamp(min=1)

    def _router(self, result: MaskedLoss, rows: Batch, parts: dict[str, Tensor]) -> Tensor | None:
        """Balance and z-loss as means over the step's rows: both add up over micro-batches and ranks."""
        if result.router_losses is None:
            return None
        balance, z_tokens = result.router_losses
        # Where blocks make a canvas be fed twice, the router sees both copies of a token.
        copies = z_tokens.shape[1] // rows.tokens.shape[1]
        seen = rows.tokens.shape[1] if rows.attention_mask is None else rows.attention_mask.sum(1)
        if isinstance(seen, Tensor):
            seen = seen.to(z_tokens.device, non_blocking=True)
        z = z_tokens.sum(1) / (copies * seen)
        parts["router_balance"], parts["router_z"] = (sum_and_count(x.sum().detach(), len(x)) for x in (balance, z))
        step = self.params.batch_size * (1 + self.complementary)
        return (self.params.router_balance * balance + self.params.router_z * z).sum() / step

    def validate(self, model: nn.Module, rank: int, ranks: int) -> dict[str, Tensor]:
        """The bound per token on held-out rows, at the same times and masks at every call; in micro-batches, as in training.

        A row's noise depends on its number alone, so the size of a forward changes no figure.
        """
        if self.validation is None:
            return {}
        parts = {f"validation_{name}": torch.zeros(2, dtype=torch.float64) for name in ("loss", "nll")}
        for number in range(self.validation.order.batches_per_epoch):
            share = self.validation.batch(number, part=rank, parts=ranks)  # sharded ranks must run in step
            for rows in _in_parts(share, self.params.micro_batch_size):
                noise = Noise(self.seed, _VALIDATION_STEP, rows.numbers, self.validation.order.size)
                with torch.no_grad():
                    loss = self.noisy_loss(
                        model, rows, noise.times(self.params.noise), noise.uniforms(rows.tokens.shape[1])
                    )
                for name in ("loss", "nll"):
                    parts[f"validation_{name}"] += loss.parts[name].cpu()
        return parts


def _in_parts(rows: Batch, size: int | None) -> Iterator[Batch]:
    """A batch in parts of at most `size` rows, each as wide as the whole."""
    size = size or len(rows.tokens)
    for start in range(0, len(rows.tokens), size):
        part = slice(start, start + size)
        yield replace(rows, **{name: x[part] for name, x in vars(rows).items() if x is not None})


def visible(rows: Batch, *, numbered: bool = False) -> Tensor | None:
    """The attention mask of a batch: (B, L), or where documents must not see each other (B, L, L) or their numbers (B, L)."""
    if rows.document_ids is None:
        return rows.attention_mask
    if numbered:
        # From 1 on, since times the mask 0 is left for padding, which is of no document.
        numbers = rows.document_ids + 1
        return numbers if rows.attention_mask is None else numbers * rows.attention_mask
    same = rows.document_ids[:, :, None] == rows.document_ids[:, None, :]
    return same if rows.attention_mask is None else same & rows.attention_mask[:, None, :].bool()


def bound_parts(bound: Tensor, t: Tensor, lengths: Tensor) -> dict[str, Tensor]:
    """The likelihood bound per scored token, overall and by time."""
    # Time 1 itself belongs to the last tenth.
    bucket = (t * BUCKETS).long().clamp(max=BUCKETS - 1)
    empty = torch.zeros(2, BUCKETS, device=bound.device)
    by_t = empty.index_add(1, bucket, torch.stack([bound, lengths]))
    return {"nll": torch.stack([bound.sum(), lengths.sum()]), "nll_by_t": by_t}


def sum_and_count(total: Tensor, count: float) -> Tensor:
    """(sum, count) as one tensor on the sum's device."""
    return torch.stack([total, torch.full_like(total, count)])


def objective(
    params: PretrainParams | SFTParams, model: MaskPredictor, tokenizer: Tokenizer, data: Path, *, seed: int
) -> DiffusionObjective:
    """That of pretraining and fine-tuning on the rows in `data`/train and validation; raises ValueError for unfit ones."""
    train, held_out = (
        _batches(_fitting(_shown(data / part, params), model), params, model, seed=seed, held_out=part != "train")
        for part in ("train", "validation")
    )
    assert train is not None
    return DiffusionObjective(model, train, held_out, params, seed=seed)


def stored_rows(folder: Path) -> Dataset:
    """The rows that `prepare` wrote, maybe none; raises FileNotFoundError where it did not."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no prepared data; run `python -m tasks.prepare` first")
    try:
        return load_from_disk(str(folder))
    except IndexError:  # how datasets says that a folder holds no rows
        return Dataset.from_dict({})


def filled(table: Dataset) -> Dataset:
    """The same table; raises ValueError for an empty one."""
    if not len(table):
        raise ValueError("the training data has no rows; see data/card.json for what was dropped")
    return table


def _shown(folder: Path, params: TrainingParams) -> Dataset:
    """The rows without the numbers of documents that the settings do not ask for."""
    table = stored_rows(folder)
    if isinstance(params, PretrainParams) and not params.document_mask and "document_ids" in table.column_names:
        table = table.remove_columns("document_ids")
    return table


def _fitting(table: Dataset, model: MaskPredictor) -> Dataset:
    longest = int(_lengths(table).max()) if len(table) else 0
    if longest > model.max_length:
        raise ValueError(
            f"a row has {longest} tokens, the model takes {model.max_length}; lower the data's `length` and prepare anew"
        )
    return table


def _lengths(table: Dataset) -> Any:
    # From the column as it lies in the file: as lists, the ids of millions of rows would become Python objects.
    return table.data["input_ids"].combine_chunks().value_lengths().to_numpy()


def _batches(
    table: Dataset, params: TrainingParams, model: MaskPredictor, *, seed: int, held_out: bool
) -> RowBatches | None:
    table = table.select(range(min(len(table), params.validation_rows))) if held_out else filled(table)
    if not len(table):
        return None
    lengths = _lengths(table) if isinstance(params, SFTParams) and params.group_by_length else None
    size, ranks = params.batch_size, Ranks().count
    if held_out:
        # Each rank the same number of rows: a rank without any would not take part in a forward that others wait in.
        size = max(min(size, len(table)) // ranks, 1) * ranks
    order = BatchSampler(len(table), size, seed=seed, lengths=lengths)
    eos_id, block_length = model.special_tokens.eos_id, model.block_length
    padding = params.eos_padding if isinstance(params, SFTParams) else "none"
    if padding == "block" and block_length is None:
        raise ValueError("eos_padding block fills the last block of a row, and this model has none: set blocks.length")
    # A model that never saw a short canvas does badly on one; held-out rows stay whole, so that figures compare.
    cut = params.random_length_ratio if isinstance(params, PretrainParams) and not held_out else 0.0
    return RowBatches(table, order, eos_id=eos_id, padding=padding, random_length=cut, block_length=block_length or 1)
