"""The server's answers are those of the library, whole or streamed; what cannot be is refused in OpenAI's shape."""

import asyncio
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import replace
from threading import Event, Thread, current_thread
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from starlette.requests import ClientDisconnect

import llada_core
from app.models import LoadedModel, UserError
from app.server import answers
from app.server.answers import Draft, first_of, held_back
from app.server.http import create_app
from app.server.schema import ScoreRequest
from app.server.service import SCORED_AT_ONCE, Limits, Service
from llada_core.likelihood import log_likelihoods
from llada_core.sampling import Step
from llada_core.sampling.engine import Engine
from llada_core.sampling.params import SamplingParams
from llada_core.sampling.requests import to_answer
from llada_core.tokenizer import Tokenizer
from llada_core.usage import Usage
from tests.waiting import wait_for

OWN = SamplingParams(max_new_tokens=16, block_length=8, steps=16)
QUESTION = [{"role": "user", "content": "What is one and one?"}]
CHAT, TEXT, SCORE = "/v1/chat/completions", "/v1/completions", "/v1/score"


class OneModel:
    """A cache of one model, whose name may come to lead to another."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded, self.said = loaded, ""

    def get(self, name: str) -> tuple[LoadedModel, str]:
        if not isinstance(self.loaded, LoadedModel):
            raise UserError(str(self.loaded))
        return self.loaded, self.said


@pytest.fixture
def tiny(loaded: LoadedModel) -> LoadedModel:
    return replace(loaded, usage=Usage(sampling=OWN))


def served(model: LoadedModel, *, key: str = "", limits: Limits | None = None) -> TestClient:
    service = Service(OneModel(model), ["tiny"], limits or Limits())  # type: ignore[arg-type]
    return TestClient(create_app(service, key=key), raise_server_exceptions=False)


@pytest.fixture
def client(tiny: LoadedModel) -> Iterator[TestClient]:
    with served(tiny) as client:
        yield client


def ask(client: TestClient, path: str, **body: Any) -> dict[str, Any]:
    answer = client.post(path, json={"model": "tiny", **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def events(client: TestClient, path: str, **body: Any) -> list[dict[str, Any]]:
    text = client.post(path, json={"model": "tiny", "stream": True, **body}).text
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def in_process(tiny: LoadedModel, prompt: list[int], **values: Any) -> str:
    found = llada_core.generate(tiny.model, [prompt], replace(OWN, **values))
    return tiny.tokenizer.answer_text(found.answers[0].tolist())


def test_a_chat_is_answered_as_the_library_answers_it(client: TestClient, tiny: LoadedModel) -> None:
    prompt = tiny.tokenizer.chat_ids(QUESTION)
    found = ask(client, CHAT, messages=QUESTION)
    (choice,) = found["choices"]
    assert choice["message"] == {"role": "assistant", "content": in_process(tiny, prompt)}
    assert found["usage"]["prompt_tokens"] == len(prompt)
    assert found["usage"]["forwards"] == 16
    parts = [
        {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "one and one?"}]}
    ]
    assert ask(client, CHAT, messages=parts)["choices"] == found["choices"]


def test_settings_of_a_request_go_over_the_models_own(client: TestClient, tiny: LoadedModel) -> None:
    prompt = tiny.tokenizer.chat_ids(QUESTION)
    asked = {"temperature": 1, "seed": 7, "max_tokens": 24, "threshold": 0.5}
    expected = in_process(tiny, prompt, temperature=1.0, seed=7, max_new_tokens=24, steps=24, threshold=0.5)
    assert ask(client, CHAT, messages=QUESTION, **asked)["choices"][0]["message"]["content"] == expected
    several = ask(client, CHAT, messages=QUESTION, n=3, **asked)["choices"]
    params = replace(OWN, temperature=1.0, seed=7, max_new_tokens=24, steps=24, threshold=0.5)
    copies = llada_core.generate(tiny.model, [prompt] * 3, params).answers  # of one prompt under one seed
    texts = [tiny.tokenizer.answer_text(answer.tolist()) for answer in copies]
    assert [choice["message"]["content"] for choice in several] == texts
    assert [choice["index"] for choice in several] == [0, 1, 2]
    assert several[0]["message"]["content"] == expected
    assert len({choice["message"]["content"] for choice in several}) == 3


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("values", [{}, {"threshold": 0.001}, {"temperature": 1.0, "seed": 3, "n": 2}], ids=str)
def test_a_stream_tells_the_same_text_piece_by_piece(client: TestClient, path: str, values: dict[str, Any]) -> None:
    asked = {"messages": QUESTION} if path == CHAT else {"prompt": "one two"}
    whole = ask(client, path, **asked, **values)
    pieces = events(client, path, **asked, **values, stream_options={"include_usage": True})
    told: dict[int, str] = {}
    ends = {}
    for piece in pieces[:-1]:
        for choice in piece["choices"]:
            new = choice["delta"].get("content", "") if path == CHAT else choice["text"]
            told[choice["index"]] = told.get(choice["index"], "") + new
            ends[choice["index"]] = choice["finish_reason"]
    texts = [c["message"]["content"] if path == CHAT else c["text"] for c in whole["choices"]]
    assert [told[i] for i in range(len(texts))] == texts
    assert [ends[i] for i in range(len(texts))] == [choice["finish_reason"] for choice in whole["choices"]]
    assert pieces[-1]["usage"] == whole["usage"]
    if "threshold" not in values:  # which writes a whole block at once here
        assert len([piece for piece in pieces if piece["choices"]]) > 2


def test_the_canvas_can_be_watched(client: TestClient) -> None:
    steps = [
        e["denoising"]
        for e in events(client, CHAT, messages=QUESTION, stream_options={"denoising": True})
        if "denoising" in e
    ]
    assert [step["step"] for step in steps] == list(range(1, 17)) + [16] * (len(steps) - 16)
    assert [sum(text is None for text in step["canvas"]) for step in steps[:16]] == list(range(15, -1, -1))
    assert steps[0]["block"] == [0, 8]


def test_stop_strings_cut_and_are_never_told(client: TestClient, tiny: LoadedModel) -> None:
    text = ask(client, CHAT, messages=QUESTION)["choices"][0]["message"]["content"]
    stop = text[4:7]
    expected = text[: text.index(stop)]
    cut = ask(client, CHAT, messages=QUESTION, stop=stop)
    assert cut["choices"][0]["message"]["content"] == expected
    assert cut["choices"][0]["finish_reason"] == "stop"
    told = "".join(
        e["choices"][0]["delta"].get("content", "") for e in events(client, CHAT, messages=QUESTION, stop=[stop, "zzz"])
    )
    assert told == expected


def test_what_may_begin_a_stop_string_is_held_back() -> None:
    assert held_back("one\nQues", ["\nQuestion:", "\n\n"]) == 5
    assert held_back("one", ["two"]) == 0

    class Counted(str):
        cuts = 0

        def __getitem__(self, key: Any) -> str:
            Counted.cuts += 1
            return super().__getitem__(key)

    assert held_back("one", [Counted("e" * 1000)]) == 1
    assert Counted.cuts == 3  # of a stop string of a megabyte not a million copies
    assert first_of("a\n\nb\nQ", ["\nQ", "\n\n"]) == 1
    assert first_of("a", []) is None


def test_completions_take_texts_and_ids(client: TestClient, tiny: LoadedModel) -> None:
    ids = tiny.tokenizer.encode("one two", user=False)
    alone = ask(client, TEXT, prompt="one two")["choices"][0]["text"]
    assert alone == in_process(tiny, ids)
    assert ask(client, TEXT, prompt=ids)["choices"][0]["text"] == alone
    several = ask(client, TEXT, prompt=["one two", "three"])["choices"]
    assert [choice["index"] for choice in several] == [0, 1]
    assert several[0]["text"] == alone
    assert ask(client, TEXT, prompt=[ids, ids[:1]])["choices"][0]["text"] == alone


def test_gaps_are_filled(client: TestClient, tiny: LoadedModel) -> None:
    encode, mask = (lambda text: tiny.tokenizer.encode(text, user=False)), tiny.model.special_tokens.mask_id
    before, after = encode("one "), encode(" three")
    template = [*before, *[mask] * 8, *after]
    filled = llada_core.infill(tiny.model, [template], replace(OWN, max_new_tokens=8, steps=8)).answers[0].tolist()
    found = ask(client, TEXT, prompt="one ", suffix=" three", max_tokens=8)["choices"][0]
    assert found["text"] == tiny.tokenizer.answer_text(filled[len(before) : len(before) + 8])
    whole = ask(client, TEXT, template="one [[8]] three", max_tokens=8)["choices"][0]["text"]
    assert whole.startswith("one ")
    assert whole.endswith(" three")


def test_log_probabilities_are_those_at_which_tokens_were_written(client: TestClient) -> None:
    found = ask(client, CHAT, messages=QUESTION, logprobs=True)
    content = found["choices"][0]["logprobs"]["content"]
    assert len(content) == found["usage"]["completion_tokens"]
    assert all(entry["logprob"] <= 0 for entry in content)
    told = ask(client, TEXT, prompt="one", logprobs=1)["choices"][0]["logprobs"]
    assert len(told["tokens"]) == len(told["token_logprobs"]) == len(told["text_offset"])


def test_scores_are_the_librarys(client: TestClient, tiny: LoadedModel) -> None:
    def ids(pair: dict[str, str]) -> tuple[list[int], list[int]]:
        prompt, both = (
            tiny.tokenizer.encode(text, user=False) for text in (pair["prompt"], pair["prompt"] + pair["answer"])
        )
        return prompt, both[len(prompt) :]

    pairs = [{"prompt": "one", "answer": " two"}, {"prompt": "one", "answer": " three four"}]
    found = ask(client, SCORE, pairs=pairs, samples=16)
    expected = log_likelihoods(tiny.model, [ids(pair) for pair in pairs], samples=16)  # in one call: in equal batches
    assert [entry["log_likelihood"] for entry in found["data"]] == expected
    labels = ask(client, SCORE, prompt=QUESTION, labels=["yes", "no"])["data"]
    assert sum(entry["probability"] for entry in labels) == pytest.approx(1.0)
    assert [entry["label"] for entry in labels] == ["yes", "no"]


def test_scores_are_spread_over_the_devices(loaded: LoadedModel) -> None:
    copy = deepcopy(loaded.model)
    several = replace(loaded, copies=(copy,))
    first, _ = several.engine.peers
    pairs = [{"prompt": f"number {i}", "answer": " two three"} for i in range(2 * SCORED_AT_ONCE + 1)]
    with served(loaded) as alone, served(several) as client:
        expected = ask(alone, SCORE, pairs=pairs, samples=4)
        calls: list[int] = []
        copy.register_forward_hook(lambda *_: calls.append(1))
        with ThreadPoolExecutor(1) as thread:
            with first.turn:  # while it writes, the other scores all parts but the one that waits for it
                asked = thread.submit(ask, client, SCORE, pairs=pairs, samples=4)
                wait_for("the other device", lambda: len(calls) >= expected["usage"]["forwards"] - 1)
            assert asked.result() == expected
        calls.clear()
        first.load = 1
        ask(client, SCORE, pairs=pairs[:1], samples=4)
        assert calls  # a single part goes to whoever writes least


def test_answers_are_written_while_others_score(tiny: LoadedModel) -> None:
    service = Service(OneModel(tiny), ["tiny"], Limits(at_once=1))  # type: ignore[arg-type]
    pair = {"prompt": "one", "answer": " two three four" * 8}
    body = {"model": "tiny", "pairs": [pair] * 8, "samples": 512}
    engine, scorer, threads = tiny.engine, current_thread(), list[Thread]()
    (written,) = engine.submit(to_answer(tiny.model, [[5]], OWN)[0])

    def asks_meanwhile(*_: object) -> None:
        if current_thread() is scorer and len(threads) < 4:
            assert written.forwards == len(threads)
            threads.append(Thread(target=engine.step))
            threads[-1].start()
            wait_for("who wants a step", engine._next.locked)

    watched = tiny.model.register_forward_pre_hook(asks_meanwhile)
    service.score(ScoreRequest.read(body))
    watched.remove()
    assert len(threads) == 4
    left = Event()
    left.set()
    with pytest.raises(ClientDisconnect):
        service.score(ScoreRequest.read(body), left)
    app = create_app(service)
    with TestClient(app) as client, ThreadPoolExecutor(1) as thread:
        with service._scoring:  # somebody scores for long
            asked = thread.submit(ask, client, SCORE, pairs=[pair], samples=4)
            wait_for("the one who scores", lambda: "requests_accepted 1.0" in client.get("/metrics").text)
            assert ask(client, CHAT, messages=QUESTION)
        asked.result()


@pytest.mark.parametrize("slow", ["to say", "to read"])
def test_a_client_that_is_slow_makes_room(tiny: LoadedModel, slow: str) -> None:
    service = Service(OneModel(tiny), ["tiny"], Limits(at_once=1, silence=0.05))  # type: ignore[arg-type]
    app, sent = create_app(service), []
    body = json.dumps({"model": "tiny", "messages": QUESTION, "stream": True}).encode()
    said = [{"type": "http.request", "body": body, "more_body": slow == "to say"}]
    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": [], "query_string": b"", "root_path": ""}

    async def receive() -> dict[str, Any]:
        return said.pop() if said else await asyncio.Future()

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)
        if slow == "to read" and message["type"] == "http.response.body":
            await asyncio.Future()

    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == (408 if slow == "to say" else 200)
    assert len(sent) == 2
    assert service.metrics.active.collect()[0].samples[0].value == 0
    assert service.metrics.accepted.collect()[0].samples[0].value == 0
    wait_for("the step that is under way", lambda: not tiny.engine.busy)


REFUSED = [
    (CHAT, {"messages": QUESTION, "model": "other"}, 404, "model", "there is no model 'other' here; there are: tiny"),
    (CHAT, {"messages": QUESTION, "temprature": 1}, 400, "temprature", "did you mean"),
    (
        CHAT,
        {"messages": QUESTION, "tools": [{"type": "function"}]},
        400,
        "tools",
        "is not offered by a masked-diffusion model",
    ),
    (CHAT, {"messages": QUESTION, "max_tokens": "many"}, 400, "max_tokens", "valid integer"),
    (CHAT, {"messages": QUESTION, "max_tokens": 4000}, 400, "max_tokens", "this model reads 700 at most"),
    (CHAT, {"messages": QUESTION, "max_tokens": 10**30}, 400, "max_tokens", "this model reads 700 at most"),
    (TEXT, {"prompt": "a", "max_tokens": 10**30}, 400, "max_tokens", "this model reads 700 at most"),
    (
        CHAT,
        {"messages": QUESTION, "steps": 10**9},
        400,
        None,
        "steps 1000000000: of this model an answer takes at most 4096",
    ),
    (CHAT, {"messages": QUESTION, "steps": 10**30}, 400, "steps", "less than 2147483648"),
    (CHAT, {"messages": QUESTION, "x" * 10_000: 1}, 400, "x" * 2000 + "…", "there is no field 'xxx"),
    (CHAT, {"messages": QUESTION, "block_length": 7}, 400, None, "block_length 7 does not divide max_new_tokens 16"),
    (CHAT, {"messages": QUESTION, "threshold": 3.0}, 400, None, "threshold"),
    (CHAT, {"messages": QUESTION, "remasking": "random", "logprobs": True}, 400, "logprobs", "low_confidence"),
    (CHAT, {"messages": []}, 400, "messages", "at least 1"),
    (CHAT, {"messages": [{"role": "robot", "content": "x"}]}, 400, "messages.0.role", "'user'"),
    (CHAT, {"messages": [{"role": "assistant", "content": "x"}]}, 400, "", "must end with one of the user"),
    (CHAT, {"messages": QUESTION, "n": 1000}, 400, "n", "less than or equal to 16"),
    (TEXT, {"prompt": ["a"] * 33, "n": 2}, 400, "", "66 answers (prompts times n); at most 64"),
    (TEXT, {"prompt": [999999]}, 400, None, "vocabulary"),
    (TEXT, {"prompt": []}, 400, "", "an empty list"),
    (TEXT, {"template": "[[999]]" * 1000}, 400, "template", "at most 700 fit"),
    (TEXT, {"template": f"[[{'9' * 5000}]]"}, 400, "template", "at most 700 fit"),
    (TEXT, {"template": "nothing"}, 400, "template", "[[5]]"),
    (TEXT, {"prompt": "a", "template": "[[3]]"}, 400, "", "leave prompt and suffix out"),
    (SCORE, {"prompt": "a"}, 400, "", "give pairs"),
    (SCORE, {"pairs": [{"prompt": "a", "answer": "b"}], "cfg_scale": 1e308}, 400, None, "take a smaller one"),
    (SCORE, {"pairs": [{"prompt": "a", "answer": "b"}], "samples": 0}, 400, "samples", "greater than or equal to 1"),
]


@pytest.mark.parametrize(("path", "body", "status", "param", "says"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_be_is_refused_by_name(
    client: TestClient, path: str, body: dict[str, Any], status: int, param: str | None, says: str
) -> None:
    answer = client.post(path, json={"model": "tiny", **body})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param)
    assert says in error["message"]
    assert "\n" not in error["message"]
    assert ask(client, CHAT, messages=QUESTION)  # and the next one is answered


LONG = "one two " * 50_000


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {"messages": [{"role": "user", "content": LONG}]}, "messages"),
        (TEXT, {"prompt": ["a", LONG]}, "prompt"),
        (TEXT, {"prompt": "a", "suffix": LONG}, "suffix"),
        (TEXT, {"template": f"{LONG}[[2]]"}, "template"),
        (SCORE, {"pairs": [{"prompt": "a", "answer": LONG}]}, "answer"),
        (SCORE, {"prompt": [{"role": "user", "content": LONG}], "labels": ["a", "b"]}, "prompt"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_text_far_too_long_is_not_encoded_as_a_whole(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any], param: str
) -> None:
    """An encoding takes a hundred bytes for each token, and as text of a megabyte seconds in which others wait."""
    lengths, encode_batch = [], Tokenizer.encode_batch

    def counted(self: Tokenizer, texts: list[str], *, user: bool = True) -> Iterator[list[int]]:
        lengths.extend(map(len, texts))
        return encode_batch(self, texts, user=user)

    monkeypatch.setattr(Tokenizer, "encode_batch", counted)
    answer = client.post(path, json={"model": "tiny", **body})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, param, "context_length_exceeded")
    assert " characters is longer than the 700 tokens that this model reads" in error["message"]
    assert sum(lengths) < 30_000


def test_what_says_nothing_of_the_answer_is_passed_over(client: TestClient) -> None:
    neutral = {
        "top_p": 1,
        "top_k": -1,
        "frequency_penalty": 0,
        "user": "me",
        "tools": [],
        "response_format": {"type": "text"},
    }
    assert ask(client, CHAT, messages=QUESTION, **neutral)["choices"] == ask(client, CHAT, messages=QUESTION)["choices"]


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"{", 400, "not JSON"),
        (b"\xff\xfe{}", 400, "not UTF-8"),
        (b"[1]", 400, "must be a JSON object, got list"),
        (b"[" * 100_000, 400, "not JSON"),
        (b"x" * 2_000_000, 413, "larger than"),
        (b'{"seed": ' + b"9" * 5000 + b"}", 400, "not JSON: Exceeds the limit"),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}', 400, "half of a character"),
    ],
    ids=["cut", "utf16", "list", "deep", "large", "digits", "half"],
)
def test_bodies_that_are_none(client: TestClient, body: bytes, status: int, says: str) -> None:
    answer = client.post(CHAT, content=body)
    assert answer.status_code == status
    assert says in answer.json()["error"]["message"]


def test_other_paths_and_ways(client: TestClient) -> None:
    assert client.get("/v1/nope").status_code == 404
    assert "/v1/score" in client.get("/v1/nope").json()["error"]["message"]
    assert client.get(CHAT).status_code == 405
    assert client.get("/v1/models").json()["data"] == [client.get("/v1/models/tiny").json()]
    assert client.get("/v1/models/other").status_code == 404
    assert client.get("/health").json()["status"] == "ok"


def test_a_key_is_asked_for_everywhere_but_health(tiny: LoadedModel) -> None:
    with served(tiny, key="secret") as client:
        assert client.get("/health").status_code == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            answer = client.get("/v1/models", headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
        assert client.get("/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200


def test_metrics_count_requests_tokens_and_forwards(client: TestClient) -> None:
    ask(client, CHAT, messages=QUESTION)
    client.post(CHAT, content=b"{")
    text = client.get("/metrics").text
    assert f'lladaflow_requests_total{{path="{CHAT}",status="200"}} 1.0' in text
    assert f'lladaflow_requests_total{{path="{CHAT}",status="400"}} 1.0' in text
    assert "lladaflow_forwards_total 16.0" in text
    assert "lladaflow_requests_active 0.0" in text


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory. Tried"), RuntimeError("broken")])
def test_a_step_that_fails_ends_one_request(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    def fails(self: Draft, step: Step | None) -> str:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(answers.Draft, "advance", fails)
        whole = client.post(CHAT, json={"model": "tiny", "messages": QUESTION})
        streamed = client.post(CHAT, json={"model": "tiny", "messages": QUESTION, "stream": True}).text
    assert whole.status_code == (503 if "memory" in str(error) else 500)
    assert "in the log" in whole.json()["error"]["message"]
    assert "in the log" in streamed
    assert "[DONE]" not in streamed
    assert ask(client, CHAT, messages=QUESTION)
    assert "lladaflow_requests_active 0.0" in client.get("/metrics").text


def test_a_full_queue_of_the_model_is_no_fault_of_the_server(client: TestClient, tiny: LoadedModel) -> None:
    engine = tiny.engine
    engine.waiting, before = 0, engine.waiting
    answer = client.post(CHAT, json={"model": "tiny", "messages": QUESTION})
    engine.waiting = before
    assert answer.status_code == 429
    assert "try again later" in answer.json()["error"]["message"]
    assert ask(client, CHAT, messages=QUESTION)


def test_memory_that_runs_out_in_a_step_ends_the_answers_in_it_and_no_later_one(
    client: TestClient, tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, refused = tiny.model.forward, []

    def once(*args: Any, **named: Any) -> Any:
        if not refused:
            refused.append(True)
            torch.empty(1 << 50)  # four petabytes
        return forward(*args, **named)

    monkeypatch.setattr(tiny.model, "forward", once)
    answer = client.post(CHAT, json={"model": "tiny", "messages": QUESTION, "n": 2})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "out_of_memory")
    assert not tiny.engine.busy
    assert ask(client, CHAT, messages=QUESTION)


def test_a_step_is_made_once_for_all_who_read_it(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    made, step = [], Engine.step
    monkeypatch.setattr(Engine, "step", lambda self: made.append(1) or step(self))
    assert ask(client, CHAT, messages=QUESTION, n=8)["usage"]["forwards"] == 8 * 16
    assert 16 <= len(made) <= 17  # the last of them finds nobody


def test_a_stream_is_ascii(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """There are clients that end a line at U+2028."""
    monkeypatch.setattr(Draft, "advance", lambda self, step: setattr(self, "finish", "stop") or "a\u2028b\u0085c")
    text = client.post(CHAT, json={"model": "tiny", "messages": QUESTION, "stream": True}).content
    assert text.isascii()
    assert json.loads(text.decode().split("\n\n")[1].removeprefix("data: "))["choices"][0]["delta"] == {
        "content": "a\u2028b\u0085c"
    }


def test_an_answer_that_takes_too_long_keeps_what_is_there(tiny: LoadedModel) -> None:
    with served(tiny, limits=Limits(seconds=0.0)) as client:
        found = ask(client, CHAT, messages=QUESTION)
    assert found["choices"][0]["finish_reason"] == "length"
    assert "the time allowed" in found["note"]


def test_an_alias_that_moves_is_followed_and_one_that_is_gone_is_not(tiny: LoadedModel) -> None:
    cache = OneModel(tiny)
    service = Service(cache, ["tiny"])  # type: ignore[arg-type]
    other = replace(tiny, usage=Usage(sampling=replace(OWN, max_new_tokens=8, steps=8)))
    cache.loaded, cache.said = other, "tiny moved"
    assert service.follow_aliases() == ["tiny moved"]
    assert service.model("tiny") is other
    assert service.model("default") is other
    cache.loaded = "the folder is gone"  # type: ignore[assignment]
    assert service.follow_aliases() == ["the folder is gone"]
    assert service.follow_aliases() == []  # told once, not at every look
    assert service.model("tiny") is other
    assert service.metrics.swaps.collect()[0].samples[0].value == 1


def test_while_a_rule_may_take_back_only_finished_blocks_are_told(tiny: LoadedModel) -> None:
    prompt = tiny.tokenizer.chat_ids(QUESTION)
    params = replace(OWN, rule="llada_core.sampling.unmask.ending")
    plain = tiny.write(prompt, OWN)
    draft = Draft(tiny, to_answer(tiny.model, [prompt], params)[0][0], prompt)
    told = []
    while draft.finish is None:
        told.append((draft.advance(next(plain, None)), draft.frame.block if draft.frame else None))
    early = [text for text, block in told if block == (0, 8)]
    assert early
    assert "".join(early) == ""
    assert "".join(text for text, _ in told) == in_process(tiny, prompt)
