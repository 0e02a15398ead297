"""The public face of sampling: prompts or templates in, filled sequences out; whole or step by step.

Checks what the caller gives and lays it out as a Canvas; the loop is in `sampler.py`. Knows token ids, not text.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from llada_core.modeling.predictor import MaskPredictor, require_length
from llada_core.sampling import canvas as checks
from llada_core.sampling.canvas import Canvas, Row, Step
from llada_core.sampling.denoiser import denoiser_of
from llada_core.sampling.params import SamplingParams
from llada_core.sampling.proposals import RowNoise
from llada_core.sampling.sampler import Sampler, Stop
from llada_core.sampling.unmask import Choice, pace_of

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
    prompts = checks.prompts(model, prompt_ids, attention_mask)
    sampler, canvas = _sampler_for_prompts(model, prompts, params, pinned, look_ahead=False)
    with evaluating(model):
        tokens = _last(sampler, canvas)
    last = tokens.shape[1] - model.closes
    tokens = tokens[:, last - prompts.width - params.max_new_tokens : last].contiguous()
    if isinstance(prompt_ids, Tensor):
        tokens[:, : prompts.width] = prompt_ids  # padding as it was given
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
    prompts = checks.prompts(model, prompt_ids, attention_mask)
    sampler, canvas = _sampler_for_prompts(model, prompts, params, pinned, look_ahead=look_ahead)
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
    prompts: checks.PromptBatch,
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
    closing = torch.tensor([special.eos_id] * model.closes, dtype=torch.long, device=model.device)
    rows = []
    for prompt in prompts.rows:
        ids = prompt.ids if len(prompt.ids) else opening
        rows.append(Row(torch.cat([ids, blank, closing]), len(ids), len(ids) + new, prompt.visible))
    width = prompts.width + new + len(closing)
    return _sampler(model, rows, params, [p.ids for p in prompts.rows], width=width, look_ahead=look_ahead)


def _sampler_for_templates(
    model: MaskPredictor, template_ids: Prompts, params: SamplingParams, *, look_ahead: bool
) -> tuple[Sampler, Canvas]:
    checks.template_settings(params)
    templates = checks.templates(model, template_ids)
    rows = [Row(template, 0, len(template)) for template in templates]
    return _sampler(model, rows, params, templates, width=0, look_ahead=look_ahead)


def _sampler(
    model: MaskPredictor,
    rows: list[Row],
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
        choice=Choice.of(params, special.mask_id, device),
        noise=RowNoise.of_prompts(prompts, params.seed, device),
        block_length=params.block_length,
        pace=pace_of(params, canvas),
        stop=Stop(ends, special.eos_id) if params.stop_at_eos else None,
        look_ahead=look_ahead and params.cache == "none",
    )
    return sampler, canvas
