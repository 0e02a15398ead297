"""A mask predictor that solves the sudoku of its prompt and adds numbers up: what a browser test can check.

It stands where a trained model would, so that the page is tested without training one.
"""

import re
from pathlib import Path

import torch
from torch import Tensor

from app.models import LoadedModel
from llada_core.data.puzzles import solutions
from llada_core.modeling.predictor import MaskPredictor, Prediction
from llada_core.tokenizer import Tokenizer
from tests.tiny import tiny_tokenizer


class Oracle(MaskPredictor):
    """Writes the solution of the last 16-digit puzzle it reads, else `reply`; surer the more is written around."""

    supports_cache = False

    def __init__(self, tokenizer: Tokenizer, reply: str) -> None:
        super().__init__()
        self.tokenizer, self.reply = tokenizer, reply
        self._special = tokenizer.special
        self.anchor = torch.nn.Parameter(torch.zeros(1))

    @property
    def device(self) -> torch.device:
        return self.anchor.device

    @property
    def vocab_rows(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def max_length(self) -> int:
        return 700

    def forward(self, input_ids: Tensor, attention_mask=None, *, positions=None, **others) -> Prediction:
        rows, width = input_ids.shape
        logits = torch.zeros(rows, width, self.vocab_rows)
        for row, ids in enumerate(input_ids.tolist()):
            for at, token in enumerate(self.written(ids)):
                logits[row, at, token] = 4.0 + (at * 7 + 3) % 5
        flat = logits.view(rows * width, -1)
        return Prediction(logits=logits if positions is None else flat[positions])

    def written(self, ids: list[int]) -> list[int]:
        mask = self.special_tokens.mask_id
        start = next((i + 1 for i in range(len(ids) - 1, -1, -1) if ids[i] == self.header_end()), None)
        if start is None:
            return [self.tokenizer.encode("3")[0] if t == mask else t for t in ids]
        start += len(self.tokenizer.encode("\n\n"))
        found = re.findall(r"[0-4]{16}", self.tokenizer.decode(ids[:start]))
        text = solutions(found[-1])[0] if found and solutions(found[-1]) else self.reply
        answer = [*self.tokenizer.encode(text), self.special_tokens.eot_id]
        answer += [self.special_tokens.eos_id] * (len(ids) - start - len(answer))
        return ids[:start] + answer[: len(ids) - start]

    def header_end(self) -> int:
        return self.tokenizer.encode("<|end_header_id|>", user=False)[0]


def oracle(name: str, reply: str = "I know sudokus only.") -> LoadedModel:
    """An loaded around an oracle."""
    tokenizer = tiny_tokenizer()
    return LoadedModel(name, Path(name), Oracle(tokenizer, reply).eval(), tokenizer)
