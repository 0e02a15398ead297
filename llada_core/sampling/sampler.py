"""The sampler's public face: generate, infill, stream. Shapes as in `canvas`."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from llada_core.modeling.predictor import MaskPredictor
from llada_core.sampling.batch import BatchStep, RunningBatch
from llada_core.sampling.canvas import Step
from llada_core.sampling.engine import Engine, evaluating
from llada_core.sampling.graph import Compiled
from llada_core.sampling.params import SamplingParams
from llada_core.sampling.query import on_device
from llada_core.sampling.requests import Prompts, Request, to_answer, to_fill
from llada_core.sampling.row_group import Answer


@dataclass(frozen=True)
class Generation:
    """The outcome for a batch. `tokens` (B, T) int64, each row padded on the left if it is short; `lengths` (B,) of
    what was asked for: the new tokens of a prompt, all tokens of a template; `forwards` of the model and the number
    of tokens `fed` to it in them; `forwards_each` (B,), how many of them a row took part in.
    """

    tokens: Tensor
    forwards: int
    fed: int
    lengths: tuple[int, ...]
    forwards_each: tuple[int, ...]

    @property
    def answers(self) -> list[Tensor]:
        """What was asked for, row by row."""
        return [row[len(row) - n :] for row, n in zip(self.tokens, self.lengths, strict=True)]


def generate(
    model: MaskPredictor,
    prompt_ids: Prompts,
    params: SamplingParams,
    *,
    attention_mask: Tensor | None = None,
    pinned: Mapping[int, int] | None = None,
    at_once: int | None = None,
) -> Generation:
    """Writes `params.max_new_tokens` tokens after each prompt.

    prompt_ids: (B, P) int64, or a list of B prompts of any lengths. attention_mask: (B, P), 0 where a prompt tensor is
    padding. pinned: answer position -> token id that stands there from the start. at_once: how many are written at the
    same time, the next ones as places get free (not said: all). The result's `tokens` are (B, P + max_new_tokens), P
    being the longest prompt; after a stop the rest is EOS. An empty prompt is written after BOS.
    The same seed gives the same answer to a prompt whatever shares its batch; equal prompts in one call get answers
    of their own. Raises `ValueError` for ids outside the vocabulary, a MASK in a prompt (that is a template:
    `infill`), a sequence longer than the model's, and settings that do not fit each other or the model.
    """
    requests, width = to_answer(model, prompt_ids, params, attention_mask=attention_mask, pinned=pinned)
    new = params.max_new_tokens
    found = _written(model, requests, width + new, [new] * len(requests), at_once)
    if isinstance(prompt_ids, Tensor):
        # A canvas has no padding on the left; who gave a tensor finds it as it was.
        found.tokens[:, :width] = prompt_ids  # padding as it was given
    return found


def infill(
    model: MaskPredictor, template_ids: Prompts, params: SamplingParams, *, at_once: int | None = None
) -> Generation:
    """Fills every MASK of each template, in blocks of `params.block_length` counted from the template's first token.

    template_ids: (B, L) int64 or a list of B templates of any lengths. `params.max_new_tokens` is not used. The
    result's `answers` are the filled templates. Raises as `generate` does, and if a template has nothing to fill.
    """
    requests = to_fill(model, template_ids, params)
    lengths = [request.told for request in requests]
    return _written(model, requests, max(lengths), lengths, at_once)


def _written(
    model: MaskPredictor, requests: list[Request], width: int, lengths: list[int], at_once: int | None
) -> Generation:
    """All requests, `width` columns of each, without what follows its end."""
    # A queue for this call alone, as long as the call needs it: it refuses nobody.
    engine = Engine(model, rows=at_once or len(requests), waiting=len(requests))
    answers = engine.submit(requests)
    engine.finish(answers)
    tokens = torch.full((len(answers), width), model.special_tokens.pad_id, device=model.device)
    for row, answer in zip(tokens, answers, strict=True):
        assert answer.tokens is not None
        # A row may hold more than was asked for (an end token of BERT's, a tail for nobody), and less than is shown.
        body = answer.tokens[: answer.request.end][-width:]
        row[width - len(body) :] = body
    each = tuple(answer.forwards for answer in answers)
    return Generation(tokens, engine.forwards, engine.fed, tuple(lengths), each)


def stream(  # noqa: PLR0913 - everything after the settings is keyword-only
    model: MaskPredictor,
    prompt_ids: Prompts,
    params: SamplingParams,
    *,
    attention_mask: Tensor | None = None,
    pinned: Mapping[int, int] | None = None,
    look_ahead: bool = False,
    compiled: Compiled = "off",
) -> Iterator[Step]:
    """`generate`, yielding every step. With `look_ahead` each step also holds proposals for open positions beyond the
    block (they cost their share of the vocabulary projection; a cached forward leaves them out). `compiled`: see `RunningBatch`.
    """
    requests, width = to_answer(
        model, prompt_ids, params, attention_mask=attention_mask, pinned=pinned, ahead=look_ahead
    )
    # An end token that the model's sequences have behind the answer (BERT's) has a column of its own.
    return _stream(model, requests, width + params.max_new_tokens + model.ends_with_eos, compiled)


def stream_infill(
    model: MaskPredictor,
    template_ids: Prompts,
    params: SamplingParams,
    *,
    look_ahead: bool = False,
    compiled: Compiled = "off",
) -> Iterator[Step]:
    """`infill`, yielding every step; `look_ahead` and `compiled` as in `stream`."""
    return _stream(model, to_fill(model, template_ids, params, ahead=look_ahead), 0, compiled)


def _stream(model: MaskPredictor, requests: list[Request], width: int, compiled: Compiled) -> Iterator[Step]:
    # Without an engine: all rows begin in the same step, so that one board shows them all.
    batch, answers = RunningBatch(model, requests[0], compiled), [Answer(request) for request in requests]
    layout = Layout(answers, max(width, *(request.told for request in requests)))
    with evaluating(model):
        batch.join(answers)
        board = layout.board(model.special_tokens.pad_id, model.device)
        while batch.answers:
            moment = layout.own(batch.step())
            step = layout.shown(moment, board, batch.denoiser.forwards)
            # Never changed in place: who was given the step before may still hold its tokens.
            board = step.tokens
            yield step


class Layout:
    """How the caller sees rows: B of them over `width` columns, padded on the left, without the tails that are for nobody."""

    def __init__(self, answers: list[Answer], width: int) -> None:
        self.answers, self.width = answers, width
        self.number = {id(answer): i for i, answer in enumerate(answers)}
        self.tail = max(answer.request.tail for answer in answers)

    def shift(self, request: Request) -> int:
        """By how many columns a row stands further to the right than on its canvas."""
        return self.width - request.told

    def board(self, pad_id: int, device: torch.device) -> Tensor:
        """(B, `width`) int64 before the first step."""
        board = torch.full((len(self.answers), self.width), pad_id)
        for row, answer in zip(board, self.answers, strict=True):
            first = self.shift(answer.request)
            row[first:] = answer.request.tokens[: self.width - first]
        return board.to(device)

    def own(self, moment: BatchStep) -> BatchStep:
        """Without what a compiled step has more than the rows themselves: blank rows, and columns that none of them has."""
        kept = [row for row, answer in enumerate(moment.answers) if id(answer) in self.number]
        columns, width = moment.tokens.shape[1], min(moment.tokens.shape[1], self.width + self.tail)
        if len(kept) == len(moment.answers) and width == columns:
            return moment
        device = moment.tokens.device
        told = [answer.request.told if id(answer) in self.number else 0 for answer in moment.answers]
        rank = on_device([kept.index(row) if row in kept else -1 for row in range(len(told))], device)
        row, column = moment.asked // columns, moment.asked % columns
        real = column < on_device(told, device)[row]
        rows = on_device(kept, device)
        return replace(
            moment,
            tokens=moment.tokens[rows, :width],
            first=moment.first[rows],
            last=moment.last[rows],
            asked=(rank[row] * width + column)[real],
            proposals=moment.proposals[real],
            confidences=moment.confidences[real],
            answers=[moment.answers[row] for row in kept],
        )

    def shown(self, moment: BatchStep, board: Tensor, forwards: int) -> Step:
        """A step of a batch in this layout, `board` (B, `width`) being the one before it."""
        device, columns, width = board.device, moment.tokens.shape[1], self.width + self.tail
        # Rows leave when they are done: whose they are is looked up anew in each step.
        number = on_device([self.number[id(answer)] for answer in moment.answers], device)
        shift = on_device([self.shift(answer.request) for answer in moment.answers], device)
        # Columns past a row's end come round to the padding on its left, which they have the token of.
        column = (torch.arange(columns, device=device) + shift[:, None]) % width
        places = (number[:, None] * width + column).flatten()
        # Of the board only these rows change; those that have finished keep what they had.
        whole = F.pad(board, (0, self.tail)).view(-1).index_copy(0, places, moment.tokens.flatten())
        asked = places[moment.asked]
        if self.tail:  # which of them are shown the host does not know, and need not wait for
            column = asked % width
            asked = torch.where(column < self.width, asked // width * self.width + column, board.numel())
        return Step(
            tokens=whole.view(len(board), width)[:, : self.width].contiguous(),
            before=board,
            mask_id=moment.answers[0].request.mask_id,
            forwards=forwards,
            rows=number,
            # A block may reach into the tail, which is not shown.
            bounds=(torch.stack([moment.first, moment.last], 1) + shift[:, None]).clamp(max=self.width),
            asked=asked,
            proposals=moment.proposals,
            confidences=moment.confidences,
        )
