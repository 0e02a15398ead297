"""Text with gaps, pinned words, and the sudoku grid."""

import re

import pytest

from app import fill
from app.canvas import Cell, for_template, pinned, with_gaps
from app.conversation import Refused, Writing
from llada_core.sampling.params import SamplingParams

SOLVED = "1234341221434321"


def encode(text):
    return [ord(c) for c in text]


def test_gaps_become_masks_where_they_stand():
    assert with_gaps("ab[[2]]c[[ ]]", encode, -1, 100) == [97, 98, -1, -1, 99, *[-1] * 8]


@pytest.mark.parametrize(
    ("text", "says"),
    [("no gap", "Mark where"), ("[[0]]", "length 0"), ("a[[999999999]]", "at most 100"), ("", "Mark where")],
)
def test_texts_that_cannot_be_filled_are_refused(text, says):
    with pytest.raises(ValueError, match=says):
        with_gaps(text, encode, -1, 100)


def test_pins_are_positions_of_the_answer():
    assert pinned(9, "0:ab, 5: c", encode) == {0: 97, 1: 98, 5: 99}
    assert pinned(9, "", encode) == {}
    for wrong in ("ab", "x:y", "8:abc", "3"):
        with pytest.raises(ValueError, match="pin"):
            pinned(9, wrong, encode)


def test_a_gap_is_filled_and_the_rest_stays(engine):
    template = with_gaps("12[[3]]5", engine.encode, engine.mask_id, 100)
    asked = SamplingParams(max_new_tokens=64, block_length=64, steps=64, stop_at_eos=True)
    params = for_template(asked, [template], engine.mask_id)
    writing = Writing()
    frames = list(writing.run(engine.fill(template, params), engine.decode))
    assert len(frames) == 3
    final = frames[-1].tokens.tolist()
    assert [t for t, m in zip(final, template, strict=True) if m != engine.mask_id] == engine.encode(
        "12"
    ) + engine.encode("5")
    cells = writing.trace.cells(frames[-1], engine.decode)
    assert [c.state for c in cells][:2] == ["given", "given"]
    assert writing.counts.tokens == 3


def test_a_typed_grid_is_checked():
    values = ["1", "", None, "0", *[""] * 12]
    assert fill.typed(values) == "1" + "0" * 15
    with pytest.raises(Refused, match="1 to 4"):
        fill.typed(["5", *[""] * 15])
    with pytest.raises(Refused, match="row 1 column 1, row 1 column 2"):
        fill.typed(["1", "1", *[""] * 14])


def test_cells_that_break_a_rule_are_marked():
    assert fill.conflicts(SOLVED) == set()
    assert fill.solved(SOLVED)
    assert fill.conflicts("1" + "0" * 14 + "1") == set()
    assert fill.conflicts("10001" + "0" * 11) == {0, 4}
    wrong = "1134" + SOLVED[4:]
    html = fill.grid(SOLVED, [Cell(d, "done", 0.9, False) for d in wrong], "")
    assert [i for i, t in enumerate(re.findall(r"<i [^>]*>", html)) if "breaks a rule" in t] == [0, 1, 9]


def test_a_changed_given_is_marked():
    html = fill.grid("2" + "0" * 15, [Cell(d, "done", 0.9, False) for d in SOLVED], "")
    assert html.count("breaks a rule") == 1
