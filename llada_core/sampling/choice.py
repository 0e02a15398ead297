"""What is done with logits: the values that turn them into proposals, scores and a number of commits.

Knows the parts it puts together from SamplingParams; does not know canvases, blocks or models.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llada_core.sampling.params import SamplingParams
from llada_core.sampling.proposals import CONFIDENCES, Confidence, RowNoise, Score, gumbel_argmax, probability
from llada_core.sampling.unmask import Rule, rule_of

CHUNK = 1 << 28
"""Logits looked at together; with more, rows are taken one by one so that the copies made here stay small."""


@dataclass(frozen=True)
class Choice:
    """Everything that turns logits into committed tokens."""

    score: Score
    rule: Rule
    temperature: float
    never: Tensor
    forbidden: Tensor
    deferred: Tensor
    needs_chance: bool

    @classmethod
    def of(cls, params: SamplingParams, mask_id: int, device: torch.device) -> "Choice":
        """The values that `params` name."""

        def ids(values: tuple[int, ...]) -> Tensor:
            return torch.tensor(values, dtype=torch.long, device=device)

        return cls(
            score=CONFIDENCES[params.remasking],
            rule=rule_of(params),
            temperature=params.temperature,
            never=ids((mask_id,)),
            forbidden=ids(params.forbid_tokens),
            deferred=ids(params.defer_tokens),
            needs_chance=params.remasking == "random",
        )

    def propose(self, logits: Tensor, noise: RowNoise | None, counts: list[int]) -> tuple[Tensor, Confidence]:
        """Tokens (P,) and their confidences (P,) from logits (P, V), `counts` of which belong to each row in turn.

        Without noise the likeliest tokens. MASK is never proposed, yet its probability counts against the proposal, as
        in the references.
        """
        if noise is None or logits.numel() <= CHUNK:
            return self._propose(logits, noise, counts)
        parts, at = [], 0
        for row, count in enumerate(counts):  # a row's numbers are its own, so rows may be taken apart
            only = [count if i == row else 0 for i in range(len(counts))]
            parts.append(self._propose(logits[at : at + count], noise, only))
            at += count
        tokens, found = zip(*parts, strict=True)
        return torch.cat(tokens), Confidence(torch.cat([c.value for c in found]), torch.cat([c.key for c in found]))

    def _propose(self, logits: Tensor, noise: RowNoise | None, counts: list[int]) -> tuple[Tensor, Confidence]:
        logits = logits.float()
        if len(self.forbidden):
            logits = logits.index_fill(-1, self.forbidden, -torch.inf)
        possible = logits.index_fill(-1, self.never, -torch.inf)
        if noise is None or not self.temperature:
            tokens = possible.argmax(-1)
        else:
            tokens = gumbel_argmax(possible, self.temperature, noise.uniforms(counts, logits.shape[-1]))
        uniforms = noise.uniforms(counts, 1)[:, 0] if self.needs_chance and noise is not None else None
        score = probability if self.needs_chance and uniforms is None else self.score
        if len(self.deferred):
            logits = logits.index_fill(-1, self.deferred, -torch.inf)
        confidence = score(logits, tokens, uniforms)
        if len(self.deferred):
            confidence = confidence.lowest_where(torch.isin(tokens, self.deferred))
        return tokens, confidence
