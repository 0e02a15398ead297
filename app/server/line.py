"""Who is written now, and who makes the steps: one thread a device, while anybody waits for one."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from weakref import WeakValueDictionary

from anyio import CapacityLimiter, to_thread
from fastapi import Request

from app.models import as_user_error
from app.server.answers import Draft
from app.server.service import Service
from llada_core.sampling.engine import Engine
from llada_core.sampling.row_group import Answer


class Writer:
    """Makes the steps of an engine, and of those beside it, while anybody waits for one.

    A step is handed to a thread once for all who read, and not once for each of them. It goes no further ahead of them
    than one step: once nobody waits, nothing is computed.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine, self.waiting = engine, 0
        self.stepped = asyncio.Event()  # another one after each step
        self.threads = CapacityLimiter(len(engine.peers))
        self.tasks: dict[int, asyncio.Task[None]] = {}  # by the number of the engine; of those that step now

    async def ready(self, answer: Answer) -> None:
        """Returns once there is something to be taken of an answer."""
        while not answer.ready:
            for peer in self.engine.peers:
                if peer.wanted and peer.number not in self.tasks:
                    self.tasks[peer.number] = asyncio.create_task(self._write(peer))
            self.waiting += 1
            try:
                await self.stepped.wait()
            finally:
                self.waiting -= 1

    async def _write(self, engine: Engine) -> None:
        try:
            while self.waiting and engine.wanted:
                await to_thread.run_sync(engine.step, limiter=self.threads)
                # Those who wait are woken after this, so that the next step is made while they tell of this one.
                self.stepped.set()
                self.stepped = asyncio.Event()
        finally:
            del self.tasks[engine.number]
            self.stepped.set()
            self.stepped = asyncio.Event()


class Line:
    """Who is written now: at most `at_once` requests, first come, first served. How many may wait is the guard's."""

    def __init__(self, service: Service) -> None:
        self.limits, self.metrics = service.limits, service.metrics
        self.places = asyncio.Semaphore(self.limits.at_once)
        self.writers: WeakValueDictionary[Engine, Writer] = WeakValueDictionary()
        # Few who read prompts, for each thread has memory of its own. Who scores waits for whoever scores already, and keeps
        # neither a thread nor a place from those who write.
        self.threads, self.scorer, self.scoring = CapacityLimiter(4), CapacityLimiter(1), asyncio.Lock()

    @contextlib.asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Inside, a request is written."""
        async with self.places:
            self.metrics.active.inc()
            try:
                yield
            finally:
                self.metrics.active.dec()

    async def write(self, drafts: Sequence[Draft], request: Request) -> AsyncGenerator[tuple[Draft, str]]:
        """The drafts with their new texts, step by step in turn, until all are over; one whose client has gone is given up."""
        began, first, engine = time.monotonic(), False, drafts[0].loaded.engine
        writer = self.writers.setdefault(engine, Writer(engine))
        with as_user_error():
            answers = engine.submit([draft.request for draft in drafts], watched=True)
        try:
            while going := [both for both in zip(drafts, answers, strict=True) if both[0].finish is None]:
                late = time.monotonic() - began > self.limits.seconds
                note = f"stopped after {self.limits.seconds:.0f} s, the time allowed for one answer"
                for draft, answer in going:
                    if late:
                        text = draft.give_up(note)
                    else:
                        await writer.ready(answer)
                        text = draft.advance(answer.take())
                    if draft.finish is not None:  # a stop string may end it before its canvas is full
                        engine.cancel(answer)
                    if text and not first:
                        first = True
                        self.metrics.first.observe(time.monotonic() - began)
                    yield draft, text
                if await request.is_disconnected():
                    return
        finally:
            for answer in answers:
                engine.cancel(answer)
            counted = [draft.usage() for draft in drafts]
            self.metrics.tokens.labels("prompt").inc(sum(counts["prompt_tokens"] for counts in counted))
            self.metrics.tokens.labels("answer").inc(sum(counts["completion_tokens"] for counts in counted))
            self.metrics.forwards.inc(sum(counts["forwards"] for counts in counted))
