"""What a canvas looks like, and that no text can get out of its tile."""

import dataclasses
import itertools
import re
from pathlib import Path

import numpy as np
import pytest

from app.canvas import DONE, END, LEVELS, OPEN, STATES, Frame, printable, readable
from app.conversation import Turn
from app.guide import Verdict
from app.render import LEGEND, canvas, conversation, escape, legend, notice, table, tile


def frame(state, confidence=0.9, width=1, block=(0, 0)):
    """So many positions in one state."""
    tokens, sure = np.zeros(width, np.int32), np.full(width, confidence, np.float32)
    return Frame(tokens, tokens, sure, np.full(width, state, np.int8), block)


CSS = Path(__file__).parents[2] / "app" / "page.css"
NASTY = [
    "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "${alert(1)}", "{{value}}", "`x`", "</i>", "&lt;",
    "\u202eabc", "\u2066abc\u2069", "\ud800", "\x1b[31m", "\x00", "a" * 10_000, "\u0301" * 500, "'onmouseover='x",
]  # fmt: skip


@pytest.mark.parametrize("text", NASTY)
def test_no_text_gets_out_of_its_tile(text):
    html = tile(frame(DONE), 0, printable(text))
    inside = re.fullmatch(r'<i class="d c4"(?: title="([^"<>]*)")?>([^<>]*)</i>', html)
    assert inside, html
    assert not set("{}$`") & set(inside[2].replace("&#123;", "").replace("&#125;", "").replace("&#36;", ""))
    html.encode("utf-8")


@pytest.mark.parametrize("text", NASTY)
def test_no_text_gets_out_of_the_conversation_a_notice_or_a_table(text):
    said = readable(text)
    turn = Turn(said, said, Verdict(False, said))
    for html in (conversation([turn], note=said), notice(said), table([(said, said)])):
        assert "<script" not in html
        assert "<img" not in html
        assert "${" not in html
        assert "{{" not in html
        html.encode("utf-8")


def test_direction_signs_and_half_surrogates_are_shown_by_number_or_replaced():
    assert printable("\u202eabc") == "‹202E›abc"
    assert printable("\ud800") == "‹D800›"
    assert readable("a\u202eb\ud800\x1b\nc") == "a\ufffdb\ufffd\ufffd\nc"


def test_white_space_is_visible_and_huge_tokens_are_cut():
    assert [printable(t) for t in ("\n", " ", "  ", "\t", " word", "two\nlines")] == [
        "⏎",
        "␣",
        "␣␣",
        "⇥",
        "word",
        "two⏎lines",
    ]
    assert len(printable("a" * 10_000)) == 64
    assert printable("\u05d0\u05d1") == "\u05d0\u05d1"  # Hebrew itself is no control


def test_every_state_is_told_apart_without_colour():
    states = [tile(frame(state), 0, "4") for state in range(len(STATES))]
    assert len(set(states)) == len(STATES) == 5
    assert 'class="m"' in states[1]
    assert 'class="d f c4"' in states[2]
    assert 'class="d f e c4"' in states[4]
    assert "outline-style: dashed" in CSS.read_text()
    assert "in the place of another token" in legend()
    assert ' b"' in tile(frame(OPEN, block=(0, 1)), 0, "")


def test_confidence_has_five_levels():
    sure = np.array([0.0, 0.19, 0.2, 0.5, 0.99, 1.0, 1.5, -1.0, np.nan])
    several = dataclasses.replace(frame(DONE, width=9), confidence=sure)
    assert [several.level(at) for at in range(9)] == [0, 0, 1, 2, 4, 4, 4, 0, 2]


def lightness(colour):
    channels = [
        int(c * (2 if len(colour) == 4 else 1), 16) / 255 for c in re.findall("." * (len(colour) // 3), colour[1:])
    ]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    low, high = sorted((lightness(one), lightness(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", ["", ".dark "])
def test_shades_are_told_apart_by_lightness_alone_and_text_on_them_is_readable(theme):
    css = CSS.read_text()
    found = [
        re.search(
            rf"(?<!\.dark ){re.escape(theme)}\.lf i\.c{n} {{ background: (#\w+);[^}}]*? color: (#\w+);", css
        ).groups()
        for n in range(LEVELS)
    ]
    grounds = [ground for ground, _ in found]
    assert sorted(grounds, key=lightness, reverse=not theme) == grounds
    assert all(contrast(a, b) > 1.2 for a, b in itertools.pairwise(grounds))
    assert all(contrast(ground, ink) >= 4.5 for ground, ink in found)


def test_a_canvas_has_as_many_tiles_at_every_step_so_nothing_jumps():
    early = canvas(frame(OPEN, np.nan, 30, (0, 30)), [""] * 30, "step 1")
    late = canvas(frame(DONE, 1.0, 30, (0, 30)), ["longword"] * 30, "step 30")
    assert early.count("<i ") == late.count("<i ") == 30
    assert early.count("<p") == late.count("<p") == 1
    assert 'aria-label="canvas: 0 of 30 positions written"' in early


def test_nothing_behind_the_end_looks_written():
    html = canvas(frame(DONE, 1.0, 5), ["4", "2", END, "At", END])
    assert re.findall(r'<i class="([^"]*)"', html) == ["d c4", "d c4", "d c4", "d z", "d z"]
    whole = canvas(frame(DONE, 1.0, 5), ["4", "2", END, "At", END], ends=False)
    assert "d z" not in whole
    assert "d z" not in canvas(frame(OPEN, 1.0, 3), [END, "guess", "guess"]), "a guessed end is none yet"


def test_the_legend_names_every_kind_of_tile():
    html = legend()
    assert {kind for kind, _, _ in LEGEND} >= {"m", "m b", "d f c4", "d c0", "d c2", "d c4", "d z", "g"}
    assert f">{END}</i> the answer ends" in html


def test_escape_leaves_plain_text_readable():
    assert escape("2 + 3 = 5, isn't it?") == "2 + 3 = 5, isn&#x27;t it?"


def test_a_canvas_of_512_tokens_stays_small_enough_to_stream():
    assert len(canvas(frame(DONE, 0.5, 512), ["token"] * 512)) < 32_000
