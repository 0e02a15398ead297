"""A finished denoising as one file."""

import json
import re

import numpy as np
import pytest

from app import replay
from app.session import ChatSession
from llada_core.config.sampling import SamplingParams
from llada_core.sampling.trace import find_runners_up


@pytest.fixture
def chat(engine):
    chat = ChatSession()
    chat.ask("12 + 3")
    list(chat.reply(engine, SamplingParams(max_new_tokens=12, block_length=12, steps=6), watch=True))
    return chat


def data_of(text):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


def test_the_file_holds_every_frame_and_asks_nothing_of_the_network(chat):
    text = replay.document(chat.last.trace, prompt="12 + 3")
    data = data_of(text)
    assert len(data["frames"]) == 6
    assert [f["s"].count("m") for f in data["frames"]] == [10, 8, 6, 4, 2, 0]
    assert sorted(data["order"]) == sorted([*range(1, 7)] * 2)
    assert all(0 <= c <= 100 for c in data["frames"][-1]["c"])
    assert not re.search(r"(?:src|href)=|https?:|@import|url\(", text)
    assert "default-src 'none'" in text


def test_texts_cannot_end_the_script_or_leave_the_frame(chat):
    trace = chat.last.trace
    for token in trace.texts:
        trace.texts[token] = "</script><script>alert(1)</script>${1}"
    text = replay.document(trace, prompt='</pre><img src=x onerror="alert(1)">')
    assert text.count("</script>") == 2
    framed = replay.frame(text)
    assert framed.count("<") == 2
    assert "${" not in framed
    assert 'sandbox="allow-scripts allow-downloads"' in framed


def test_runners_up_are_what_the_sampler_saw(chat, engine):
    trace = chat.last.trace
    find_runners_up(trace, engine.model)
    assert sorted(trace.runners) == list(range(12))
    final = trace.frames[-1]
    for at, others in trace.runners.items():
        assert others[0][0] == final.tokens[at], "greedy writes the likeliest token"
        np.testing.assert_allclose(others[0][1], final.confidence[at], rtol=1e-4)
        shares = [share for _, share in others]
        assert shares == sorted(shares, reverse=True)
    trace.spell(engine.decode)
    assert len(data_of(replay.document(trace))["runners"]) == 12


def test_a_stopped_answer_can_be_replayed(engine):
    chat = ChatSession()
    chat.ask("12 + 3")
    for frame in chat.reply(engine, SamplingParams(max_new_tokens=8, block_length=8, steps=8)):
        if frame.written == 3:
            chat.stop()
    find_runners_up(chat.last.trace, engine.model)
    data = data_of(replay.document(chat.last.trace))
    assert len(data["frames"]) == 3
    assert len(data["runners"]) == 3
    assert data["order"].count(-1) == 5
