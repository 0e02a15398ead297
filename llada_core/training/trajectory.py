"""Completions with the steps at which their tokens were written, and the canvases that these steps tell.

A token's log-probability is taken at the canvas on which it was chosen (TraceRL, arXiv:2509.06949: the clipped objective
over the steps of a trajectory, each given those before it). Of a model that attends by blocks the n-th steps of all
blocks are one forward, because a noisy block sees clean copies of those before it (EBPO of LLaDA2.1, arXiv:2602.08676,
does so for its bound). What chooses positions is taken as given: confidence or a schedule, no probability.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from llada_core.modeling import MaskPredictor
from llada_core.sampling.batch import Answer, RunningBatch
from llada_core.sampling.engine import evaluating
from llada_core.sampling.params import SamplingParams
from llada_core.sampling.requests import Request, to_answer


@dataclass(frozen=True)
class Trace:
    """R rows, each from column 0: `chosen` (R, W) int64, the token that was written first at each position; `when` (R, W)
    int64, at which step of the row that was, -1 where nothing was written. `answers` with their final tokens; what it cost.
    """

    chosen: Tensor
    when: Tensor
    answers: list[Answer]
    forwards: int
    fed: int


def row_width(longest: int, params: SamplingParams, model: MaskPredictor) -> int:
    """Columns for an answer to the longest prompt: a model that attends by blocks is shown whole ones."""
    asked = longest + params.max_new_tokens
    return (
        asked
        if model.block_length is None
        else min(-(-asked // params.block_length) * params.block_length, model.max_length)
    )


@torch.no_grad()
def traced(
    model: MaskPredictor, prompts: Sequence[Sequence[int]], params: SamplingParams, *, width: int, at_once: int | None
) -> Trace:
    """Answers every prompt as `generate` does, so many `at_once`, and keeps what was written when."""
    requests, _ = to_answer(model, prompts, params)
    # On the host, as answers are: rollouts of a step are many, and a step of the sampler copies its tokens anyway.
    chosen = torch.full((len(requests), width), model.special_tokens.pad_id)
    when, size = torch.full_like(chosen, -1), at_once or len(requests)
    answers: list[Answer] = []
    forwards = fed = 0
    for start in range(0, len(requests), size):
        part = [Answer(request) for request in requests[start : start + size]]
        for row, answer in enumerate(part, start):
            chosen[row, : len(answer.request.tokens)] = answer.request.tokens
        batch = _written(model, part, chosen[start : start + size], when[start : start + size])
        answers, forwards, fed = answers + part, forwards + batch.denoiser.forwards, fed + batch.denoiser.fed
    return Trace(chosen, when, answers, forwards, fed)


def _written(model: MaskPredictor, answers: list[Answer], chosen: Tensor, when: Tensor) -> RunningBatch:
    """Has all answers written, and notes in `chosen` and `when` (R, W) the first token of each position and its step."""
    request: Request = answers[0].request
    batch, number = RunningBatch(model, request), {id(answer): row for row, answer in enumerate(answers)}
    step = 0
    with evaluating(model):
        batch.join(answers)
        while batch.answers:
            moment = batch.step()
            rows, now = torch.tensor([number[id(answer)] for answer in moment.answers]), moment.tokens.cpu()
            before, columns = chosen[rows, : now.shape[1]], now.shape[1]
            # A stop overwrites what stands behind the end with EOS; the canvases before it had the first token.
            fresh = (before == request.mask_id) & (now != request.mask_id)
            chosen[rows, :columns] = torch.where(fresh, now, before)
            when[rows, :columns] = torch.where(fresh, step, when[rows, :columns])
            step += 1
    return batch


def local_steps(when: Tensor, length: int) -> Tensor:
    """(R, W) int64: for each position that was written the number of its step within its block, from 0; -1 for others.

    when: as of `Trace`; length: of a block. Steps that wrote nothing there are not counted.
    """
    rows, width = when.shape
    # Filled up to whole blocks with what counts as never written.
    blocks = F.pad(when, (0, -width % length), value=-1).view(rows, -1, length)
    ordered, order = blocks.sort(-1)
    # Ranks without gaps, by sorting: a step that wrote nothing in this block would else be a forward for nothing.
    rank = F.pad((ordered[..., 1:] != ordered[..., :-1]).long(), (1, 0)).cumsum(-1)
    # Where something in the block was given, that is the lowest rank, and what was written begins at the next one.
    rank = rank - (ordered[..., :1] < 0).long()
    return torch.zeros_like(rank).scatter(-1, order, rank).view(rows, -1)[:, :width]
