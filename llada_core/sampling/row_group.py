"""Answers on their way, and the rows of a batch whose tokens are chosen by the same operations.

Shapes: R rows of a group, W positions of a block's window, P proposals, V vocabulary.
"""

from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from llada_core.modeling.predictor import MaskPredictor
from llada_core.sampling.canvas import Blocks, Step, padded, zero_where
from llada_core.sampling.proposals import Confidence, Proposer, RowNoise
from llada_core.sampling.query import on_device, seats
from llada_core.sampling.requests import Request
from llada_core.sampling.unmask import HELD, Rule, State, TransferSchedule, number_of, rule_of, schedule_of


@dataclass(eq=False)
class Answer:
    """What comes of a request. `tokens` (L,) int64 once it is finished, on the model's device; `forwards` it took part in.

    `steps`, if somebody watches it, those not taken yet; `shown` (1, L), the canvas after the last of them. `told`: an engine
    has told of all of them. `error`: why it will never be finished.
    """

    request: Request
    steps: deque[Step] | None = None
    tokens: Tensor | None = None
    forwards: int = 0
    finished: bool = False
    told: bool = False
    cancelled: bool = False
    error: BaseException | None = None
    at: int | None = None  # the number of the engine that writes it, where several share a queue
    shown: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.shown = self.request.tokens[None, : self.request.told]

    @property
    def over(self) -> bool:
        """Whether nothing more will come."""
        return self.told or self.cancelled or self.error is not None

    @property
    def ready(self) -> bool:
        """Of one that is watched: whether `take` has something to say, without a step to be made first."""
        return bool(self.steps) or self.over

    def take(self) -> Step | None:
        """The next step of one that is `ready`, None once there are no more; raises its `error`."""
        if self.steps:
            return self.steps.popleft()
        if self.error is not None:
            raise self.error
        return None


class RowGroup:
    """Rows of a batch whose tokens are chosen by the same operations: consecutive ones, with tensors of numbers."""

    def __init__(self, model: MaskPredictor, request: Request) -> None:
        self.rule_key, self.params, self.edits = request.rule_key, request.params, request.edits
        params = self.params
        self.device, self.answers = model.device, list[Answer]()
        self.proposer = Proposer.of(params, request.mask_id, model.device)
        self.schedule: TransferSchedule | None = schedule_of(params)
        self.noise = RowNoise(*on_device([], model.device).new_empty(2, 0))
        self.state: State = {}
        # A rule of one's own sees windows of one width from the first step to the last, whoever is beside it.
        self.own_width = min(params.block_length, model.max_length) if params.rule is not None else None
        self.rule: Rule = rule_of(params)
        self.warmth = self.steps = torch.empty(0)
        self.width = self.span = 0  # positions of its windows, and the most steps of a block

    def takes(self, request: Request) -> bool:
        """Whether a new row belongs here: never beside rows whose own rule remembers something already."""
        return request.rule_key == self.rule_key and not (self.own_width and self.state)

    def arrange(self, order: list[int], answers: list[Answer], *, spare: bool) -> None:
        """Its rows are these `answers` now: those that it had at `order`, -1 for new ones. `spare`: with room for more
        steps of a block, so that shapes seldom change.
        """
        self.answers = answers
        index = on_device(order, self.device)
        self.state = {name: padded(value, 1)[index] for name, value in self.state.items()}
        settings = [answer.request.params for answer in self.answers]
        keys = on_device([answer.request.key for answer in self.answers], self.device)
        # What a row has drawn goes with it, so that its numbers do not depend on who came and went.
        self.noise = RowNoise(keys, padded(self.noise.drawn, 1)[index])
        wide = torch.float32 if self.device.type == "mps" else torch.float64
        numbers = [(p.temperature, number_of(p)) for p in settings]
        # In float64 where the device has it: a threshold is compared as it was written, and 0.9 in float32 is another number.
        warmth, limit = torch.tensor(numbers, dtype=wide).to(self.device, non_blocking=True).T
        # One copy to the device for both, cut there.
        self.warmth = warmth[:, None]
        self.rule = rule_of(self.params, limit[:, None])
        steps = [answer.request.steps for answer in self.answers]
        self.steps, self.span = on_device(steps, self.device), seats(max(steps)) if spare else max(steps)
        self.width = self.own_width or max(answer.request.block for answer in self.answers)
        if self.schedule is not None:
            self.state = self.schedule.room(self.state, self.steps, self.span)

    @property
    def held(self) -> Tensor:
        """(R,) bool: rows that stay in their block though nothing is open in it."""
        rows = len(self.answers)
        return self.state[HELD] if HELD in self.state else torch.zeros(rows, dtype=torch.bool, device=self.device)

    def step(self, logits: Tensor, slots: Tensor, present: Tensor, blocks: Blocks, *, entered: bool) -> "Choice":
        """What `logits` (P, V) at `slots` (P,) of its windows (R, W) come to, where `present` (P,) stand now.

        `entered`: some row is in a new block.
        """
        is_open, width, draw, warmth = blocks.open, blocks.open.shape[1], None, None
        if self.proposer.draws:
            rows = slots // width
            draw, warmth = self.noise.draw(rows, _ranks(blocks).take(slots), blocks.count), self.warmth[rows]
            # Draws are counted by the row, so that its next numbers are those that it would draw alone.
            self.noise = self.noise.after(self.proposer.draws * blocks.count)
        proposals, confidence = self.proposer.propose(logits, draw, warmth)
        if entered:
            self._enter(blocks)
        scores = confidence.laid_out(blocks.asked, slots)
        if self.edits:  # what stands there already is no proposal
            scores = scores.nothing_where(_laid_out(proposals == present, slots, is_open.shape))
        # Windows are as wide as the widest group needs them; a rule is shown those of its own group.
        beyond = width - self.width
        if not beyond:
            commit, back, self.state = self.rule(scores, is_open, self.state)
            return Choice(proposals, confidence, commit, back)
        scores = Confidence(scores.value[:, : self.width], scores.key[:, : self.width])
        commit, back, self.state = self.rule(scores, is_open[:, : self.width], self.state)
        commit, back = F.pad(commit, (0, beyond)), None if back is None else F.pad(back, (0, beyond))
        return Choice(proposals, confidence, commit, back)

    def _enter(self, blocks: Blocks) -> None:
        """Rows in a new block remember nothing, and those of a schedule are told their quotas."""
        fresh = blocks.fresh
        self.state = {name: zero_where(fresh, value) for name, value in self.state.items()}
        if self.schedule is None:
            return
        material = blocks.count
        if self.schedule.draw:  # only rows that enter a block draw, so that a row's numbers do not depend on the others
            rows, width = blocks.open.shape
            every = torch.arange(rows, device=fresh.device).repeat_interleave(width, output_size=rows * width)
            uniforms = self.noise.draw(every, _ranks(blocks).flatten(), blocks.count).uniforms(1).view(rows, width)
            material = torch.where(blocks.open & fresh[:, None], uniforms, torch.nan)
            self.noise = self.noise.after(blocks.count * fresh)
        self.state = self.schedule.begin(self.state, material, self.steps, fresh)


@dataclass(frozen=True)
class Choice:
    """What a part proposes (P,) and how sure it is, and what of it is committed and taken back, (R, W) bool."""

    proposals: Tensor
    confidence: Confidence
    commit: Tensor
    back: Tensor | None


def _ranks(blocks: Blocks) -> Tensor:
    """(R, W): the number of each position among those of its row that are asked about.

    By this a position draws, and not by its column: a window is as wide as the widest row's.
    """
    return blocks.asked.cumsum(1) - 1


def _laid_out(flags: Tensor, slots: Tensor, shape: torch.Size) -> Tensor:
    """(P,) bool at flat places of windows (R, W); False elsewhere."""
    return torch.zeros(shape, dtype=torch.bool, device=flags.device).view(-1).index_copy(0, slots, flags).view(shape)
