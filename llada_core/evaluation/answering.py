"""A model that answers batches of requests: by generating, by filling blanks, or by scoring continuations.

Knows a model and its tokenizer; does not know lm-eval, files, or which requests there are.
"""

import time
from dataclasses import dataclass, field, replace

import torch

from llada_core.evaluation.params import Settings
from llada_core.evaluation.requests import Wanted
from llada_core.evaluation.worklist import Answer
from llada_core.likelihood import greedy_matches, log_likelihoods
from llada_core.modeling import MaskPredictor
from llada_core.sampling.sampler import generate, infill
from llada_core.tokenizer import Tokenizer

SAMPLES = 128
Ids = list[int]


@dataclass(frozen=True)
class Options:
    """How requests are answered; `max_length` None: as long as the model takes."""

    settings: Settings = field(default_factory=Settings)
    batch_size: int = 32
    max_length: int | None = None
    check_greedy: bool = False  # also whether greedy decoding would give the continuation (no metric of ours needs it)
    seed: int = 0
    patience: float = 600.0  # seconds of silence after which rank 0 does the work of other ranks


@dataclass(frozen=True)
class Answerer:
    """A model, its tokenizer, and how they answer."""

    model: MaskPredictor
    tokenizer: Tokenizer
    options: Options

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return min(self.options.max_length or self.model.max_length, self.model.max_length)

    @property
    def samples(self) -> int:
        """Monte-Carlo samples of one likelihood."""
        return self.options.settings.samples or SAMPLES

    def generate(self, asked: list[Wanted]) -> list[Answer]:
        """Answers to requests with the same settings, in one batch."""
        if asked[0].blanks:
            return self._infill(asked)
        result = generate(self.model, [list(w.prompt) for w in asked], asked[0].params)
        return [self._answer(row.tolist(), result.forwards) for row in result.answers]

    def _infill(self, asked: list[Wanted]) -> list[Answer]:
        mask = self.tokenizer.special.mask_id
        templates = [[*w.prompt, *[mask] * w.blanks, *w.suffix] for w in asked]
        most = max(w.length for w in asked)
        params = replace(asked[0].params, max_new_tokens=most, block_length=most, stop_at_eos=False, schedule="linear")
        result = infill(self.model, templates, params)
        parts = (row[len(w.prompt) :][: w.blanks] for row, w in zip(result.answers, asked, strict=True))
        return [self._answer(part.tolist(), result.forwards) for part in parts]

    def _answer(self, ids: Ids, forwards: int) -> Answer:
        ends = [i for i, token in enumerate(ids) if token in self.tokenizer.end_ids]
        return {"text": self.tokenizer.answer_text(ids), "tokens": ends[0] if ends else len(ids), "forwards": forwards}

    def score(self, pairs: list[tuple[Ids, Ids]]) -> list[Answer]:
        """Log-likelihoods of continuations given contexts, one batch."""
        guidance = self.options.settings.cfg_scale or 0.0
        values = log_likelihoods(self.model, pairs, samples=self.samples, cfg_scale=guidance, seed=self.options.seed)
        check = self.options.check_greedy
        greedy = greedy_matches(self.model, pairs, cfg_scale=guidance) if check else [False] * len(pairs)
        return [{"ll": float(value), "greedy": each} for value, each in zip(values, greedy, strict=True)]

    def fit(self, context: Ids, continuation: Ids) -> tuple[Ids, Ids]:
        """A pair that the model can take: the context loses its beginning, a longer continuation too."""
        continuation = continuation[-self.longest :]
        room = self.longest - len(continuation)
        return context[max(0, len(context) - room) :], continuation

    @torch.inference_mode()
    def tokens_per_second(self, rows: int, length: int) -> float:
        """The rate of one measured forward of `rows` sequences, heads at few positions."""
        ids = torch.full((rows, length), self.tokenizer.special.eos_id, device=self.model.device)
        for part in (ids[:1, :8], ids):  # the first warms up
            start = time.monotonic()
            self.model(part, positions=torch.arange(min(8, length), device=ids.device)).logits.sum().item()
        return rows * length / max(time.monotonic() - start, 1e-6)
