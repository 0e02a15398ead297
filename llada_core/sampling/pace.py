"""How far along its block each row is, and how many positions its next step commits.

Knows schedules and counts; does not know tokens, logits or positions.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from llada_core.sampling.canvas import Blocks, Canvas
from llada_core.sampling.params import SamplingParams
from llada_core.sampling.proposals import RowNoise
from llada_core.sampling.unmask import Schedule, schedule_of


@dataclass
class Pace:
    """The counts of every active row's block. A rows, S steps.

    `steps` (A,) is each row's budget for one block; with `draw` the schedule is given uniforms (A, N), nan where there
    is no position, in place of counts (A,).
    """

    schedule: Schedule
    steps: Tensor
    draw: bool = False
    counts: Tensor = field(init=False)
    taken: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.taken = torch.zeros_like(self.steps)
        self.counts = self.steps.new_zeros(len(self.steps), int(self.steps.max()))

    def next(self, blocks: Blocks, noise: RowNoise) -> Tensor:
        """(A,) counts of the step that is about to be taken."""
        if any(blocks.entered):
            new = torch.tensor(blocks.entered, device=self.steps.device)
            fresh = self.schedule(self._material(blocks, noise), self.steps)
            fresh = F.pad(fresh, (0, self.counts.shape[1] - fresh.shape[1]))
            self.counts = torch.where(new[:, None], fresh, self.counts)
            self.taken = torch.where(new, 0, self.taken)
        count = self.counts.gather(1, self.taken[:, None])[:, 0]
        self.taken = self.taken + 1
        return count

    def _material(self, blocks: Blocks, noise: RowNoise) -> Tensor:
        device = self.steps.device
        if not self.draw:
            return torch.tensor(blocks.counts, device=device)
        drawn = [count * new for count, new in zip(blocks.counts, blocks.entered, strict=True)]
        real = torch.arange(max(drawn), device=device) < torch.tensor(drawn, device=device)[:, None]
        uniforms = torch.full(real.shape, torch.nan, dtype=torch.float64, device=device)
        return uniforms.masked_scatter(real, noise.uniforms(drawn, 1))

    def keep(self, rows: list[int]) -> None:
        """Only these of the active rows go on."""
        index = torch.tensor(rows, device=self.steps.device)
        self.steps, self.counts, self.taken = self.steps[index], self.counts[index], self.taken[index]


def pace_of(params: SamplingParams, canvas: Canvas) -> Pace | None:
    """Each row's steps shared by its blocks, rounded up; None where confidence alone says how much is committed."""
    if params.parallel:
        return None
    blocks = (canvas.end - canvas.start + params.block_length - 1) // params.block_length
    steps = (params.steps + blocks - 1) // blocks
    return Pace(schedule_of(params), steps, draw=params.stochastic_transfer)
