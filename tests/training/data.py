"""Small prepared data folders, made on the spot: counting sequences that a tiny model can learn."""

from pathlib import Path

import torch
from datasets import Dataset

from tests.tiny import tiny_tokenizer


def counting_rows(count: int, length: int, seed: int) -> list[list[int]]:
    """Rows that count upwards from a random start, so that every token is told by any other."""
    start = torch.randint(0, 60, (count, 1), generator=torch.Generator().manual_seed(seed))
    return (10 + (start + torch.arange(length)) % 60).tolist()


def write_data(folder: Path, rows: int = 96, length: int = 16) -> Path:
    """data/{tokenizer,pretrain,sft} as `prepare` writes them; replies of several lengths."""
    tiny_tokenizer().save(folder / "tokenizer")
    for part, count, seed in (("train", rows, 0), ("validation", 16, 1)):
        packed = counting_rows(count, length, seed)
        Dataset.from_dict({"input_ids": packed}).save_to_disk(folder / "pretrain" / part)
        ragged = [row[: length - i % 6] for i, row in enumerate(packed)]
        maskable = [[0] * 4 + [1] * (len(row) - 4) for row in ragged]
        Dataset.from_dict({"input_ids": ragged, "maskable": maskable}).save_to_disk(folder / "sft" / part)
    return folder
