"""A model for people: on the page and on its card."""

import json

import pytest

from app.card import IDS, as_html, as_markdown, describe, score_rows, welcome
from app.guide import PUZZLES
from app.models import ModelIndex
from llada_core.sampling.params import SamplingParams
from llada_core.usage import Usage
from tasks.project import Project
from tasks.record.registry import Version

DIGEST = "c9" * 32
TAGS = {
    "stage_runs": json.dumps({"sft": "sft-1", "pretrain": "pretrain-1"}),
    "champion.record": json.dumps({"when": "2026-11-27T19:37:14+0000", "who": "ada", "why": "there was no champion"}),
    "content_hash": DIGEST,
    "inputs": json.dumps({"data/sft": DIGEST}),
    "folder": "/somewhere/private",
}
OWN = Usage(
    sampling=SamplingParams(34, 17, 34, threshold=0.999, stop_at_eos=True),
    turns="single",
    examples=tuple(known.question for known in PUZZLES.values()),
)
SCORES = {"sudoku": {str(n): float(n < 93) for n in range(100)}, "countdown": {str(n): float(n < 1) for n in range(8)}}


class Known(ModelIndex):
    """One version whose weights lie in a folder."""

    def version(self, name):
        return Version("puzzles", "3", DIGEST, TAGS, ("champion",))

    def folder(self, name):
        return self.project.root

    def usage(self, name):
        return OWN

    def scores(self, name):
        return SCORES


@pytest.fixture
def sections(model_folder):
    return {
        section.title: dict(section.rows) for section in describe(Known(Project(model_folder)), "models:/puzzles/3")
    }


def test_a_model_is_described_without_being_loaded(sections):
    assert list(sections)[-1] == IDS
    assert "weights" in sections["What it is"]["kind"]
    assert "reads 700 tokens at most" in sections["What it is"]["kind"]
    trained = sections["What it was trained on"]
    assert trained["stages"] == "pretraining, then fine-tuning"
    assert "mean nothing" in trained["nothing else"]
    assert sections["How to use it"]["conversations"].startswith("one question at a time")
    assert "in blocks of 17, whatever is 0.999 sure" in sections["How to use it"]["settings"]
    assert sections["Where it comes from"]["champion"] == "2026-11-27 19:37 by ada: there was no champion"


def test_identifiers_are_behind_a_fold_and_paths_of_ours_nowhere(model_folder):
    found = describe(Known(Project(model_folder)), "models:/puzzles/3")
    for text in (as_html(found), as_markdown(found)):
        shown, fold, hidden = text.partition("<details>")
        assert fold
        assert DIGEST[:12] not in shown
        assert DIGEST[:12] in hidden
        assert DIGEST not in text
        assert "/somewhere/private" not in text


def test_scores_have_intervals_and_what_is_published_beside_them():
    rows = dict(score_rows({**SCORES, "instruct_gsm8k": {"1": 1.0, "2": 0.0}, "empty": {}}))
    assert rows["sudoku"] == "93.0 % [86.3, 96.6] of 100 questions"
    assert rows["instruct_gsm8k"].startswith("50.0 % [9.5, 90.5] of 2 questions · published by ")
    assert "(LLaDA-8B-Instruct)" in rows["instruct_gsm8k"]
    assert "empty" not in rows


def test_a_name_that_leads_nowhere_is_said(tmp_path):
    (section,) = describe(ModelIndex(Project(tmp_path)), "models:/nothing@champion")
    assert "no model 'nothing' is registered" in section.rows[0][1]


def test_the_start_says_what_happens_what_the_model_can_do_and_what_not():
    text = welcome(OWN, SCORES)
    assert "all is masked at first, and each step writes what it is surest of" in text
    assert text.count("class=strip") == 4
    for known in PUZZLES.values():
        assert known.says in text
        assert known.question in text
        assert known.answer in text
    assert "Right 93 % of the time [86, 97]." in text
    assert "trained on these three kinds of puzzle and on nothing else" in text
    assert "seldom gets Countdown right, so no example" in text
    assert "It learnt single questions" in text
    general = welcome(Usage(examples=("Why?",)), {})
    assert "puzzle" not in general
    assert "single" not in general
