"""A finished denoising as one file."""

import itertools
import json
import re

import numpy as np
import pytest
import torch

from app import render
from app.canvas import Trace, find_runners_up
from app.conversation import Conversation
from llada_core.modeling.predictor import Prediction
from llada_core.sampling.canvas import Step
from llada_core.sampling.params import SamplingParams
from llada_core.tokenizer import SpecialTokens


@pytest.fixture
def chat(loaded):
    chat = Conversation()
    chat.ask("12 + 3")
    list(chat.reply(loaded, SamplingParams(max_new_tokens=12, block_length=12, steps=6), look_ahead=True))
    return chat


def data_of(text):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


def test_the_file_holds_every_frame_and_asks_nothing_of_the_network(chat):
    text = render.document(chat.last.trace, prompt="12 + 3")
    data = data_of(text)
    assert len(data["frames"]) == 6
    assert [f["s"].count("m") for f in data["frames"]] == [10, 8, 6, 4, 2, 0]
    assert sorted(data["order"]) == sorted([*range(1, 7)] * 2)
    assert all(0 <= c <= 100 for c in data["frames"][-1]["c"])
    assert not re.search(r"(?:src|href)=|https?:|@import|url\(", text)
    assert "default-src 'none'" in text


def test_texts_cannot_end_the_script_or_leave_the_frame(chat):
    trace = chat.last.trace
    for token in trace.spellings:
        trace.spellings[token] = "</script><script>alert(1)</script>${1}"
    text = render.document(trace, prompt='</pre><img src=x onerror="alert(1)">')
    assert text.count("</script>") == 2
    framed = render.frame(text)
    assert framed.count("<") == 2
    assert "${" not in framed
    assert 'sandbox="allow-scripts allow-downloads"' in framed


def test_runners_up_are_what_the_sampler_saw(chat, loaded):
    trace = chat.last.trace
    find_runners_up(trace, loaded.model, loaded.decode)
    assert sorted(trace.runners) == list(range(12))
    final = trace.frames[-1]
    for at, others in trace.runners.items():
        assert others[0][0] == final.tokens[at], "greedy writes the likeliest token"
        np.testing.assert_allclose(others[0][1], final.confidence[at], rtol=1e-4)
        shares = [share for _, share in others]
        assert shares == sorted(shares, reverse=True)
    assert len(data_of(render.document(trace))["runners"]) == 12


def test_a_stopped_answer_can_be_replayed(loaded):
    chat = Conversation()
    chat.ask("12 + 3")
    for frame in chat.reply(loaded, SamplingParams(max_new_tokens=8, block_length=8, steps=8)):
        if frame.written == 3:
            chat.stop()
    find_runners_up(chat.last.trace, loaded.model, loaded.decode)
    data = data_of(render.document(chat.last.trace))
    assert len(data["frames"]) == 3
    assert len(data["runners"]) == 3
    assert data["order"].count(-1) == 5


def test_what_the_end_of_an_answer_fills_in_has_no_confidence_and_changes_no_earlier_canvas():
    """Position 2 is written first and replaced when the end at position 1 is found; the canvas between had it."""
    prompt, mask, end = [7, 8], 2, 1
    canvases = [[mask] * 4, [mask, mask, 9, mask], [10, mask, 9, mask], [10, end, end, end]]
    looked: list[list[int]] = []

    def step(before, after, number):
        before, after = (torch.tensor([prompt + canvas]) for canvas in (before, after))
        asked = torch.arange(2, 6)
        return Step(
            tokens=after, before=before, mask_id=mask, forwards=number, rows=torch.tensor([0]),
            bounds=torch.tensor([[2, 6]]), asked=asked, proposals=torch.tensor([10, end, 9, 11]),
            confidences=torch.full((4,), 0.5, dtype=torch.float64),
        )  # fmt: skip

    class Looked:
        device = torch.device("cpu")
        special_tokens = SpecialTokens(mask_id=mask, eos_id=end, pad_id=end, bos_id=0, eot_id=end)

        def __call__(self, ids, _, *, positions):
            looked.extend(ids.tolist())
            return Prediction(logits=torch.zeros(len(positions), 12))

    trace = Trace(prompt)
    for number, (before, after) in enumerate(itertools.pairwise(canvases), start=1):
        trace.add(step(before, after, number))
    assert np.isnan(trace.frames[-1].confidence).tolist() == [False, False, True, True]
    find_runners_up(trace, Looked(), str)
    assert [row[2:] for row in looked] == canvases[:3]
    assert sorted(trace.runners) == [0, 1]
