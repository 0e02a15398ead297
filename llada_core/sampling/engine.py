"""One queue in front of one model: requests wait in the order they came, join a batch, and leave it when they are done.

Nobody works in the background: whoever waits for a step takes the turn and makes one, for all rows of a batch, while the
others wait for theirs. Rows that cannot share a forward (other cache, other guidance) are in batches of their own, which
take steps in turn.
"""

import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from llada_core.modeling.predictor import MaskPredictor
from llada_core.sampling.batch import BatchStep, RunningBatch
from llada_core.sampling.canvas import Step
from llada_core.sampling.graph import Compiled, compiling_seconds
from llada_core.sampling.query import columns, seats
from llada_core.sampling.requests import Request
from llada_core.sampling.row_group import Answer


class Engine:
    """Writes answers to requests of any settings, at most `rows` at once over at most `positions` canvas positions.

    A request waits for no more than those that came before it: nobody overtakes, and each of them ends. With `waiting`
    requests in the queue, or a canvas larger than `positions`, a request is refused: `ValueError`, with the number. Who
    holds `turn` has the model to himself. `compiled`: see `RunningBatch`. `beside`: another one whose queue it shares,
    with a copy of the model on a device of its own: the next in line goes to whichever has room first. Any of them may
    be asked.
    """

    def __init__(
        self,
        model: MaskPredictor,
        *,
        rows: int = 32,
        positions: int | None = None,
        waiting: int = 1024,
        compiled: Compiled = "off",
        beside: "Engine | None" = None,
    ) -> None:
        self.model, self.rows, self.waiting, self.compiled = model, rows, waiting, compiled
        self.positions = rows * model.max_length if positions is None else positions
        self.forwards = self.fed = 0  # of the model, and tokens in them, by all batches
        self.peers: list[Engine] = [] if beside is None else beside.peers
        self.number, self.load = len(self.peers), 0  # among these; and answers that are written
        self.peers.append(self)
        self._queue: deque[Answer] = deque() if beside is None else beside._queue
        self._door: threading.Lock = threading.Lock() if beside is None else beside._door
        self.batches: deque[RunningBatch] = deque()
        # Two locks: who asks takes the door alone, and need not wait for a step to end.
        self.turn, self._next, self._leaving = threading.Lock(), threading.Lock(), False
        # torch keeps captured graphs by the thread that captured them: whoever takes the turn, one thread replays them.
        self._replayer = None if compiled == "off" else ThreadPoolExecutor(1, "graphs")

    @property
    def active(self) -> list[Answer]:
        """Those that are being written."""
        return [answer for batch in self.batches for answer in batch.answers]

    @property
    def busy(self) -> bool:
        """Whether anybody writes or waits."""
        return any(peer.wanted for peer in self.peers)

    @property
    def wanted(self) -> bool:
        """Whether a step of this one does anything."""
        return bool(self._queue or self.batches)

    def told(self) -> str:
        """What it may take, before it is taken: rows, positions, bytes of keys and values, functions to be compiled."""
        parts = [f"{self.rows} answers at once over {self.positions:,} positions"]
        if self.model.supports_cache:
            one = self.model.new_cache(1, 1)
            each = sum(kept.nbytes for kept in (*one.keys, *one.values))
            parts.append(f"with a cache {each:,} bytes a position, {each * self.positions / 2**30:.2f} GB at most")
        if self.compiled != "off":
            most = min(self.positions, self.model.max_length)
            wide = len({columns(width) for width in range(1, most + 1)})
            rows = len({seats(count) for count in range(1, self.rows + 1)})
            parts.append(
                f"compile {self.compiled}: at most {rows} x {wide} shapes of rows and columns, with a cache several functions each, "
                "compiled when it is first met, while those who asked wait (a step of an 8 B model took 36 s on an H200)"
            )
        return "; ".join(parts)

    @staticmethod
    def spent() -> str:
        """What this process has spent on compiling steps so far, in words."""
        seconds = compiling_seconds()
        return f"compiling: {len(seconds)} shapes of a step in {sum(seconds):.1f} s"

    def submit(self, requests: Sequence[Request], *, watched: bool = False) -> list[Answer]:
        """An answer to come for each request; `watched` ones keep their steps until they are taken."""
        for request in requests:
            if (area := self._area([len(request.tokens)])) > self.positions:
                raise ValueError(
                    f"a canvas of {area} tokens is larger than the {self.positions} that fit here; "
                    "shorten the prompt or max_new_tokens"
                )
        answers = [Answer(request, steps=deque() if watched else None) for request in requests]
        # All of a call or none: half of it would be of no use to who asked.
        with self._door:
            if len(self._queue) + len(answers) > self.waiting:
                raise ValueError(f"{len(self._queue)} requests are waiting, and {self.waiting} may; try again later")
            self._queue.extend(answers)
        return answers

    def finish(self, answers: Sequence[Answer]) -> None:
        """Returns once all of these are written."""
        for answer in answers:
            while not answer.over:
                home = self._home(answer)
                # Asked again once the turn is had: another waiter may have made this answer's last step meanwhile.
                with home.turn:
                    if not answer.over:
                        home._step()
            if answer.error is not None:
                raise answer.error

    def follow(self, answer: Answer) -> Generator[Step, None, None]:
        """The steps of a watched answer as they come; who takes no more of them has the answer given up."""
        try:
            while True:
                while not answer.ready:
                    home = self._home(answer)
                    with home.turn:
                        if not answer.ready:  # another may have made it while this one waited
                            home._step()
                if (step := answer.take()) is None:
                    return
                yield step
        finally:
            self.cancel(answer)

    def _home(self, answer: Answer) -> "Engine":
        """Who writes an answer; of one that waits, who writes least."""
        # Without a lock: a count that is a step old chooses a peer hardly worse.
        return min(self.peers, key=lambda peer: peer.load) if answer.at is None else self.peers[answer.at]

    def cancel(self, answer: Answer) -> None:
        """Gives up an answer; its place is free before the next step."""
        answer.cancelled = True
        home = self._home(answer)
        home._leaving = True
        home._see_off()

    def _see_off(self) -> None:
        """Those who leave do, at once or when the step that is being made is over."""
        # Not waited for: a generator may be closed by the collector, amid a step.
        while self._leaving and self.turn.acquire(blocking=False):
            try:
                self._leaving = False
                self._sweep()
            finally:
                self.turn.release()

    def get_turn(self) -> None:
        """Returns once the turn is the caller's. Of two who ask again and again each has it every second time."""
        # The turn alone would not see to that: who gives it back and wants it again is there before those that it wakes.
        with self._next:
            self.turn.acquire()

    def step(self) -> None:
        """One step of the batch whose turn it is; of none, where nobody writes."""
        self.get_turn()
        try:
            self._step()
        finally:
            self.turn.release()
        self._see_off()  # who left while this one had the turn, and after it had looked

    def _step(self) -> None:
        self._sweep()
        self._admit()
        if not self.batches:
            return
        batch = self.batches[0]
        # The next one's turn, also if this step fails: a batch that cannot be computed must not hold up the others.
        self.batches.rotate(-1)
        forwards, fed, moment = batch.denoiser.forwards, batch.denoiser.fed, None
        with self._blaming(batch), evaluating(self.model):
            moment = batch.step() if self._replayer is None else self._replayer.submit(batch.step).result()
        if moment is None:
            return
        self.forwards += batch.denoiser.forwards - forwards
        self.fed += batch.denoiser.fed - fed
        _tell(moment)
        for answer in moment.answers:  # after its last step is there, so that nobody who looks meanwhile misses it
            answer.told = answer.finished
        self._sweep()

    @contextmanager
    def _blaming(self, batch: RunningBatch, joining: Sequence[Answer] = ()) -> Iterator[None]:
        """What goes wrong with a batch ends it: its answers, and those that were to join it, are told."""
        try:
            yield
        except BaseException as error:
            for answer in (*batch.answers, *joining):
                answer.error = error
            self.batches.remove(batch)
            # An interrupt belongs to who made the step; an error to those whose answers are lost, and only to them.
            if not isinstance(error, Exception):
                raise

    def _sweep(self) -> None:
        """Answers that nobody wants any more leave, and batches without rows."""
        for batch in list(self.batches):
            if gone := [answer for answer in batch.answers if answer.cancelled]:
                with self._blaming(batch):
                    batch.leave(gone)
            if not batch.answers and batch in self.batches:
                self.batches.remove(batch)
        self.load = len(self.active)

    def _admit(self) -> None:
        """Those at the head of the queue join while there is room; nobody overtakes one that has to wait."""
        if not self._queue:  # who comes in between waits for one step
            return
        joining: dict[RunningBatch, list[Answer]] = {}
        with self._door:
            self._taken_in(joining)
        for batch, answers in joining.items():
            with self._blaming(batch, answers):
                batch.join(answers)
        self.load = len(self.active)

    def _taken_in(self, joining: dict[RunningBatch, list[Answer]]) -> None:
        """Off the queue, into a batch each."""
        places = self.rows - len(self.active)
        while self._queue:
            # Only ever the first one: a smaller request behind it could fit for ever, and the first would starve.
            answer = self._queue[0]
            if not answer.cancelled:
                batch = next((batch for batch in self.batches if batch.takes(answer.request)), None)
                if places < 1 or not self._fits(answer.request, batch, joining):
                    break
                if batch is None:
                    try:
                        batch = RunningBatch(self.model, answer.request, self.compiled)
                    except Exception as error:  # noqa: BLE001 - its own, and of none that comes behind it
                        answer.error = error
                        self._queue.popleft()
                        continue
                    self.batches.append(batch)
                joining.setdefault(batch, []).append(answer)
                answer.at, places = self.number, places - 1
            self._queue.popleft()

    def _fits(self, request: Request, batch: RunningBatch | None, joining: dict[RunningBatch, list[Answer]]) -> bool:
        """Whether the canvases, each as wide as its longest row, have room for one row more."""
        total, others = 0, list(self.batches)
        # Not the sum of lengths: a canvas is as wide as its longest row, and one long row widens all of its batch.
        for each in [*others, *([None] if batch is None else [])]:
            sizes = [] if each is None else [len(a.request.tokens) for a in each.answers + joining.get(each, [])]
            sizes += [len(request.tokens)] if each is batch else []
            total += self._area(sizes)
        return total <= self.positions

    def _area(self, sizes: list[int]) -> int:
        """Positions of a canvas whose rows have these sizes."""
        if self.compiled == "off" or not sizes:
            return len(sizes) * max(sizes, default=0)
        return seats(len(sizes)) * columns(max(sizes))


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


def _tell(moment: BatchStep) -> None:
    """Each watched answer gets its row of a step, on the CPU."""
    if moment.copied is None:
        return
    (rows, columns), asked = moment.tokens.shape, len(moment.asked)
    told = moment.copied.split([rows * columns, 2 * rows, asked, asked, asked])
    tokens, bounds, places = told[0].view(rows, columns), told[1].view(rows, 1, 2), told[2]
    near, far = 0, sum(moment.counts)
    for row, answer in enumerate(moment.answers):
        spans = slice(near, near + moment.counts[row]), slice(far, far + moment.beyond[row])
        near, far = spans[0].stop, spans[1].stop
        if answer.steps is None:
            continue

        def own(values: Tensor, spans: tuple[slice, slice] = spans) -> Tensor:
            return values[spans[0]] if spans[1].start == spans[1].stop else torch.cat([values[s] for s in spans])

        # Views of the one copy: nothing here asks the device again.
        shown = answer.request.told
        after, asked_here = tokens[row : row + 1, :shown], own(places) - row * columns
        real = asked_here < shown
        step = Step(
            tokens=after,
            before=answer.shown,
            mask_id=answer.request.mask_id,
            forwards=answer.forwards,
            rows=_FIRST,
            bounds=bounds[row].clamp(max=shown),
            asked=asked_here[real],
            proposals=own(told[3])[real],
            confidences=own(told[4]).view(torch.float64)[real],
        )
        answer.shown = after
        answer.steps.append(step)


_FIRST = torch.zeros(1, dtype=torch.long)
