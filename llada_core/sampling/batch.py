"""The one loop: rows that share forwards, each with settings of its own, joining and leaving between steps.

A step asks for logits of all rows, proposes and scores, commits, and tells the host once what it has to know: which rows
have finished, and where the others are. What a row gets does not depend on its neighbours: a sequence starts at column 0,
its random numbers are keyed by its request, and its numbers (thresholds, quotas, temperature) are its own.

Shapes: A active rows, T columns, W positions of a block's window, P proposals; R rows of one group.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from llada_core.modeling.predictor import MaskPredictor
from llada_core.sampling.canvas import Blocks, Canvas, padded
from llada_core.sampling.denoiser import denoiser_of
from llada_core.sampling.graph import Compiled, compiled, compiles, copied, keep_in_place
from llada_core.sampling.proposals import Confidence
from llada_core.sampling.query import Denoiser, Look, Query, columns, on_device, seats
from llada_core.sampling.requests import Request
from llada_core.sampling.row_group import Answer, Choice, RowGroup


@dataclass(frozen=True)
class StepQuery:
    """What a step asks for: `counts` positions of each row's window, and `beyond` open ones outside of it; and what a cache
    has to know of the rows, see `Query`. Without that, every row counts as one that may be in a new block.
    """

    counts: list[int]
    beyond: list[int]
    firsts: list[int] = field(default_factory=list)
    fresh: list[bool | None] = field(default_factory=list)


@dataclass(frozen=True)
class StepResult:
    """What a step did. A rows, T columns.

    `tokens` (A, T) after it; `first`, `last` (A,) columns of the blocks; `asked` (Q,) indices into the A*T flattened
    positions, row by row, first those of the blocks and then those beyond; `proposals` (Q,) and `confidences` (Q,).
    """

    tokens: Tensor
    first: Tensor
    last: Tensor
    asked: Tensor
    proposals: Tensor
    confidences: Tensor


@dataclass(frozen=True)
class StepOutcome:
    """Where a step leads: the canvas, its blocks, what the host has to know of them, and what was seen."""

    canvas: Canvas
    blocks: Blocks
    tally: Tensor
    seen: StepResult


@dataclass(frozen=True)
class BatchStep(StepResult):
    """One step of a batch, and the `answers` that took part, with `counts` and `beyond` of what was asked in each row.

    Where some answer is watched, `copied` holds on the CPU, flat: `tokens`, `first` and `last` in turn, `asked`,
    `proposals`, and the bits of `confidences`.
    """

    answers: list[Answer]
    counts: list[int]
    beyond: list[int]
    copied: Tensor | None


class RunningBatch:
    """Rows of one way to be asked. Between steps rows `join`, and those of answers that nobody wants `leave`.

    One that has become empty is not used again. `how` it is compiled: "off"; "graph", a step of equal shapes becomes one function,
    on a GPU one captured graph; "max" looks for the fastest kernels too, which takes minutes. What does not compile, and is as
    with "off": steps in which somebody is shown guesses beyond the block, rules of one's own, and experts in another dtype than bf16.
    """

    def __init__(self, model: MaskPredictor, request: Request, how: Compiled = "off") -> None:
        self.model, self.forward_key, self.rule_key, self.graph = model, request.forward_key, request.rule_key, None
        self.compiled = how != "off" and compiles(model)
        if self.compiled and request.params.rule is None:
            self.graph = compiled(self.advance, how)
        # Of a compiled step, rows in which nothing is written: shapes change with the number of seats alone.
        nothing = replace(request.params, steps=1)
        blank = Request(torch.full((1,), model.special_tokens.pad_id), 0, 1, nothing, 0, request.mask_id)
        self.blank = Answer(blank, finished=True)
        self.denoiser: Denoiser = denoiser_of(model, request.params)
        self.parts: list[RowGroup] = []
        self.canvas: Canvas | None = None
        self.ends = on_device(sorted(model.special_tokens.end_ids), model.device)
        self.tally: list[list[int]] = [[], [], [], []]  # on the host, of each row: see `Blocks.tally`
        self.blocks: Blocks | None = None
        # Those that are being written; and all, in their order: of a compiled step also those in which nothing is written.
        self.answers: list[Answer] = []
        self.rows: list[Answer] = []
        # If any row ends at an end token: (A, T) bool, where that may stand; and the columns (T,).
        self.ending: Tensor | None = None
        self.columns = on_device([], model.device)
        # (A,) bool, if any row does: those that edit, those that finish their blocks before they end.
        self.edits: Tensor | None = None
        self.waits: Tensor | None = None
        self.numbers = on_device([], model.device)  # of the block that each row was in, -1 before its first

    def takes(self, request: Request) -> bool:
        """Whether a request can join: it shares forwards, and a compiled step as well where there is one."""
        if request.forward_key != self.forward_key or (self.graph is None) != (
            request.params.rule is not None or not self.compiled
        ):
            return False
        # One group in a compiled step: several would make a function for each mixture of rules.
        return self.graph is None or request.rule_key == self.rule_key

    def join(self, answers: Iterable[Answer]) -> None:
        """New rows, from the next step on."""
        added = list(answers)
        if not added:
            return
        of_part: dict[int, list[Answer]] = {}
        for answer in added:
            # Rows of one group stand together, so that each group's choice is a slice and not a gather.
            number = next((i for i, part in enumerate(self.parts) if part.takes(answer.request)), len(self.parts))
            if number == len(self.parts):
                self.parts.append(RowGroup(self.model, answer.request))
            of_part.setdefault(number, []).append(answer)
        if self.graph is None:
            self._rearrange([part.answers + of_part.get(i, []) for i, part in enumerate(self.parts)], added)
        else:
            self._rearrange([self._seated(self.answers, added)], [*added, self.blank])

    def leave(self, gone: Iterable[Answer]) -> None:
        """These rows go on no longer; what they had written is in their answers. Of the others few move, or none."""
        away = {id(answer) for answer in gone}
        staying = [answer for answer in self.answers if id(answer) not in away]
        if len(staying) == len(self.answers):
            return
        if not staying:
            self.parts, self.rows, self.answers = [], [], []
        elif self.graph is None:
            self._rearrange([without(part.answers, away) for part in self.parts], [])
        else:
            self._rearrange([self._seated(staying, [])], [self.blank])

    def _seated(self, staying: list[Answer], added: list[Answer]) -> list[Answer]:
        """The rows of a compiled step: who stays keeps the place, unless there are four times as many as are wanted."""
        old, wanted, ids = self.rows, seats(len(staying) + len(added)), {id(answer) for answer in staying}
        # Who stays keeps the place, since a move costs a copy of the row's cache; and not sooner than at a quarter, or each
        # row that comes and goes at a power of two would move all others.
        if 4 * wanted <= len(old):
            old = staying
        vacant, coming = [self.blank] * (max(wanted, len(old)) - len(old)), iter(added)
        return [a if id(a) in ids else next(coming, self.blank) for a in old + vacant]

    def _rearrange(self, rows: list[list[Answer]], added: list[Answer]) -> None:
        """These are each part's rows now: some that it had, and `added` ones."""
        old = self.rows
        place = {id(answer): i for i, answer in enumerate(old + added)}
        # By identity: equal requests are answers of their own.
        order = [place[id(answer)] for own in rows for answer in own]
        both = [(part, own) for part, own in zip(self.parts, rows, strict=True) if own]
        self.parts, self.rows = [part for part, _ in both], [answer for _, own in both for answer in own]
        self.answers = [answer for answer in self.rows if answer is not self.blank]
        for part, own in both:
            mine = {id(answer): i for i, answer in enumerate(part.answers)}
            part.arrange([mine.get(id(answer), -1) for answer in own], own, spare=self.graph is not None)
        canvas = self.canvas
        if added:
            fresh = Canvas.of([answer.request for answer in added], self.model.special_tokens, self.model.device)
            canvas = fresh if canvas is None else canvas.joined(fresh)
            opening = ((n, 1, first, left) for n, first, left in (answer.request.opening for answer in added))
            for kept, value in zip(self.tally, zip(*opening, strict=True), strict=True):
                kept.extend(value)
            self.numbers = padded(self.numbers, len(added), -1)
        assert canvas is not None
        self.canvas = self._laid_out(canvas, order, len(old))
        self.tally = [[values[i] for i in order] for values in self.tally]
        self.numbers = self.numbers[on_device(order, self.numbers.device)]
        # A cache keeps nothing of a row in which nothing is written.
        kept_at = [
            i if i < len(old) and answer is not self.blank else -1 for i, answer in zip(order, self.rows, strict=True)
        ]
        self.denoiser.arrange(kept_at, self.canvas.tokens.shape[1])
        requests = [answer.request for answer in self.rows]
        stops = self._if_any([request.params.stop_at_eos for request in requests])
        # What stays as long as the rows do is made here, not in each step: at one row and a small model operators of
        # torch, however small, are a good part of a step.
        self.ending = None if stops is None else self.canvas.answer & stops[:, None]
        self.columns = torch.arange(self.canvas.tokens.shape[1], device=self.canvas.tokens.device)
        self.edits = self._if_any([request.edits for request in requests])
        self.waits = self._if_any([request.edits or request.params.finish_block for request in requests])
        self.blocks = None

    def _if_any(self, rows: list[bool]) -> Tensor | None:
        return on_device(rows, self.model.device, torch.bool) if any(rows) else None

    def _laid_out(self, canvas: Canvas, order: list[int], before: int) -> Canvas:
        """The rows of `canvas` in this order, as narrow as they are; for a compiled step of a width that others have too,
        and which shrinks only with the number of rows, of which there were `before`.
        """
        width = max(canvas.sizes[i] for i in order)
        if self.graph is None:
            # Rows that have just come into an empty batch lie so already: nothing is copied.
            same = width == canvas.tokens.shape[1] and order == list(range(len(canvas.sizes)))
            return canvas if same else canvas.rows(order, width)
        least = 0 if self.canvas is None or len(order) < before else self.canvas.tokens.shape[1]
        return replace(canvas.rows(order, max(columns(width), least)), ragged=True)

    @torch.no_grad()
    def step(self) -> BatchStep:
        """Commits something in every row; those that are done leave, their answers finished."""
        assert self.canvas is not None
        if self.blocks is None:
            width = max(part.width for part in self.parts)
            self.blocks = Blocks.of(self.canvas, width, self.numbers, self._held(), self.edits)
        rows, (counts, entered, firsts, left) = self.rows, self.tally
        beyond = [n - m if a.request.ahead else 0 for n, m, a in zip(left, counts, rows, strict=True)]
        fresh = [None if a is self.blank else bool(new) for a, new in zip(rows, entered, strict=True)]
        if self.graph is not None and not any(beyond):
            look = self.denoiser.plan(fresh, firsts, self.canvas.tokens.shape)
            width = self.blocks.open.shape[1]
            asked = StepQuery([width] * len(rows), beyond)
            keep_in_place(self.denoiser.written)
            found = self.graph(self.canvas, self.blocks, asked, look)
            # What the step only passes on lies in no graph's memory: most tables of the canvas.
            given = [*vars(self.canvas).values(), *vars(self.blocks).values()]
            known = {id(value): value for value in given if isinstance(value, Tensor)}
            outcome = copied(found, known)
            for part in self.parts:
                part.state, part.noise = copied(part.state, known), copied(part.noise, known)
        else:
            asked = StepQuery(counts, beyond, firsts, fresh)
            outcome = self.advance(self.canvas, self.blocks, asked)
        told = self._told(outcome, rows)
        return BatchStep(**vars(outcome.seen), answers=rows, counts=asked.counts, beyond=beyond, copied=told)

    def advance(self, canvas: Canvas, blocks: Blocks, asked: "StepQuery", look: Look | None = None) -> "StepOutcome":
        """One step on the device: ask for logits, propose, score, commit, and find the blocks of the next one.

        With a `look`, every position of the windows is asked for, shapes are those of rows, window and canvas alone: a function
        that can be compiled once and captured. Otherwise the host says how many are open, and only those are looked at.
        """
        # Indices into the flattened windows and the flattened canvas, in the same order. Their number is known to the
        # host, so that the device need not be waited for.
        total, everything, beyond = sum(asked.counts), blocks.open.numel(), any(asked.beyond)
        if total == everything:
            slots = torch.arange(everything, device=canvas.tokens.device)
        else:
            slots = torch.nonzero_static(blocks.asked.flatten(), size=total)[:, 0]
        mine = wanted = blocks.places.take(slots)
        present = canvas.tokens.take(mine)
        if beyond:
            wanted = torch.cat([mine, self._beyond(canvas, mine, asked.beyond)])
        seen = canvas.tokens, canvas.visible, canvas.known
        query = Query(*seen, wanted, canvas.mask_id, blocks.first, asked.firsts, asked.fresh, asked.counts)
        logits = self.denoiser.logits(query) if look is None else self.denoiser.ask(query, look)
        choice = self._choose(logits[:total] if beyond else logits, slots, present, blocks, asked)

        # A window past the canvas repeats its edge, so that what is not committed is left by adding 0.
        written = (choice.proposals - present) * choice.commit.take(slots)
        tokens = canvas.tokens.view(-1).index_add(0, mine, written).view_as(canvas.tokens)
        if choice.back is not None:
            tokens = tokens.masked_fill(blocks.on_canvas(choice.back, canvas), canvas.mask_id)
        after = replace(canvas, tokens=self._closed(tokens, canvas, blocks))
        proposals, values = choice.proposals, choice.confidence.value
        if beyond:
            further, sure = self._guesses(logits[total:], asked.beyond)
            proposals, values = torch.cat([proposals, further]), torch.cat([values, sure])
        # Before the host has heard of this step: so it asks once for all that it has to know of the next one.
        following = blocks.following(after, self._held(), self.edits)
        shown = StepResult(after.tokens, blocks.first, blocks.last, wanted, proposals, values)
        return StepOutcome(after, following, following.tally, shown)

    def _held(self) -> Tensor | None:
        """(A,) bool: rows that a rule holds in their block; None where no rule does."""
        return None if self.edits is None else torch.cat([part.held for part in self.parts])

    @staticmethod
    def _beyond(canvas: Canvas, mine: Tensor, beyond: list[int]) -> Tensor:
        """The open positions outside of the blocks, of the rows that want to see them."""
        watched = on_device([n > 0 for n in beyond], mine.device, torch.bool)
        others = (canvas.open & watched[:, None]).flatten().index_fill(0, mine, value=False)
        return torch.nonzero_static(others, size=sum(beyond))[:, 0]

    def _spans(self, counts: list[int]) -> list[tuple[RowGroup, slice, slice]]:
        """Each part with its rows, and with what is its own of a sequence in which row i has `counts[i]` entries."""
        found, row, at = [], 0, 0
        for part in self.parts:
            rows = slice(row, row + len(part.answers))
            many = sum(counts[rows])
            found.append((part, rows, slice(at, at + many)))
            row, at = rows.stop, at + many
        return found

    def _choose(self, logits: Tensor, slots: Tensor, present: Tensor, blocks: Blocks, asked: "StepQuery") -> Choice:
        """All parts' choices, row after row."""
        news = asked.fresh or [True] * len(asked.counts)
        if len(self.parts) == 1:
            return self.parts[0].step(logits, slots, present, blocks, entered=any(news))
        found, width = [], blocks.open.shape[1]
        for part, rows, mine in self._spans(asked.counts):
            at = slots[mine] - rows.start * width
            found.append(part.step(logits[mine], at, present[mine], blocks.part(rows), entered=any(news[rows])))
        sure = (torch.cat(x) for x in zip(*((c.confidence.value, c.confidence.key) for c in found), strict=True))
        back = None
        if any(c.back is not None for c in found):
            back = torch.cat([torch.zeros_like(c.commit) if c.back is None else c.back for c in found])
        commit = torch.cat([c.commit for c in found])
        return Choice(torch.cat([c.proposals for c in found]), Confidence(*sure), commit, back)

    def _guesses(self, logits: Tensor, beyond: list[int]) -> tuple[Tensor, Tensor]:
        """Proposals beyond the blocks, and the values of their confidences."""
        found = [part.proposer.propose(logits[mine]) for part, _, mine in self._spans(beyond)]
        return torch.cat([tokens for tokens, _ in found]), torch.cat([sure.value for _, sure in found])

    def _closed(self, tokens: Tensor, canvas: Canvas, blocks: Blocks) -> Tensor:
        """`tokens` (A, T), ended rows filled: a row ends at its first end token with nothing open before it.

        Rows that edit, and those that finish their blocks, end where the block is whole and left.
        """
        if self.ending is None:
            return tokens
        is_open, ends = tokens == canvas.mask_id, torch.isin(tokens, self.ends) & self.ending
        # An end token with masks before it ends nothing yet: text may still come between. So a row has ended where the
        # first of both, which argmax finds, is an end token.
        first = (is_open | ends).view(torch.uint8).argmax(1, keepdim=True)
        over = ends.gather(1, first)
        if self.waits is not None:
            going = (blocks.inside & is_open.take(blocks.places)).any(1)
            going = going | torch.cat([part.held for part in self.parts])
            over = over & ~(going & self.waits)[:, None]
        return tokens.masked_fill(over & self.ending & (self.columns > first), self.model.special_tokens.eos_id)

    def _told(self, outcome: "StepOutcome", answers: list[Answer]) -> Tensor | None:
        """The step is taken: the host learns where the rows are and what watched ones are shown, its one wait for the
        device; and who is done leaves.
        """
        assert self.blocks is not None
        self.canvas, self.blocks, self.numbers = outcome.canvas, outcome.blocks, self.blocks.number
        tally, copied = outcome.tally, None
        if any(answer.steps is not None for answer in answers):
            seen = outcome.seen
            bounds, bits = torch.stack([seen.first, seen.last], 1), seen.confidences.double().view(torch.int64)
            parts = (tally, seen.tokens, bounds, seen.asked, seen.proposals, bits)
            flat = torch.cat([x.flatten() for x in parts]).cpu()
            tally, copied = flat[: tally.numel()].view(tally.shape), flat[tally.numel() :]
        # The one wait: everything above has only been queued.
        self.tally = tally.tolist()
        done = []
        for i, (answer, left) in enumerate(zip(answers, self.tally[3], strict=True)):
            if answer is self.blank:
                continue
            answer.forwards += 1
            if not left:
                answer.tokens, answer.finished = self.canvas.tokens[i, : answer.request.told], True
                done.append(answer)
        if done:
            self.leave(done)
        return copied


def without(answers: list[Answer], away: set[int]) -> list[Answer]:
    """The answers whose ids are not `away`; the last ones take the places that get free, and none moves besides."""
    # The order within a group is nobody's: so a row that leaves costs one move, and not one of each row behind it.
    found = list(answers)
    for i in reversed([i for i, answer in enumerate(answers) if id(answer) in away]):
        found[i] = found[-1]
        found.pop()
    return found
