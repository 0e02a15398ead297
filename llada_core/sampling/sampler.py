"""The one loop that fills a canvas (ask for logits, propose, score, commit), and its public face: generate, infill,
stream. Knows token ids, not text; how logits are got, how sure we are and what is committed are values.

Each row is in the block of its first open position; a finished row leaves the batch. Shapes as in `canvas`.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from llada_core.modeling.predictor import MaskPredictor, require_length
from llada_core.sampling import canvas as checks
from llada_core.sampling.canvas import Blocks, Canvas, CanvasRow, Step
from llada_core.sampling.denoiser import Denoiser, Query, denoiser_of
from llada_core.sampling.params import SamplingParams
from llada_core.sampling.proposals import Proposer, RowNoise
from llada_core.sampling.unmask import Rule, State, TransferSchedule, rule_of, schedule_of


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
    projection and changes nothing else. Without a `schedule` the rule alone says how much is committed.
    """

    denoiser: Denoiser
    proposer: Proposer
    rule: Rule
    noise: RowNoise
    block_length: int
    schedule: TransferSchedule | None = None
    stop: Stop | None = None
    look_ahead: bool = False

    @torch.no_grad()
    def run(self, canvas: Canvas) -> Iterator[Step]:
        """Commits every open position; yields after each step."""
        board, state = canvas.shown(), State()
        # A rule sees windows of one width from the first step to the last, though the canvas sheds columns.
        width = min(self.block_length, canvas.tokens.shape[1])
        number, blocks = torch.full_like(canvas.number, -1), None
        while True:
            # Within a block one transfer a step tells the host how many positions are open; where a row has moved on,
            # one more tells where it is.
            blocks = (blocks and blocks.after(canvas)) or Blocks.of(canvas, self.block_length, width, number)
            kept = [row for row, count in enumerate(blocks.counts) if count]
            if not kept:
                return
            if len(kept) < len(blocks.counts):
                index = torch.tensor(kept, device=number.device)
                canvas, number = canvas.rows(kept), number[index]
                state = {name: value[index] for name, value in state.items()}
                self.denoiser.keep(kept, canvas.tokens.shape[1])
                self.noise.keep(kept)
                blocks = None
                continue
            canvas, state, step = self._step(canvas, state, board, blocks)
            board, number = step.tokens, blocks.number
            yield step

    def _step(self, canvas: Canvas, state: State, board: Tensor, blocks: Blocks) -> tuple[Canvas, State, Step]:
        # Indices into the flattened windows and the flattened canvas, in the same order. Their number is known to the
        # host, so that the device need not be waited for.
        slots = torch.nonzero_static(blocks.open.flatten(), size=sum(blocks.counts))[:, 0]
        mine = asked = blocks.places.flatten()[slots]
        if self.look_ahead:
            asked = torch.cat([mine, canvas.open.flatten().index_fill(0, mine, value=False).nonzero()[:, 0]])
        logits = self.denoiser.logits(Query.of(canvas, blocks, asked))
        proposals, confidence = self.proposer.propose(logits[: len(mine)], self.noise, blocks.counts)

        if any(blocks.entered):
            state = {name: zero_where(blocks.fresh, value) for name, value in state.items()}
        if self.schedule is not None:
            state = self.schedule.begin(state, canvas, blocks, self.noise)
        scores = confidence.laid_out(blocks.open.shape, slots)
        commit, back, state = self.rule(scores, blocks.open, state)

        tokens = canvas.tokens.clone()
        tokens.view(-1)[mine] = torch.where(commit.view(-1)[slots], proposals, canvas.mask_id)
        if back is not None:
            tokens = tokens.masked_fill(blocks.on_canvas(back, canvas), canvas.mask_id)
        if self.stop is not None:
            tokens = self.stop.close(tokens, canvas)
        canvas = canvas.written(tokens)

        values = confidence.value
        if self.look_ahead:
            beyond, sure = self.proposer.propose(logits[len(mine) :], None, [])
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
        return canvas, state, step


def zero_where(rows: Tensor, value: Tensor) -> Tensor:
    """`value` (A, ...), zero in those `rows` (A,) bool."""
    return value.masked_fill(rows.view(-1, *[1] * (value.dim() - 1)), 0)


Prompts = Tensor | Sequence[Sequence[int]] | Sequence[Tensor]


@dataclass(frozen=True)
class Generation:
    """The outcome for a batch. `tokens` (B, T) int64, each row padded on the left if it is short; `lengths` (B,) of
    what was asked for: the new tokens of a prompt, all tokens of a template; `forwards` of the model and the number
    of tokens `fed` to it in them.
    """

    tokens: Tensor
    forwards: int
    fed: int
    lengths: tuple[int, ...]

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
) -> Generation:
    """Writes `params.max_new_tokens` tokens after each prompt.

    prompt_ids: (B, P) int64, or a list of B prompts of any lengths. attention_mask: (B, P), 0 where a prompt tensor is
    padding. pinned: answer position -> token id that stands there from the start. The result's `tokens` are (B, P +
    max_new_tokens), P being the longest prompt; after a stop the rest is EOS. An empty prompt is written after BOS.
    The same seed gives the same answer to a prompt whatever shares its batch; equal prompts in one batch get answers
    of their own. Raises `ValueError` for ids outside the vocabulary, a MASK in a prompt (that is a template:
    `infill`), a sequence longer than the model's, and settings that do not fit each other or the model.
    """
    prompts, width = checks.prompts(model, prompt_ids, attention_mask)
    sampler, canvas = _sampler_for_prompts(model, prompts, width, params, pinned, look_ahead=False)
    with evaluating(model):
        tokens = _last(sampler, canvas)
    last = tokens.shape[1] - model.ends_with_eos
    tokens = tokens[:, last - width - params.max_new_tokens : last].contiguous()
    if isinstance(prompt_ids, Tensor):
        tokens[:, :width] = prompt_ids  # padding as it was given
    lengths = (params.max_new_tokens,) * len(tokens)
    return Generation(tokens, sampler.denoiser.forwards, sampler.denoiser.fed, lengths)


def stream(
    model: MaskPredictor,
    prompt_ids: Prompts,
    params: SamplingParams,
    *,
    attention_mask: Tensor | None = None,
    pinned: Mapping[int, int] | None = None,
    look_ahead: bool = False,
) -> Iterator[Step]:
    """`generate`, yielding every step. With `look_ahead` each step also holds proposals for open positions beyond the
    block (they cost their share of the vocabulary projection; a cached forward leaves them out).
    """
    prompts, width = checks.prompts(model, prompt_ids, attention_mask)
    sampler, canvas = _sampler_for_prompts(model, prompts, width, params, pinned, look_ahead=look_ahead)
    return _stream(model, sampler, canvas)


def infill(model: MaskPredictor, template_ids: Prompts, params: SamplingParams) -> Generation:
    """Fills every MASK of each template, in blocks of `params.block_length` counted from the template's first token.

    template_ids: (B, L) int64 or a list of B templates of any lengths. `params.max_new_tokens` is not used. The
    result's `answers` are the filled templates. Raises as `generate` does, and if a template has nothing to fill.
    """
    sampler, canvas = _sampler_for_templates(model, template_ids, params, look_ahead=False)
    lengths = tuple(canvas.size.tolist())
    with evaluating(model):
        tokens = _last(sampler, canvas)
    return Generation(tokens, sampler.denoiser.forwards, sampler.denoiser.fed, lengths)


def stream_infill(
    model: MaskPredictor, template_ids: Prompts, params: SamplingParams, *, look_ahead: bool = False
) -> Iterator[Step]:
    """`infill`, yielding every step; `look_ahead` as in `stream`."""
    return _stream(model, *_sampler_for_templates(model, template_ids, params, look_ahead=look_ahead))


@contextmanager
def evaluating(model: MaskPredictor) -> Iterator[None]:
    """The model without dropout, and afterwards as it was."""
    if not model.training:  # telling every layer again would cost a small model as much as half a step
        yield
        return
    model.eval()
    try:
        yield
    finally:
        model.train()


def _stream(model: MaskPredictor, sampler: Sampler, canvas: Canvas) -> Iterator[Step]:
    with evaluating(model):
        yield from sampler.run(canvas)


def _last(sampler: Sampler, canvas: Canvas) -> Tensor:
    tokens = canvas.tokens
    for step in sampler.run(canvas):
        tokens = step.tokens
    return tokens


def _sampler_for_prompts(
    model: MaskPredictor,
    prompts: list[checks.PromptRow],
    width: int,
    params: SamplingParams,
    pinned: Mapping[int, int] | None,
    *,
    look_ahead: bool,
) -> tuple[Sampler, Canvas]:
    checks.answer_settings(params)
    special, new = model.special_tokens, params.max_new_tokens
    blank = torch.full((new,), special.mask_id, device=model.device)
    for position, token in checks.pinned(model, pinned or {}, new).items():
        blank[position] = token
    opening = torch.tensor([i for i in (special.bos_id,) if i is not None], dtype=torch.long, device=model.device)
    closing = torch.tensor([special.eos_id] * model.ends_with_eos, dtype=torch.long, device=model.device)
    rows = []
    for prompt in prompts:
        ids = prompt.ids if len(prompt.ids) else opening
        rows.append(CanvasRow(torch.cat([ids, blank, closing]), len(ids), len(ids) + new, prompt.visible))
    width += new + len(closing)
    return _sampler(model, rows, params, [p.ids for p in prompts], width=width, look_ahead=look_ahead)


def _sampler_for_templates(
    model: MaskPredictor, template_ids: Prompts, params: SamplingParams, *, look_ahead: bool
) -> tuple[Sampler, Canvas]:
    checks.template_settings(params)
    templates = checks.templates(model, template_ids)
    rows = [CanvasRow(template, 0, len(template)) for template in templates]
    return _sampler(model, rows, params, templates, width=0, look_ahead=look_ahead)


def _sampler(
    model: MaskPredictor,
    rows: list[CanvasRow],
    params: SamplingParams,
    prompts: list[Tensor],
    *,
    width: int,
    look_ahead: bool,
) -> tuple[Sampler, Canvas]:
    require_length(model, max(len(row.tokens) for row in rows), "shorten the prompt or max_new_tokens")
    checks.token_settings(model, params)
    special, device = model.special_tokens, model.device
    canvas = Canvas.from_rows(rows, special, width=width, blind_keeps=params.cfg_keep_tokens)
    ends = torch.tensor(sorted(special.end_ids), device=device)
    sampler = Sampler(
        denoiser=denoiser_of(model, params),
        proposer=Proposer.of(params, special.mask_id, device),
        rule=rule_of(params),
        noise=RowNoise.of_prompts(prompts, params.seed, device),
        block_length=params.block_length,
        schedule=schedule_of(params),
        stop=Stop(ends, special.eos_id) if params.stop_at_eos else None,
        look_ahead=look_ahead and params.cache == "none",
    )
    return sampler, canvas
