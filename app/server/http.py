"""The server's routes: bodies read within bounds, answers as a whole or as server-sent events, errors as OpenAI's are."""

import asyncio
import contextlib
import json
import logging
import re
import secrets
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, cast

from anyio import to_thread
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as AsgiMessage

from app.models import UserError, out_of_memory
from app.server.answers import Draft
from app.server.line import Line
from app.server.schema import BadRequestError, ChatRequest, CompletionRequest, SamplingFields, ScoreRequest
from app.server.service import Limits, Service

log = logging.getLogger("lladaflow.server")
GONE = 499  # the client is, and nobody reads what is sent (nginx's number)
HALVES = re.compile(rb"\\u[dD][89a-fA-F]")  # of characters, as JSON may write them
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/score", "/health", "/metrics")


def create_app(service: Service, *, key: str = "", follow_seconds: float = 5.0) -> FastAPI:
    """The application. `key`: what clients must send as a bearer token, if anything; `follow_seconds` between two looks
    at where aliases lead.
    """

    @contextlib.asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        follower = asyncio.create_task(_follow(service, follow_seconds))
        yield
        follower.cancel()

    app = FastAPI(title="lladaflow", lifespan=life, docs_url=None, redoc_url=None, openapi_url=None)
    line = Line(service)
    app.add_middleware(Guard, service=service, key=key)
    app.exception_handler(BadRequestError)(_refused)
    app.exception_handler(UserError)(_refused)
    app.exception_handler(HTTPException)(_no_such_path)
    app.exception_handler(ClientDisconnect)(_gone)
    app.exception_handler(Exception)(_failed)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "models": list(service.names)}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    def entry(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": service.since, "owned_by": "lladaflow"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [entry(name) for name in service.names]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.model(name)
        return entry(name)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        asked = ChatRequest.read(await _body(request, service.limits))
        return await _generated(line, request, asked, lambda: service.chat(asked), ChatFormat(asked))

    @app.post("/v1/completions")
    async def complete(request: Request) -> Response:
        asked = CompletionRequest.read(await _body(request, service.limits))
        return await _generated(line, request, asked, lambda: service.complete(asked), TextFormat(asked))

    @app.post("/v1/score")
    async def score(request: Request) -> Response:
        asked = ScoreRequest.read(await _body(request, service.limits))
        return await _score(line, request, service, asked)

    return app


class Format(ABC):
    """One answer in the shape of its path: whole, or a piece of a stream."""

    kind, piece = "", ""

    def __init__(self, asked: SamplingFields) -> None:
        self.asked = asked
        self.head = {"id": f"{self.kind}-{secrets.token_hex(12)}", "created": int(time.time()), "model": asked.model}

    @abstractmethod
    def choice(self, draft: Draft) -> dict[str, Any]:
        """One whole choice."""

    @abstractmethod
    def delta(self, draft: Draft, text: str) -> dict[str, Any]:
        """One choice's new text."""

    def opening(self, draft: Draft) -> dict[str, Any] | None:
        """What a stream says of a choice before its first text."""
        return None

    def whole(self, drafts: Sequence[Draft]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        choices = [self.choice(draft) | {"index": draft.index, "finish_reason": draft.finish} for draft in drafts]
        notes = {"note": note} if (note := next((draft.note for draft in drafts if draft.note), "")) else {}
        return {**self.head, "object": self.kind, "choices": choices, "usage": usage_of(drafts), **notes}

    def part(self, draft: Draft, text: str, *, canvas: bool) -> dict[str, Any]:
        """One event: new text, an end, or with `canvas` a step of the denoising."""
        choice = self.delta(draft, text) | {"index": draft.index, "finish_reason": draft.finish}
        shown = {"denoising": {"index": draft.index, **draft.canvas()}} if canvas and draft.frame else {}
        return {**self.head, "object": self.piece, "choices": [choice], **shown}


class ChatFormat(Format):
    """`/v1/chat/completions`."""

    kind, piece = "chat.completion", "chat.completion.chunk"
    asked: ChatRequest

    def choice(self, draft: Draft) -> dict[str, Any]:
        entries = [{"token": text, "logprob": value, "bytes": list(text.encode()), "top_logprobs": []}
                   for text, value in draft.log_probabilities()] if self.asked.logprobs else None  # fmt: skip
        told = {"role": "assistant", "content": draft.told}
        return {"message": told, "logprobs": None if entries is None else {"content": entries}}

    def opening(self, draft: Draft) -> dict[str, Any] | None:
        choice = {"index": draft.index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        return {**self.head, "object": self.piece, "choices": [choice]}

    def delta(self, draft: Draft, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}


class TextFormat(Format):
    """`/v1/completions`."""

    kind = piece = "text_completion"
    asked: CompletionRequest

    def choice(self, draft: Draft) -> dict[str, Any]:
        found = draft.log_probabilities() if self.asked.logprobs is not None else None
        told: dict[str, Any] | None = None
        if found is not None:
            ends = [sum(len(text) for text, _ in found[:i]) for i in range(len(found))]
            told = {"tokens": [text for text, _ in found], "token_logprobs": [value for _, value in found]}
            told |= {"top_logprobs": None, "text_offset": ends}
        return {"text": draft.told, "logprobs": told}

    def delta(self, draft: Draft, text: str) -> dict[str, Any]:
        return {"text": text, "logprobs": None}


def usage_of(drafts: Sequence[Draft]) -> dict[str, Any]:
    """Tokens, and beside what OpenAI counts the forwards and the tokens a forward."""
    counted = [draft.usage() for draft in drafts]
    asked = sum({id(draft.prompt): len(draft.prompt) for draft in drafts}.values())
    written, forwards = (sum(counts[name] for counts in counted) for name in ("completion_tokens", "forwards"))
    per_forward = round(written / max(1, forwards), 3)
    counts = {"prompt_tokens": asked, "completion_tokens": written, "total_tokens": asked + written}
    return counts | {"forwards": forwards, "tokens_per_forward": per_forward}


async def _generated(
    line: Line, request: Request, asked: SamplingFields, drafts_of: Callable[[], list[Draft]], form: Format
) -> Response:
    """A whole answer, or a stream that begins once the request is accepted."""
    drafts = await to_thread.run_sync(drafts_of, limiter=line.threads)
    if asked.stream:
        return StreamingResponse(_events(line, request, asked, drafts, form), media_type="text/event-stream")
    async with line.place():
        async for _ in line.write(drafts, request):
            pass
        if any(draft.finish is None for draft in drafts):
            return Response(status_code=GONE)
        return JSONResponse(form.whole(drafts))


async def _score(line: Line, request: Request, service: Service, asked: ScoreRequest) -> Response:
    """The scores, unless the client leaves before."""
    left = threading.Event()

    async def watch() -> None:
        while not await request.is_disconnected():
            await asyncio.sleep(0.5)
        left.set()

    watcher = asyncio.create_task(watch())
    try:
        async with line.scoring:
            return JSONResponse(await to_thread.run_sync(service.score, asked, left, limiter=line.scorer))
    finally:
        left.set()  # also where a stop ends it: the thread is to go no further
        watcher.cancel()


async def _events(
    line: Line, request: Request, asked: SamplingFields, drafts: list[Draft], form: Format
) -> AsyncIterator[str]:
    """Server-sent events; an error after the first of them is an event as well, for the status has been sent."""
    told = asked.stream_options
    canvas = told is not None and told.denoising
    async with line.place():
        try:
            for draft in drafts:
                if (opening := form.opening(draft)) is not None:
                    yield _event(opening)
            async with contextlib.aclosing(line.write(drafts, request)) as pieces:
                async for draft, text in pieces:
                    if text or draft.finish or canvas:
                        yield _event(form.part(draft, text, canvas=canvas))
            if told is not None and told.include_usage:
                yield _event({**form.head, "object": form.piece, "choices": [], "usage": usage_of(drafts)})
            yield "data: [DONE]\n\n"
        except Exception as error:  # noqa: BLE001 - the boundary between the model and a client
            yield _event(_told(error)[1])


def _event(value: dict[str, Any]) -> str:
    # All in ASCII: there are clients that end a line at U+2028, U+0085 and the like, which JSON leaves as they are.
    return f"data: {json.dumps(value)}\n\n"


async def _body(request: Request, limits: Limits) -> Any:
    """The JSON of a body within the limits; raises `BadRequestError` (413 for a larger one, 408 for one that comes too slowly)."""
    held = bytearray()
    try:
        async with asyncio.timeout(limits.silence):
            async for piece in request.stream():
                held += piece
                if len(held) > limits.body:
                    text = f"the body is larger than {limits.body:,} bytes"
                    raise BadRequestError(text, None, "body_too_large", 413)
    except TimeoutError:  # its place is for others
        text = f"the body did not come within {limits.silence:.0f} s"
        raise BadRequestError(text, None, "body_too_slow", 408) from None
    try:
        value = json.loads(held.decode("utf-8"))
        if HALVES.search(held):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError:
        raise BadRequestError("the body holds half of a character (a lone surrogate), which is no text") from None
    except UnicodeDecodeError as error:
        raise BadRequestError(f"the body is not UTF-8 (byte {error.start})") from None
    except (ValueError, RecursionError) as error:  # ValueError: also a number with more digits than Python reads
        raise BadRequestError(f"the body is not JSON: {error}") from None


async def _follow(service: Service, seconds: float) -> None:
    while True:
        await asyncio.sleep(seconds)
        try:
            for text in await to_thread.run_sync(service.follow_aliases):
                log.warning("%s", text)
        except Exception:  # whatever the registry says, what is loaded goes on
            log.exception("the registry could not be asked; the loaded models go on")


class UnreadError(Exception):
    """A client does not read what is sent to it."""


class Guard:
    """Around all of it: asks for the key, refuses who comes when too many wait, and counts what was answered.

    Here, and not where an answer is made, so that whatever becomes of a request its place in the line is free again.
    """

    def __init__(self, app: ASGIApp, service: Service, key: str) -> None:
        self.app, self.metrics, self.key = app, service.metrics, key.encode()
        self.room, self.held = service.limits.at_once + service.limits.waiting, 0
        self.silence = service.limits.silence

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path, began, status = scope["path"], time.monotonic(), 0

        async def noting(message: AsgiMessage) -> None:
            nonlocal status
            status = message.get("status", status)
            # Only a client that leaves megabytes unread makes it wait; what it has not read yet is given up with it.
            try:
                async with asyncio.timeout(self.silence):
                    await send(message)
            except TimeoutError:
                raise UnreadError from None

        answer: ASGIApp = self.app
        if (refusal := self._refusal(scope)) is not None:
            answer = await _refused(Request(scope), refusal)
        works = refusal is None and scope["method"] == "POST"
        self._hold(works)
        try:
            await answer(scope, receive, noting)
        except UnreadError:
            status = GONE
            log.warning("a client of %s read nothing for %.0f s and was left", path, self.silence)
        finally:
            self._hold(-works)
            known = path if path in PATHS else "other"
            self.metrics.requests.labels(known, status or GONE).inc()
            self.metrics.seconds.labels(known).observe(time.monotonic() - began)

    def _hold(self, more: int) -> None:
        self.held += more
        self.metrics.accepted.set(self.held)

    def _refusal(self, scope: Scope) -> BadRequestError | None:
        given = dict(scope["headers"]).get(b"authorization", b"").removeprefix(b"Bearer ").strip()
        if self.key and scope["path"] != "/health" and not secrets.compare_digest(given, self.key):
            text = "the API key is missing or wrong; send it as a bearer token"
            return BadRequestError(text, None, "invalid_api_key", 401)
        if scope["method"] == "POST" and self.held >= self.room:
            return BadRequestError(f"{self.held} requests are here already; try again later", None, "queue_full", 429)
        return None


def _told(error: Exception) -> tuple[int, dict[str, Any]]:
    """Status and body of an error: what a client did wrong by name, what went wrong here by a number in the log."""
    if isinstance(error, BadRequestError):
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(error.status, "invalid_request_error")
        return error.status, _error(_cut(str(error)), kind, _cut(error.param), error.code)
    if isinstance(error, UserError):  # of the model's own queue, once a first step is asked for
        return 429, _error(str(error), "rate_limit_error", None, "queue_full")
    number = secrets.token_hex(3)
    log.error("error %s", number, exc_info=error)
    if out_of_memory(error):
        text = f"the machine ran out of memory; ask for fewer tokens (error {number} in the log)"
        return 503, _error(text, "server_error", None, "out_of_memory")
    return 500, _error(
        f"something went wrong here; error {number} in the log has the details", "server_error", None, None
    )


def _cut(text: str | None, longest: int = 2000) -> str | None:
    """A text that repeats what a client sent, which may be a megabyte."""
    return text if text is None or len(text) <= longest else f"{text[:longest]}…"


def _error(text: str | None, kind: str, param: str | None, code: str | None) -> dict[str, Any]:
    return {"error": {"message": text, "type": kind, "param": param, "code": code}}


async def _refused(_: Request, error: Exception) -> Response:
    status, body = _told(error)
    headers = {"Retry-After": "1"} if status == 429 else {}
    return JSONResponse(body, status, headers=headers)


async def _failed(_: Request, error: Exception) -> Response:
    status, body = _told(error)
    return JSONResponse(body, status)


async def _gone(_: Request, __: Exception) -> Response:
    return Response(status_code=GONE)


async def _no_such_path(request: Request, error: Exception) -> Response:
    failure = cast("HTTPException", error)
    text = f"{request.method} {request.url.path}: {failure.detail}; there are {', '.join(PATHS)}"
    return JSONResponse(_error(text, "invalid_request_error", None, None), failure.status_code)
