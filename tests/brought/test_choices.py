"""Choices as data sets have them: each is scored by tokens of its own, whatever the tokenizer makes of them.

A new case from a bug report is a line of the table. The tokenizer is that of `tests.tiny`: it joins "i" and "s" to one.
"""

import pytest

from llada_core.evaluation.answering import Responder, ResponderOptions
from llada_core.evaluation.harness import LladaLM
from llada_core.evaluation.params import BenchmarkSettings
from llada_core.evaluation.requests import ChatText, pairs
from tests.tiny import tiny_pair, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
END = [TOKENIZER.special.eos_id]


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text)


def chat(question: str, begun: str = "") -> ChatText:
    turns = [{"role": "user", "content": question}]
    return ChatText(TOKENIZER.chat_text(turns), turns) + begun


CHOICES = [  # context, choice, what is scored
    ("Question: what i", "s", ids("s")),  # joined with the last letter of the context
    ("Question: what i", "t", ids("t")),
    ("Answe", "r", ids("r")),
    ("Answe", "d", ids("d")),
    (chat("hi", "Answe"), "r", ids("r")),  # in a reply that has begun
    (chat("hi", "what i"), "s", ids("s")),
    ("Question:", "", END),  # no token at all
    ("", "", END),
    (chat("hi"), "", END),
    ("Question: ", "", ids(" ")),  # spaces that end a context open its continuation
    ("Question:", " 12", ids("Question: 12")[len(ids("Question:")) :]),
    ("Question:", "\n", ids("\n")),
]


@pytest.mark.parametrize(("context", "choice", "scored"), CHOICES)
def test_a_choice_is_scored_by_tokens_of_its_own(context: str, choice: str, scored: list[int]) -> None:
    ((before, own),) = pairs([(context, choice)], TOKENIZER, prefix=99)
    assert own == scored
    assert before == (pairs([(context, "zz")], TOKENIZER, prefix=99)[0][0])


def test_a_choice_without_a_token_does_not_win_for_nothing() -> None:
    lm = LladaLM(Responder(*tiny_pair(), ResponderOptions(BenchmarkSettings(samples=2))))
    asked = [type("Request", (), {"args": (context, choice)}) for context, choice, _ in CHOICES]
    assert all(value < 0 for value, _ in lm.loglikelihood(asked))
