"""Who is surest is committed first, also where probabilities have run out of numbers below 1.

A line per case: how far the likeliest token leads at each position, in nats. Rounded to 1.0, all of them would be equal,
and the leftmost would win.
"""

import pytest
import torch
from torch import nn

from llada_core.modeling.predictor import MaskPredictor, Prediction
from llada_core.sampling import stream
from llada_core.sampling.params import SamplingParams
from tests.tiny import tiny_tokenizer

WORD = 40
PROMPT = [5, 6]
# remasking, leads -> order of positions; what is a number between 0 and 1 no longer tells these apart.
CASES = [
    ("margin", [17.0, 18.0, 19.0, 20.0]),
    ("margin", [18.0, 60.0, 30.0, 45.0]),
    ("margin", [40.0, 40.5, 300.0, 80.0]),
    ("low_confidence", [18.0, 60.0, 30.0, 45.0]),
    ("low_confidence", [40.0, 40.5, 300.0, 80.0]),
    ("entropy", [18.0, 60.0, 30.0, 45.0]),
    ("entropy", [40.0, 40.5, 300.0, 80.0]),
]
DECIDING = {"plain": {}, "temperature": {"temperature": 0.01, "seed": 3}}


class Sure(MaskPredictor):
    """Says WORD everywhere, with a lead over every other token that depends on the position alone."""

    max_length = 64

    def __init__(self, leads) -> None:
        super().__init__()
        tokenizer = tiny_tokenizer()
        self._special, self.size, self.leads = tokenizer.special, tokenizer.vocab_size, torch.tensor(leads)
        self.embedding = nn.Embedding(self.size, 1)

    @property
    def vocab_rows(self):
        return self.size

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, attention_mask=None, *, positions=None, **_):
        logits = torch.zeros(*input_ids.shape, self.size)
        logits[:, len(PROMPT) : len(PROMPT) + len(self.leads), WORD] = self.leads
        return Prediction(logits=logits if positions is None else logits.flatten(0, 1)[positions])


def order(leads, **settings):
    """The positions of the answer in the order in which they are committed."""
    params = SamplingParams(max_new_tokens=len(leads), block_length=len(leads), steps=len(leads), **settings)
    steps = stream(Sure(leads), [PROMPT], params)
    return [int(column) - len(PROMPT) for step in steps for column in step.committed[0].nonzero()[:, 0]]


@pytest.mark.parametrize(("remasking", "leads"), CASES)
@pytest.mark.parametrize("deciding", DECIDING)
def test_the_surest_goes_first(remasking, leads, deciding):
    surest_first = sorted(range(len(leads)), key=lambda n: -leads[n])
    assert order(leads, remasking=remasking, **DECIDING[deciding]) == surest_first


def test_of_true_equals_the_leftmost_goes_first():
    for remasking in ("margin", "low_confidence", "entropy"):
        assert order([30.0, 30.0, 31.0, 30.0], remasking=remasking) == [2, 0, 1, 3]
