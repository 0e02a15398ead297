"""Bounds on log p(answer given prompt), which parts of an answer are masked for them, and whether greedy unmasking would
write it.

LLaDA's bound for an answer of n tokens (arXiv:2502.09992, equation 14) is the mean over k of 1..n, and over the
subsets M of k tokens, of n/k times the sum of log p(token) over M when M is masked. Every plan here is a weighted list
of subsets whose weighted sum has that mean (the stock one as nearly as its authors' rounding allows).

`confidence` is another score: the answer's own tokens are revealed one by one, each time the one that has the highest
probability of those still masked, and their log-probabilities when they were revealed are added up. No number is drawn, and
an answer of n tokens takes n forwards. So does iLLaDA's evaluation (eval_illada.py of ML-GSAI/LLaDA@9182493).

Of a model that attends by blocks, log p is the sum over the blocks that the answer lies in: each has a plan and a bound of
its own, given the prompt and the clean blocks before it. Its last block is a whole one, masked behind the answer, as when
it is sampled.

Shapes: R rows of a forward, L positions of a row, n answer tokens, S samples.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise, product
from math import comb
from typing import NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llada_core.modeling.attention import BlockCausal
from llada_core.modeling.predictor import (
    MaskPredictor,
    require_in_vocabulary,
    require_length,
    require_no_mask,
)
from llada_core.sampling.cached import BlockDenoiser
from llada_core.sampling.denoiser import GuidedDenoiser, PlainDenoiser
from llada_core.sampling.params import SamplingParams
from llada_core.sampling.query import Query
from llada_core.sampling.sampler import stream_infill
from llada_core.settings import Estimator

ESTIMATORS: tuple[Estimator, ...] = get_args(Estimator)
CONFIDENCE: Estimator = "confidence"  # no estimate of the bound, as the others are: scores in its own right
ENUMERATED = 7  # 2^7 - 1 = 127 subsets, fewer than the usual 128 samples
LEAN = 0.75  # best of 0 to 1.2 on a trained model with 4 to 64 samples: half the error of equal widths
STOCK_BATCH = 16  # samples that share one lattice of counts, the batch size of LLaDA's evaluation


@dataclass(frozen=True)
class Plan:
    """S samples of an answer of n tokens: `masks` (S, n) bool; log-probabilities under mask s count `weights[s]` (S,)."""

    masks: NDArray[np.bool_]
    weights: NDArray[np.float64]


def plan(estimator: Estimator, length: int, samples: int, rng: np.random.Generator) -> Plan:
    """The plan for an answer of `length` tokens; "auto" enumerates where that takes no more than `samples`."""
    if estimator == "auto":
        # One token has one subset, which is exact with a single sample whatever was asked for.
        estimator = "exact" if length <= ENUMERATED and (length == 1 or 2**length - 1 <= samples) else "antithetic"
    if estimator == "exact":
        return enumerated(length)
    return stock(length, samples, rng) if estimator == "stock" else antithetic(length, samples, rng)


def spans(prompt: int, length: int, block: int | None) -> list[tuple[int, int]]:
    """The stretches of an answer of `length` tokens behind `prompt` ones that lie in one block each; None: there are none."""
    inner = () if block is None else range(block - prompt % block, length, block)
    edges = [0, *inner, length]
    return list(pairwise(edges))


def enumerated(length: int) -> Plan:
    """Every subset: no variance."""
    if length > 2 * ENUMERATED:
        raise ValueError(f"an answer of {length} tokens has 2^{length} subsets; use estimator 'antithetic' or 'auto'")
    masks = np.array(list(product([False, True], repeat=length))[1:], dtype=bool)  # but the empty one
    # n/k times the chance of this subset: 1/n that k is drawn, 1/C(n, k) that these k tokens are.
    weights = np.array([1 / (k * comb(length, k)) for k in masks.sum(1).tolist()])
    return Plan(masks, weights)


def stock(length: int, samples: int, rng: np.random.Generator) -> Plan:
    """LLaDA's own: counts on a lattice with a random start, positions at random without replacement."""
    # The lattice starts anew for every batch of the evaluation, so its variance depends on that batch size.
    counts: list[int] = []
    while len(counts) < samples:
        batch = min(STOCK_BATCH, samples - len(counts))
        counts += lattice(batch, length, int(rng.integers(1, length + 1)))
    order = rng.random((samples, length)).argsort(1).argsort(1)  # the rank of each position in a random order
    return _weighted(order < np.array(counts)[:, None])


def lattice(batch: int, length: int, start: int) -> list[int]:
    """The counts of one batch of LLaDA's evaluation, its float32 rounding included."""
    raw = torch.linspace(float(start), start + (batch - 1) * (length / batch), steps=batch)
    return [(int(x) - 1) % length + 1 for x in raw.round().tolist()]


def antithetic(length: int, samples: int, rng: np.random.Generator) -> Plan:
    """Samples that complement each other: each masks the next tokens of a random order, a new order follows a used-up one.

    So all tokens count almost alike in every estimate. The sizes 1..n are cut into strata, one sample each, that are
    narrower among the small sizes (`LEAN`), as n/k makes those the noisy ones; a sample counts as much as its stratum
    is wide. Answers that share `rng`'s state share orders and, as far as their lengths allow, sizes, so that differences
    between them vary less (common random numbers).
    """
    # Why masks that complement each other: drawn independently, the masks of one estimate hold some tokens oftener than
    # others by chance, and an estimate that holds the hard ones oftener is off. Where masks take turns, what one lacks
    # the next ones hold, and that error is gone; what stays is how a token depends on what is masked beside it.
    density = np.arange(1, length + 1) ** -LEAN
    share = np.concatenate([[0.0], density.cumsum() / density.sum()])
    edges = np.interp(np.linspace(0, 1, samples + 1), share, np.arange(length + 1.0))
    # Stratum s covers the sizes in (edges[s], edges[s + 1]]; the same offset in all strata is unbiased, as each size is
    # hit with a chance in proportion to 1 / width, which the weight takes out again.
    widths = np.diff(edges)
    sizes = np.floor(edges[:-1] + rng.random() * widths).astype(int).clip(max=length - 1) + 1
    # One row of numbers per token, so that a longer answer has the orders of a shorter one with tokens added.
    orders = rng.random((length, samples + 1)).T.argsort(1)
    masks = np.zeros((samples, length), dtype=bool)
    circle, used = orders[0], 0
    for sample, (mask, size) in enumerate(zip(masks, sizes.tolist(), strict=True)):
        mask[circle[used : used + size]] = True
        used += size
        if used > length:  # the sample goes on in a new order, which begins with what it does not hold yet
            order = orders[sample + 1]
            held = mask[order]
            circle, used = np.concatenate([order[~held], order[held]]), used - length
            mask[circle[:used]] = True
    return Plan(masks, widths / sizes)


def _weighted(masks: NDArray[np.bool_]) -> Plan:
    samples, length = masks.shape
    return Plan(masks, length / masks.sum(1) / samples)


Ids = Sequence[int] | Tensor
Pair = tuple[Ids, Ids]
Array = NDArray[np.int64]


def log_likelihood(  # noqa: PLR0913 - the public face
    model: MaskPredictor,
    prompt_ids: Ids,
    answer_ids: Ids,
    *,
    samples: int = 128,
    cfg_scale: float = 0.0,
    seed: int = 0,
    estimator: Estimator = "auto",
) -> float:
    """log p(answer | prompt) in nats; see `log_likelihoods`."""
    pairs = [(prompt_ids, answer_ids)]
    return log_likelihoods(model, pairs, samples=samples, cfg_scale=cfg_scale, seed=seed, estimator=estimator)[0]


def log_likelihoods(  # noqa: PLR0913 - the public face
    model: MaskPredictor,
    pairs: Sequence[Pair],
    *,
    samples: int = 128,
    cfg_scale: float = 0.0,
    seed: int = 0,
    estimator: Estimator = "auto",
    batch_tokens: int = 8192,
    framed: bool = False,
) -> list[float]:
    """A lower bound on log p(answer | prompt), in nats, of each (prompt ids, answer ids): LLaDA's estimate of it.

    samples: masked copies of each answer, of a model that attends by blocks of each block of it. estimator: "stock" is LLaDA's; "antithetic" needs fewer for the same error;
    "exact" enumerates; "auto" enumerates answers of up to 7 tokens where that takes no more, and is antithetic
    otherwise. "confidence" is no bound: the sum of log p of the answer's tokens, revealed one by one in the order of the
    model's confidence in them. cfg_scale: guidance, as in sampling. The random numbers of a pair depend on `seed` and its prompt, so
    that the options of a question are compared under the same ones and nothing depends on what shares the call.
    batch_tokens: tokens per forward. framed: BOS stands before each prompt and EOS behind each answer, neither of them scored
    (iLLaDA's evaluation: add_bos_token, padd_eos). Raises `ValueError` for an empty answer, ids outside the vocabulary, a
    MASK, a pair longer than the model's sequences, or a frame for a model without BOS or one that attends by blocks.
    """
    return Likelihood(model, samples, cfg_scale, seed, estimator, batch_tokens, framed).scores(pairs)


class _Part(NamedTuple):
    """An answer, or the stretch of it that lies in one block, and all that it is scored given."""

    number: int  # of its pair
    place: int  # among the parts of its pair
    prompt: int  # length
    known: Array  # ids of the prompt and of the earlier parts
    answer: Array


class _Read(NamedTuple):
    """Which log-probabilities of a canvas count for what."""

    number: int
    row: int
    columns: Array
    targets: Array
    weight: float


@dataclass
class _Batch:
    """Canvases for one forward and what is read from them."""

    rows: list[Array] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)
    numbers: dict[tuple[int, bytes], int] = field(default_factory=dict)
    reads: list[_Read] = field(default_factory=list)

    def tensors(self, pad_id: int, device: torch.device) -> tuple[Tensor, Tensor | None, Tensor]:
        """Tokens (R, L), visible (R, L) or None, and which tokens are prompt (R, L)."""
        width = max(map(len, self.rows))
        tokens = np.full((len(self.rows), width), pad_id, dtype=np.int64)
        for i, row in enumerate(self.rows):
            tokens[i, : len(row)] = row
        column, lengths = np.arange(width), np.array([len(row) for row in self.rows])
        visible = torch.from_numpy(column < lengths[:, None]).to(device)
        prompt = torch.from_numpy(column < np.array(self.prompts)[:, None]).to(device)
        return torch.from_numpy(tokens).to(device), None if (lengths == width).all() else visible, prompt


_Take = Callable[
    [_Batch, Tensor], None
]  # what is done with a computed batch and the log-probabilities of all its reads


@dataclass
class Likelihood:
    """Scores pairs; counts the `forwards` of the model and the masked answers in them (`num_samples`). Fields as in
    `log_likelihoods`.
    """

    model: MaskPredictor
    samples: int = 128
    cfg_scale: float = 0.0
    seed: int = 0
    estimator: Estimator = "auto"
    batch_tokens: int = 8192
    framed: bool = False
    turn: AbstractContextManager[object] = field(default_factory=nullcontext)  # entered for each forward, and left
    forwards: int = field(default=0, init=False)
    num_samples: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.estimator not in ESTIMATORS:
            raise ValueError(f"estimator {self.estimator!r} is none of {', '.join(ESTIMATORS)}")
        if self.samples < 1 or self.batch_tokens < 1 or not 0 <= self.cfg_scale < np.inf:
            raise ValueError(
                f"samples {self.samples} and batch_tokens {self.batch_tokens} must be 1 or more,"
                f" cfg_scale {self.cfg_scale} a number of 0 or more"
            )
        if self.framed and (self.model.special_tokens.bos_id is None or self.model.block_length is not None):
            raise ValueError(
                "framed: for a model with a BOS token whose positions all see each other; leave framed out"
            )

    def scores(self, pairs: Sequence[Pair]) -> list[float]:
        """Log-likelihoods in the order of `pairs`."""
        arrays = [checked(self.model, pair, number) for number, pair in enumerate(pairs)]
        if self.framed:
            require_length(self.model, max((len(p) + len(a) + 2 for p, a in arrays), default=0), "shorten the prompt")
            arrays = [(np.concatenate([[self.model.special_tokens.bos_id], p]), a) for p, a in arrays]
        if self.estimator == CONFIDENCE:
            return self._revealed(arrays)
        totals = torch.zeros(len(arrays), dtype=torch.float64, device=self.model.device)

        def add(batch: _Batch, log_p: Tensor) -> None:
            counts = [len(read.columns) for read in batch.reads]
            weights = np.repeat([read.weight for read in batch.reads], counts)
            numbers = np.repeat([read.number for read in batch.reads], counts)
            totals.index_add_(
                0, torch.from_numpy(numbers).to(log_p.device), log_p * torch.from_numpy(weights).to(log_p.device)
            )

        batch = _Batch()
        for part in self._parts(arrays):
            drawn = plan(self.estimator, len(part.answer), self.samples, self._rng(*arrays[part.number], part.place))
            batch = self._collect(batch, part, part.number, drawn, add)
        self._flush(batch, add)
        return totals.tolist()

    def _revealed(self, arrays: list[tuple[Array, Array]]) -> list[float]:
        """The score by confidence of each pair: a round reveals one token of every part that has a masked one."""
        parts, totals = list(self._parts(arrays)), [0.0] * len(arrays)
        masks = [np.ones(len(part.answer), dtype=bool) for part in parts]

        def reveal(batch: _Batch, log_p: Tensor) -> None:
            for read, found in zip(
                batch.reads, log_p.cpu().split([len(read.columns) for read in batch.reads]), strict=True
            ):
                part, best = parts[read.number], int(found.argmax())
                masks[read.number][read.columns[best] - len(part.known)] = False
                totals[part.number] += float(found[best])

        while any(mask.any() for mask in masks):
            batch = _Batch()
            for number, (part, mask) in enumerate(zip(parts, masks, strict=True)):
                if mask.any():
                    batch = self._collect(batch, part, number, Plan(mask[None].copy(), np.ones(1)), reveal)
            self._flush(batch, reveal)
        return totals

    def _parts(self, arrays: list[tuple[Array, Array]]) -> Iterator[_Part]:
        """The answers, or each block of them; those of like length share a forward, so that little of it is padding."""
        for number in sorted(range(len(arrays)), key=lambda i: sum(map(len, arrays[i]))):
            prompt, answer = arrays[number]
            for place, (first, last) in enumerate(spans(len(prompt), len(answer), self.model.block_length)):
                known = np.concatenate([prompt, answer[:first]])
                yield _Part(number, place, len(prompt), known, answer[first:last])

    def _rng(self, prompt: Array, answer: Array, part: int) -> np.random.Generator:
        # The stock estimator draws for each option anew.
        text = prompt.tobytes() + (b"|" + answer.tobytes() if self.estimator == "stock" else b"")
        key = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()) ^ self.seed
        return np.random.default_rng(key + (part << 64))

    def _collect(self, batch: _Batch, part: _Part, number: int, drawn: Plan, take: _Take) -> _Batch:
        """The batch with the canvases of a part, to be read as `number`; full ones were computed and given to `take`."""
        known, answer = part.known, part.answer
        mask_id, length = self.model.special_tokens.mask_id, len(known) + len(answer)
        behind = min(-length % (self.model.block_length or 1), self.model.max_length - length)
        tail = np.array([self.model.special_tokens.eos_id]) if self.framed else np.full(behind, mask_id)
        length += len(tail)
        masked = np.where(drawn.masks, mask_id, answer)
        for mask, noisy, weight in zip(drawn.masks, masked, drawn.weights.tolist(), strict=True):
            row = np.concatenate([known, noisy, tail])
            # Equal canvases are computed once and read as often as they were drawn. Where the prompt ends is part of
            # the key, as guidance hides it.
            key = (part.prompt, row.tobytes())
            if key not in batch.numbers:
                if (len(batch.rows) + 1) * length > self.batch_tokens and batch.rows:
                    self._flush(batch, take)
                    batch = _Batch()
                batch.numbers[key] = len(batch.rows)
                batch.rows.append(row)
                batch.prompts.append(part.prompt)
            columns = mask.nonzero()[0]
            batch.reads.append(_Read(number, batch.numbers[key], columns + len(known), answer[columns], weight))
        return batch

    def _flush(self, batch: _Batch, take: _Take) -> None:
        if not batch.rows:
            return
        device, width = self.model.device, max(map(len, batch.rows))

        positions = np.concatenate([read.row * width + read.columns for read in batch.reads])
        targets = np.concatenate([read.targets for read in batch.reads])
        with self.turn:
            found = self._log_p(batch, torch.from_numpy(positions).to(device), torch.from_numpy(targets).to(device))
            take(batch, found.double())
        self.forwards += 1
        self.num_samples += len(batch.rows)

    @torch.no_grad()
    def _log_p(self, batch: _Batch, positions: Tensor, targets: Tensor) -> Tensor:
        special = self.model.special_tokens
        tokens, visible, prompt = batch.tensors(special.pad_id, self.model.device)
        length = self.model.block_length
        if not self.cfg_scale:
            how = {} if length is None else {"block_causal": BlockCausal(length)}
            return -self.model(tokens, visible, positions=positions, targets=targets, **how).nll
        inner = PlainDenoiser(self.model) if length is None else BlockDenoiser(self.model, length, cached=False)
        guided = GuidedDenoiser(inner, self.cfg_scale)
        rows, last = len(tokens), tokens.shape[1] - 1  # no row is in a block of its own: all of them are fed whole
        first = torch.full((rows,), last, device=tokens.device)
        query = Query(tokens, visible, prompt, positions, special.mask_id, first, [last] * rows, [True] * rows)
        logits = guided.logits(query)
        return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


def greedy_matches(
    model: MaskPredictor, pairs: Sequence[Pair], *, cfg_scale: float = 0.0, batch_tokens: int = 8192
) -> list[bool]:
    """Would each answer be written, token for token, if the surest token of its masks were committed at each step?"""
    arrays = [checked(model, pair, number) for number, pair in enumerate(pairs)]
    order = sorted(range(len(arrays)), key=lambda i: sum(map(len, arrays[i])))
    result, special = [False] * len(arrays), model.special_tokens
    while order:
        longest = sum(map(len, arrays[order[-1]]))
        chunk, order = order[-max(1, batch_tokens // longest) :], order[: -max(1, batch_tokens // longest)]
        wanted = torch.full((len(chunk), longest), special.pad_id)
        templates = []
        for row, (prompt, answer) in zip(wanted, (arrays[i] for i in chunk), strict=True):
            row[longest - len(prompt) - len(answer) :] = torch.from_numpy(np.concatenate([prompt, answer]))
            templates.append(torch.from_numpy(np.concatenate([prompt, np.full_like(answer, special.mask_id)])))
        length = model.block_length or longest
        params = SamplingParams(max_new_tokens=1, block_length=length, steps=longest, cfg_scale=cfg_scale)
        for step in stream_infill(model, templates, params):
            matches = ((step.tokens == wanted.to(step.tokens.device)) | step.open).all(1)
            if not matches.any():  # no need to see the rest
                break
        for i, match in zip(chunk, matches.tolist(), strict=True):
            result[i] = match
    return result


def checked(model: MaskPredictor, pair: Pair, number: int) -> tuple[Array, Array]:
    """A pair as arrays; `ValueError` if the model cannot score it."""
    prompt, answer = (torch.as_tensor(ids, dtype=torch.long).cpu().reshape(-1) for ids in pair)
    if not len(answer):
        raise ValueError(f"the answer of pair {number} is empty; its likelihood is that of no token")
    for what, ids in ((f"the prompt of pair {number}", prompt), (f"the answer of pair {number}", answer)):
        require_in_vocabulary(model, ids, what)
        require_no_mask(model, ids, what, "a likelihood is that of a text without masks")
    require_length(model, len(prompt) + len(answer), "shorten the prompt")
    return prompt.numpy(), answer.numpy()
