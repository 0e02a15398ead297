"""The one loop: ask for logits, propose, score, commit; a generator of steps over a canvas.

It knows no text, no cache, no guidance and no model: how logits are got, how sure we are, what is committed and how
many are values. Each row is in the block of its first open position; a finished row leaves the batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llada_core.sampling.canvas import Blocks, Canvas, Step
from llada_core.sampling.denoiser import Denoiser, Query
from llada_core.sampling.proposals import RowNoise
from llada_core.sampling.unmask import Choice, Pace


@dataclass(frozen=True)
class Stop:
    """Where a row ends early: at the first of `end_ids` with nothing open before it; the rest becomes EOS."""

    end_ids: Tensor
    eos_id: int

    def close(self, tokens: Tensor, canvas: Canvas) -> Tensor:
        """`tokens` (A, T) with everything after a row's end token written."""
        nothing_open = (tokens == canvas.mask_id).cumsum(1) == 0
        reached = torch.isin(tokens, self.end_ids) & canvas.answer & nothing_open
        after = canvas.answer & (reached.cumsum(1) > reached.long())
        return tokens.masked_fill(after, self.eos_id)


@dataclass
class Sampler:
    """The reverse process as a loop over one canvas.

    `look_ahead` also asks for proposals at open positions beyond the block; that costs their share of the vocabulary
    projection and changes nothing else. Without a `pace` the rule alone says how much is committed.
    """

    denoiser: Denoiser
    choice: Choice
    noise: RowNoise
    block_length: int
    pace: Pace | None = None
    stop: Stop | None = None
    look_ahead: bool = False

    @torch.no_grad()
    def run(self, canvas: Canvas) -> Iterator[Step]:
        """Commits every open position; yields after each step."""
        board = canvas.shown()
        block, blocks = torch.full_like(canvas.number, -1), None
        while True:
            blocks = (blocks and blocks.after(canvas)) or Blocks.of(canvas, self.block_length, block)
            kept = [row for row, count in enumerate(blocks.counts) if count]
            if not kept:
                return
            if len(kept) < len(blocks.counts):
                canvas, block = canvas.rows(kept), block[torch.tensor(kept, device=block.device)]
                self._keep(kept, canvas.tokens.shape[1])
                blocks = None
                continue
            canvas, step = self._step(canvas, board, blocks)
            board, block = step.tokens, blocks.number
            yield step

    def _step(self, canvas: Canvas, board: Tensor, blocks: Blocks) -> tuple[Canvas, Step]:
        mine = asked = torch.nonzero_static(blocks.open.flatten(), size=sum(blocks.counts))[:, 0]
        if self.look_ahead:
            asked = torch.cat([mine, (canvas.open & ~blocks.open).flatten().nonzero()[:, 0]])
        logits = self.denoiser.logits(Query.of(canvas, blocks, asked))
        proposals, confidence = self.choice.propose(logits[: len(mine)], self.noise, blocks.counts)
        quota = None if self.pace is None else self.pace.next(blocks, self.noise)

        commit = self.choice.rule(confidence.laid_out(blocks.open.shape, mine), quota).view(-1)[mine]
        tokens = canvas.tokens.clone()
        tokens.view(-1)[mine] = torch.where(commit, proposals, canvas.mask_id)
        if self.stop is not None:
            tokens = self.stop.close(tokens, canvas)
        canvas = canvas.written(tokens)

        values = confidence.value
        if self.look_ahead:
            beyond, sure = self.choice.propose(logits[len(mine) :], None, [])
            proposals, values = torch.cat([proposals, beyond]), torch.cat([values, sure.value])
        step = Step(
            tokens=canvas.shown(board),
            before=board,
            mask_id=canvas.mask_id,
            forwards=self.denoiser.forwards,
            rows=canvas.number,
            bounds=torch.stack([blocks.first, blocks.last], 1) + canvas.shift[:, None],
            asked=canvas.places[asked],
            proposals=proposals,
            confidences=values,
        )
        return canvas, step

    def _keep(self, rows: list[int], width: int) -> None:
        self.denoiser.keep(rows, width)
        self.noise.keep(rows)
        if self.pace is not None:
            self.pace.keep(rows)
