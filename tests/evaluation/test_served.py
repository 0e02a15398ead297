"""Through `llada serve` a model scores and answers as it does in process."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests
from fastapi.testclient import TestClient
from lm_eval.api.registry import get_model

from app.models import LoadedModel
from app.server.http import create_app
from app.server.service import Limits, Service
from llada_core.evaluation import served
from llada_core.evaluation.served import ServedLM
from llada_core.settings import ConfigError
from llada_core.usage import Usage
from tests.evaluation.test_harness import PAIRS, PROMPTS, SETTINGS, generating, lm_of, scoring
from tests.tiny import tiny_pair

SAMPLING = SETTINGS.sampling


@pytest.fixture
def lm(monkeypatch: pytest.MonkeyPatch) -> Iterator[ServedLM]:
    """Asks a server in this process."""
    model, tokenizer = tiny_pair("llada")
    loaded = LoadedModel("tiny", Path("nowhere"), model, tokenizer, usage=Usage())
    service = Service(SimpleNamespace(get=lambda _: (loaded, "")), ["tiny"], Limits())  # type: ignore[arg-type]
    with TestClient(create_app(service), raise_server_exceptions=False) as client:

        def post(url: str, *, headers: dict[str, str], timeout: float, **body: object) -> requests.Response:
            answer, found = client.post(url.removeprefix("http://there"), headers=headers, **body), requests.Response()
            found.status_code, found._content = answer.status_code, answer.content
            return found

        monkeypatch.setattr(served.requests, "post", post)
        yield ServedLM("http://there/v1/", sampling=SAMPLING, samples=SETTINGS.samples)


def test_likelihoods_are_those_in_process(lm: ServedLM) -> None:
    own = [value for value, _ in lm_of().loglikelihood(scoring(PAIRS))]
    assert [value for value, _ in lm.loglikelihood(scoring(PAIRS))] == pytest.approx(own, rel=1e-6)


def test_answers_are_those_in_process(lm: ServedLM) -> None:
    assert lm.generate_until(generating()) == lm_of().generate_until(generating())
    asked = {"max_gen_toks": 8, "until": [" "], "do_sample": False, "temperature": 0.7}
    short = replace_length(8)
    assert lm_with(lm, short).generate_until(generating(**asked)) == lm_of(
        settings=SETTINGS.model_copy(update={"sampling": short})
    ).generate_until(generating(**asked))


def replace_length(length: int) -> dict[str, object]:
    return {**SAMPLING, "max_new_tokens": length, "steps": length}


def lm_with(lm: ServedLM, sampling: dict[str, object]) -> ServedLM:
    return ServedLM(lm.url, sampling=sampling, samples=4)


def test_dialogues_go_as_messages(lm: ServedLM) -> None:
    own = lm_of()
    for one in (own, lm):
        assert one.chat_template(True)
    history = [{"role": "user", "content": prompt} for prompt in PROMPTS[:1]]
    texts = [one.generate_until(generating([one.apply_chat_template(history)])) for one in (own, lm)]
    assert texts[0] == texts[1]
    scores = [one.loglikelihood(scoring([(one.apply_chat_template(history), "12")]))[0][0] for one in (own, lm)]
    assert scores[1] == pytest.approx(scores[0], rel=1e-6)


def test_model_args_are_read_and_unknown_ones_refused() -> None:
    made = get_model("llada-server").create_from_arg_string("base_url=http://x:1/v1,mc_num=8,gen_length=64,steps=32")
    assert (made.url, made.scoring["samples"], made.sampling) == ("http://x:1", 8, {"max_new_tokens": 64, "steps": 32})
    with pytest.raises(ConfigError, match="unknown setting 'base_uri'"):
        ServedLM.create_from_arg_string("base_uri=http://x")


def test_other_evaluators_names_are_read_and_unknown_ones_refused(
    lm: ServedLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent, through = [], lm._post
    monkeypatch.setattr(lm, "_post", lambda path, body: sent.append(body) or through(path, body))
    asked = {"use_cache": "true", "dual_cache": True, "suppress_tokens": "[5;9]", "until": []}
    assert lm.generate_until(generating(PROMPTS[:1], **asked)) == lm_of().generate_until(
        generating(PROMPTS[:1], **asked)
    )
    assert (sent[0]["cache"], sent[0]["forbid_tokens"]) == ("dual", (5, 9))
    with pytest.raises(ConfigError, match=r"gen_kwargs: unknown setting 'block_lenght'; did you mean 'block_length'\?"):
        lm.generate_until(generating(PROMPTS[:1], block_lenght=8))
    with pytest.raises(ConfigError, match="infill: gaps"):
        lm.generate_until(generating(PROMPTS[:1], infill="_"))
    made = ServedLM.create_from_arg_string("use_cache=true,forbid_tokens=[1;2]")
    assert made.sampling == {"cache": "prefix", "forbid_tokens": (1, 2)}


def test_what_the_server_refuses_is_one_line(lm: ServedLM) -> None:
    lm.model = "other"
    with pytest.raises(ConfigError, match="404: there is no model 'other' here; there are: tiny"):
        lm.generate_until(generating())


def test_a_full_server_is_asked_again(lm: ServedLM, monkeypatch: pytest.MonkeyPatch) -> None:
    through, waits = served.requests.post, []
    full = requests.Response()
    full.status_code, full._content = 429, json.dumps({"error": {"message": "9 requests wait already"}}).encode()
    answers = iter([full, full])
    monkeypatch.setattr(
        served.requests, "post", lambda *a, **k: through(*a, **k) if (told := next(answers, None)) is None else told
    )
    monkeypatch.setattr(served.time, "sleep", waits.append)
    assert len(lm.generate_until(generating(PROMPTS[:1]))) == 1
    assert waits == [1.0, 2.0]
    lm.tries = 2
    answers = iter([full, full])
    with pytest.raises(ConfigError, match="429: 9 requests wait already"):
        lm.generate_until(generating(PROMPTS[:1]))


def test_no_server_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"does not answer .*is `llada serve` running there"):
        ServedLM("http://127.0.0.1:9", tries=1).generate_until(generating())
