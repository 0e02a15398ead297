"""What one step did to the canvas, for whoever watches: a page, a terminal, a test.

Knows arrays in the caller's layout; nothing is computed before it is looked at. Does not know how the step came about.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Step:
    """One step. B rows, T columns, A rows that took part, Q positions that the model was asked about.

    `tokens` (B, T) int64 after the step, `before` it; `rows` (A,) the rows that took part; `bounds` (A, 2) their
    blocks; `asked` (Q,) indices into the B*T flattened positions, `proposals` (Q,) and `confidences` (Q,) what came back;
    `forwards` of the model so far.
    """

    tokens: Tensor
    before: Tensor = field(repr=False)
    mask_id: int
    forwards: int
    rows: Tensor
    bounds: Tensor = field(repr=False)
    asked: Tensor = field(repr=False)
    proposals: Tensor = field(repr=False)
    confidences: Tensor = field(repr=False)

    @property
    def open(self) -> Tensor:
        """(B, T) bool: still masked after the step."""
        return self.tokens == self.mask_id

    @property
    def committed(self) -> Tensor:
        """(B, T) bool: written by this step."""
        return self.tokens != self.before

    @property
    def proposal(self) -> Tensor:
        """(B, T) int64: what the model would have written at each position that it was asked about, -1 elsewhere."""
        return torch.full_like(self.tokens, -1).view(-1).index_copy(0, self.asked, self.proposals).view_as(self.tokens)

    @property
    def confidence(self) -> Tensor:
        """(B, T) in [0, 1], of the proposals; nan elsewhere."""
        unknown = self.confidences.new_full((self.tokens.numel(),), torch.nan)
        return unknown.index_copy(0, self.asked, self.confidences).view_as(self.tokens)

    @property
    def block(self) -> Tensor:
        """(B, 2) int64: first and one past the last column of each row's block; 0, 0 for rows that have finished."""
        return self.tokens.new_zeros(len(self.tokens), 2).index_copy(0, self.rows, self.bounds)
