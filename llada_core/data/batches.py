"""Which rows form which batch, and how rows of unequal length become one.

Batch n of a run depends on (seed, n) alone: not on the number of ranks, on accumulation, or on what was read before, so
that a resumed run sees what an undisturbed one would.

Shapes: B rows, L positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, Protocol

import numpy as np
import torch

Padding = Literal["longest", "micro_batch", "none", "block"] | int


class Rows(Protocol):
    """A table of rows, such as a `datasets.Dataset`: a list of row numbers gives a mapping of column to lists."""

    @property
    def column_names(self) -> list[str]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, rows: list[int]) -> dict[str, list[Sequence[int]]]: ...


@dataclass(frozen=True)
class Batch:
    """Rows to train on.

    tokens (B, L) int64; maskable (B, L) bool, the positions that may be masked and are scored; attention_mask (B, L)
    int64, 1 = real, or None when every position is; document_ids (B, L) int64 or None, positions of different documents
    do not see each other; numbers (B,) int64, the running number of each row in the whole run, to key noise by.
    """

    tokens: torch.Tensor
    maskable: torch.Tensor
    attention_mask: torch.Tensor | None
    document_ids: torch.Tensor | None
    numbers: torch.Tensor


class BatchSampler:
    """The rows of every batch: epoch after epoch in a new order, `size` rows a batch.

    With `lengths` (one per row) a batch holds rows of similar length: within every run of `bucket` batches the rows are
    sorted by length, cut into batches, and these are shuffled. An epoch leaves out the rows that do not fill a batch;
    fewer rows than `size` are repeated.
    """

    def __init__(
        self, count: int, size: int, *, seed: int, lengths: Sequence[int] | np.ndarray | None = None, bucket: int = 64
    ) -> None:
        if count < 1 or size < 1:
            raise ValueError(f"{count} rows in batches of {size}: both must be at least 1")
        self.count, self.size, self.seed, self.bucket = count, size, seed, bucket
        self.batches_per_epoch = max(1, count // size)
        self._lengths = None if lengths is None else np.asarray(lengths)
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)

    def rows(self, step: int) -> np.ndarray:
        """The `size` row numbers of batch `step` (from 0)."""
        epoch, batch = divmod(step, self.batches_per_epoch)
        return self._epoch(epoch)[batch]

    def _draw_epoch(self, epoch: int) -> np.ndarray:
        # Seeded by the epoch, so that any step's rows are found without those before it.
        rng = np.random.default_rng([self.seed, epoch])
        # Cut to whole batches, or repeated where one batch needs more than there is.
        rows = np.resize(rng.permutation(self.count), self.batches_per_epoch * self.size)
        if self._lengths is None:
            return rows.reshape(-1, self.size)
        batches = []
        for start in range(0, len(rows), self.size * self.bucket):
            part = rows[start : start + self.size * self.bucket]
            # Sorted within a stretch and then shuffled: little padding, and a batch's place still tells nothing of its length.
            # The epoch was shuffled before, so rows of equal length meet others each time.
            part = part[np.argsort(self._lengths[part], kind="stable")].reshape(-1, self.size)
            batches.append(part[rng.permutation(len(part))])
        return np.concatenate(batches)


class RowBatches:
    """Batches of a table with `input_ids` and perhaps `maskable` (absent: all) and `document_ids`.

    `padding` of unequal rows: "longest" fills with EOS up to the longest row of the whole batch, visible and trained
    on, as LLaDA does; "micro_batch" does so up to the longest row of the share that is asked for, as dllm's collator
    does (how many EOS are trained on then depends on ranks and micro-batches); a number adds that many such EOS and
    hides the rest; "block" adds as many as fill the row's last block of `block_length`; "none" hides all padding.
    `random_length` is the share of batches cut to a length drawn from 1 to L
    (LLaDA pretraining: 0.01).
    """

    def __init__(
        self,
        table: Rows,
        order: BatchSampler,
        *,
        eos_id: int,
        padding: Padding = "none",
        random_length: float = 0.0,
        block_length: int = 1,
    ) -> None:
        if isinstance(padding, int) and padding < 0:
            raise ValueError(
                f"padding {padding}: use 'longest', 'micro_batch', 'none' or a number of EOS tokens from 0"
            )
        self.table, self.order, self.eos_id = table, order, eos_id
        self.padding, self.random_length, self.block_length = padding, random_length, block_length

    def batch(self, step: int, *, part: int = 0, parts: int = 1) -> Batch:
        """The `part`-th of `parts` equal shares (ranks x micro-batches) of batch `step`; the shares join to the whole.

        Raises ValueError when `parts` does not divide the batch.
        """
        size = self.order.size
        if size % parts:
            raise ValueError(f"a batch of {size} rows does not divide into {parts} parts; choose a multiple of {parts}")
        rows = self.order.rows(step)
        share = slice(part * size // parts, (part + 1) * size // parts)
        numbers = np.arange(step * size, (step + 1) * size)[share]
        # The padded width is that of the whole batch: with EOS padding it is part of the loss, and the loss must not
        # depend on how many ranks share a batch. Only `micro_batch` gives this up, for those who compare with dllm.
        wanted = rows if self.padding == "longest" else rows[share]
        columns = self.table[[int(row) for row in wanted]]
        width = max(map(len, columns["input_ids"]))
        if self.padding == "longest":
            columns = {name: column[share] for name, column in columns.items()}
        return self._cut(self._pad(columns, width, torch.from_numpy(numbers)), step)

    def _pad(self, columns: dict[str, list[Sequence[int]]], width: int, numbers: torch.Tensor) -> Batch:
        ids = columns["input_ids"]
        lengths = np.array([len(row) for row in ids])
        if isinstance(self.padding, int):
            seen = lengths + self.padding
        elif self.padding == "block":
            seen = -(-lengths // self.block_length) * self.block_length
        else:
            seen = lengths if self.padding == "none" else np.full_like(lengths, width)
        width = max(width, int(seen.max()))
        tokens = np.full((len(ids), width), self.eos_id, dtype=np.int64)
        maskable = np.arange(width) < seen[:, None]
        documents = np.zeros_like(tokens) if "document_ids" in columns else None
        for i, row in enumerate(ids):
            tokens[i, : len(row)] = row
            if "maskable" in columns:
                maskable[i, : len(row)] = columns["maskable"][i]
            if documents is not None:
                documents[i, : len(row)] = columns["document_ids"][i]
        visible = np.arange(width) < seen[:, None]
        return Batch(
            tokens=torch.from_numpy(tokens),
            maskable=torch.from_numpy(maskable),
            attention_mask=None if visible.all() else torch.from_numpy(visible.astype(np.int64)),
            document_ids=None if documents is None else torch.from_numpy(documents),
            numbers=numbers,
        )

    def _cut(self, batch: Batch, step: int) -> Batch:
        if self.random_length == 0:
            return batch
        # One draw for the whole batch on every rank; the 1 keeps it apart from the order's own draws.
        rng = np.random.default_rng([self.order.seed, step, 1])
        if rng.random() >= self.random_length:
            return batch
        width = int(rng.integers(1, batch.tokens.shape[1] + 1))
        cut = {name: value[:, :width] for name, value in vars(batch).items() if value is not None and value.ndim == 2}
        return replace(batch, **cut)
