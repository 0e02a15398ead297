"""Text with gaps, pinned words, and the sudoku grid."""

import re

import pytest

from app import fill
from app.canvas import DONE, GIVEN, fixed_tokens, for_template, parse_template, unwritten
from app.conversation import LiveAnswer
from app.models import UserError
from llada_core.sampling.params import SamplingParams

SOLVED = "1234341221434321"


def encode(text):
    return [ord(c) for c in text]


def test_gaps_become_masks_where_they_stand():
    assert parse_template("ab[[2]]c[[ ]]", encode, -1, 100) == [97, 98, -1, -1, 99, *[-1] * 8]


@pytest.mark.parametrize(
    ("text", "says"),
    [("no gap", "Mark where"), ("[[0]]", "length 0"), ("a[[999999999]]", "at most 100"), ("", "Mark where")],
)
def test_texts_that_cannot_be_filled_are_refused(text, says):
    with pytest.raises(ValueError, match=says):
        parse_template(text, encode, -1, 100)


def test_pins_are_positions_of_the_answer():
    assert fixed_tokens(9, "0:ab, 5: c", encode) == {0: 97, 1: 98, 5: 99}
    assert fixed_tokens(9, "", encode) == {}
    for wrong in ("ab", "x:y", "8:abc", "3"):
        with pytest.raises(ValueError, match="pin"):
            fixed_tokens(9, wrong, encode)


def test_a_gap_is_filled_and_the_rest_stays(loaded):
    template = parse_template("12[[3]]5", loaded.tokenizer.encode, loaded.tokenizer.special.mask_id, 100)
    asked = SamplingParams(max_new_tokens=64, block_length=64, steps=64, stop_at_eos=True)
    params = for_template(asked, [template], loaded.tokenizer.special.mask_id)
    answer = LiveAnswer()
    frames = list(answer.run(loaded, loaded.fill(template, params), read=loaded.tokenizer.decode))
    assert len(frames) == 3
    final = frames[-1].tokens.tolist()
    assert [
        t for t, m in zip(final, template, strict=True) if m != loaded.tokenizer.special.mask_id
    ] == loaded.tokenizer.encode("12") + loaded.tokenizer.encode("5")
    assert frames[-1].state.tolist()[:2] == [GIVEN, GIVEN]
    assert answer.counts.tokens == 3
    assert answer.text == loaded.tokenizer.decode(final)


def test_a_typed_grid_is_checked():
    values = ["1", "", None, "0", *[""] * 12]
    assert fill.puzzle_of(values) == "1" + "0" * 15
    with pytest.raises(UserError, match="1 to 4"):
        fill.puzzle_of(["5", *[""] * 15])
    with pytest.raises(UserError, match="row 1 column 1, row 1 column 2"):
        fill.puzzle_of(["1", "1", *[""] * 14])


def test_cells_that_break_a_rule_are_marked():
    wrong = "1134" + SOLVED[4:]
    html = fill.grid(SOLVED, unwritten([DONE] * 16), wrong, "")
    assert [i for i, t in enumerate(re.findall(r"<i [^>]*>", html)) if "breaks a rule" in t] == [0, 1, 9]


def test_a_changed_given_is_marked():
    html = fill.grid("2" + "0" * 15, unwritten([DONE] * 16), SOLVED, "")
    assert html.count("breaks a rule") == 1


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (SOLVED, "Solved:"),
        (" ".join(SOLVED), "Solved:"),
        ("2143" + "3412" + "1234" + "4321", "changed a given"),
        (SOLVED[:-1], "Not solved: the model wrote 123434122143432."),
        ("1" * 16, "Not solved"),
        ("", "the model wrote nothing"),
    ],
)
def test_the_verdict_is_the_verifiers(answer, says):
    assert says in fill.solved("1" + "0" * 15, answer)
