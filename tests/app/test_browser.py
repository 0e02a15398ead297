"""The page in a real browser: Debian's Chromium, driven by Playwright."""

import dataclasses
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.models import AppState, LoadedModel, ModelIndex, UserError
from app.panel import SETTINGS
from llada_core.sampling.params import SamplingParams
from llada_core.usage import Usage
from tasks.project import Project
from tests.app.oracle import oracle
from tests.ports import free_port

pytestmark = pytest.mark.browser
CHROMIUM = Path("/usr/bin/chromium")
PATIENCE = 180  # seconds that a busy machine may take for one wait
PUZZLE = "1030340020030001"
SOLVED = "1234341221434321"


# Slow: 512 steps at one a second, and nothing on a busy machine takes as long as such an answer.
SPEEDS = {"slow": 512.0, "normal": 4.0, "instant": 0.0}


class Moving:
    """A model cache whose champion can be moved or removed while the page is open."""

    def __init__(self) -> None:
        self.engines = {"champion": oracle("champion"), "other": oracle("other", "Something else.")}

    def get(self, name):
        if name not in self.engines:
            raise UserError(f"There is no model {name!r}.")
        loaded = self.engines[name]
        return loaded, "" if loaded.name == name else f"{name} moved: another version answers from now on."


class Known(ModelIndex):
    """The index of the oracle."""

    def names(self):
        return ["champion", "other"]

    def usage(self, name):
        sampling = SamplingParams(max_new_tokens=24, block_length=12, steps=24, stop_at_eos=False)
        if name == "other":
            return Usage(sampling=sampling, examples=("Who are you?",))
        return Usage(sampling=sampling, examples=("Reach 21 with 8, 4, 9", f"Solve the sudoku {PUZZLE}"))

    def scores(self, name):
        return {"sudoku": {str(n): float(n < 97) for n in range(100)}, "countdown": {"1": 0.0, "2": 0.0}}


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    return AppState(
        Moving(), Known(Project(tmp_path_factory.mktemp("project"))), "champion", speeds=SPEEDS, speed="instant"
    )


@pytest.fixture(scope="module")
def url(state) -> Iterator[str]:
    from app import page
    from app.__main__ import options

    blocks = page.build_page(state)
    blocks.launch(server_port=free_port(), prevent_thread_lock=True, quiet=True, **options())
    yield blocks.local_url
    blocks.close()


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is missing; install it: apt-get install -y chromium")
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is missing; pip install playwright")
    with sync.sync_playwright() as play:
        started = play.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"], timeout=1000 * PATIENCE)
        yield started
        started.close()


@pytest.fixture
def tab(browser, url):
    page = opened(browser, url)
    yield page
    assert page.faults == []
    page.close()


def opened(browser, url, **options):
    """A page that remembers what went wrong on it, and what it asked of other hosts."""
    page = browser.new_page(viewport={"width": 1280, "height": 900}, **options)
    page.set_default_timeout(1000 * PATIENCE)
    page.faults = []
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.on("dialog", lambda dialog: (page.faults.append(dialog.message), dialog.dismiss()))
    page.on(
        "request",
        lambda r: (
            None if r.url.startswith((url.split("?")[0], "data:", "blob:", "about:")) else page.faults.append(r.url)
        ),
    )
    page.goto(url)
    page.wait_for_selector("#send")
    return page


def ask(page, text):
    page.fill("#message textarea", text)
    page.press("#message textarea", "Enter")


def answer(page, number=-1):
    said = page.locator("#talk .turn.model")
    page.wait_for_function(
        "() => !document.querySelector('#talk .wait') && document.querySelector('#talk .turn.model')"
    )
    return said.nth(number).locator(".said").inner_text()


def pick(page, name):
    page.get_by_role("tab", name=name).click()


def choose(page, box, value):
    page.click(f"{box} input")
    page.locator(box).get_by_role("option", name=value, exact=True).click()


def slowly(page, block="512"):
    """512 tokens, a step a second."""
    for knob, value in {"max_new_tokens": "512", "steps": "512", "block_length": block}.items():
        page.get_by_label(knob, exact=True).fill(value)
        page.keyboard.press("Tab")
    page.locator("#speed").get_by_role("radio", name="slow").check()


def tiles(page):
    """How many positions of each kind stand on the page at one moment, once something was just written, and their texts."""
    found = page.wait_for_function(
        """() => {
            const all = [...document.querySelectorAll('#talk .tiles i')];
            if (!all.some(tile => tile.classList.contains('f'))) return null;
            const count = kind => all.filter(tile => tile.classList.contains(kind)).length;
            return {d: count('d'), m: count('m'), b: count('b'), texts: all.map(tile => tile.innerText)};
        }"""
    )
    return found.json_value()


def test_the_page_explains_itself_before_anything_is_asked(tab):
    said = tab.inner_text("#talk .welcome")
    assert "all is masked at first, and each step writes what it is surest of" in said
    assert tab.locator("#talk .picture .frame").count() == 4
    assert "fill the zeros so that every row, column and 2x2 box holds 1 to 4. Right 97 % of the time" in said
    assert SOLVED in said
    assert "trained on these two kinds of puzzle and on nothing else" in said
    assert tab.locator("#talk").get_by_text("seldom gets Countdown right").is_visible()
    offered = tab.inner_text("#examples")
    assert "sudoku" in offered
    assert "Reach 21" not in offered, "what seldom succeeds is no example"
    legend = tab.inner_text("#line")
    for kind in ("masked", "just written", "unsure", "fairly sure", "the answer ends", "behind the end", "given"):
        assert kind in legend
    choose(tab, "#model", "other")
    tab.wait_for_selector("#examples :text('Who are you?')")
    assert "puzzle" not in tab.inner_text("#talk")


def test_a_sudoku_is_asked_by_a_click_on_an_example_and_solved(tab):
    tab.locator("#examples").get_by_text(f"Solve the sudoku {PUZZLE}").click()
    assert answer(tab) == SOLVED
    assert "Right: every row" in tab.inner_text("#talk .verdict.good")
    assert re.search(r"24 steps · 24 forwards · 1\.00 tokens per forward", tab.inner_text("#talk"))
    assert tab.locator("#talk .tiles i").count() == 24


def test_the_grid_is_typed_by_keyboard_solved_and_checked(tab):
    pick(tab, "Sudoku")
    at = "() => [0, 1, 2].map(n => ['left', 'top'].map(way => document.querySelector(`#cell-${way == 'top' ? n : 0}-${way == 'top' ? 0 : n}`).getBoundingClientRect()[way]))"
    (left, top), (second, below), (third, lower) = tab.evaluate(at)
    assert third - second > second - left, "boxes stand apart"
    assert lower - below > below - top
    assert "".join(tab.locator("#board i").all_inner_texts()) == PUZZLE.replace("0", ""), (
        "a puzzle stands there at first"
    )
    tab.click("#clear")
    tab.wait_for_function("() => document.querySelector('#board').innerText.trim() == ''")
    tab.focus("#cell-0-0 input, #cell-0-0 textarea")
    for digit in PUZZLE:
        if digit != "0":
            tab.keyboard.type(digit)
        tab.keyboard.press("Tab")
    tab.click("#solve")
    tab.wait_for_selector("#verdict :text('Solved')")
    assert "".join(tab.locator("#board i").all_inner_texts()) == SOLVED
    tab.focus("#cell-0-1 input, #cell-0-1 textarea")
    tab.keyboard.type("1")
    tab.wait_for_selector("#board i.x")
    assert "Two equal digits" in tab.inner_text("#verdict")


def test_stop_keeps_what_is_there(tab):
    slowly(tab)
    ask(tab, "hello")
    before = tiles(tab)
    tab.click("#stop")
    tab.wait_for_selector("#talk :text('Stopped')")
    assert 0 < before["d"] <= tab.locator("#talk .tiles i.d").count() < 512
    said = tab.locator("#talk .turn.model .said").inner_text()
    assert "_" in said, "gaps are kept"


def test_who_cannot_wait_sees_the_rest_at_once(tab):
    slowly(tab)
    ask(tab, "hello")
    tiles(tab)
    tab.locator("#speed").get_by_role("radio", name="instant").check()
    tab.wait_for_selector("#talk :text('tokens/s')")
    assert answer(tab) == "I know sudokus only."


def test_what_is_behind_the_end_is_not_shown_as_written(tab):
    ask(tab, "hello")
    assert answer(tab) == "I know sudokus only."
    tab.wait_for_selector("#talk :text('tokens/s')")
    texts = tab.locator("#talk .tiles i").all_inner_texts()
    assert tab.locator("#talk .tiles i.z").count() == len(texts) - texts.index("∎") - 1 > 0


def test_right_and_wrong_are_told_and_what_the_model_does_not_know(tab, state, monkeypatch):
    usage = Usage(examples=(f"Solve the sudoku {PUZZLE}",))
    monkeypatch.setitem(state.cache.engines, "champion", dataclasses.replace(oracle("champion"), usage=usage))
    for text, verdict in (
        (f"Solve the sudoku {PUZZLE}", ".good:has-text('Right: every row')"),
        ("Make 5 from 1, 2, 2", ".bad:has-text('Wrong: it must use 1, 2, 2, each once')"),
        ("hello", ":has-text('none of the puzzles that the model was trained on')"),
    ):
        ask(tab, text)
        tab.wait_for_selector(f"#talk .verdict{verdict}")


# A value that alone makes the settings impossible.
REFUSED = {
    "max_new_tokens": "-3", "block_length": "7", "steps": "5", "temperature": "-1", "cfg_scale": "-1", "threshold": "2",
    "factor": "-1", "forbid_tokens": "abc", "defer_tokens": "abc", "seed": "abc", "entropy_bound": "1",
    "cfg_keep_tokens": "3", "cache_refresh": "2", "cache_window": "4", "editing_threshold": "2", "max_post_steps": "-1",
    "num_to_transfer": "0", "top_k": "0", "top_p": "2",
}  # fmt: skip


def test_no_refused_setting_wedges_the_chat(tab):
    """Every setting that takes a number or a text, to a value that is refused, and back."""
    tab.get_by_text("All settings").click()
    texts = {name for name, setting in SETTINGS.items() if setting.kind in ("integer", "number", "list", "text")}
    assert set(REFUSED) == texts
    for name, value in REFUSED.items():
        knob = tab.locator(f"#setting-{name}").locator("input, textarea")
        before = knob.input_value()
        knob.fill(value)
        knob.press("Tab")
        ask(tab, f"hello {name}")
        tab.wait_for_selector("#talk .note.bad")
        assert tab.locator("#talk .turn, #talk .tiles").count() == 0, "a refused question leaves nothing behind"
        tab.wait_for_function(f"() => document.querySelector('#message textarea').value == 'hello {name}'")
        knob.fill(before)
        knob.press("Tab")
        tab.press("#message textarea", "Enter")
        assert answer(tab) == "I know sudokus only.", name
        assert tab.locator("#talk .note.bad").count() == 0
        tab.click("#new")
        tab.wait_for_selector("#talk .welcome")


def test_an_error_clears_what_it_replaces(tab):
    ask(tab, f"Solve the sudoku {PUZZLE}")
    tab.wait_for_selector("#talk :text('tokens/s')")
    tab.get_by_label("block_length", exact=True).fill("7")
    tab.keyboard.press("Tab")
    ask(tab, "hello")
    tab.wait_for_selector("#talk .note.bad")
    assert tab.locator("#talk .turn.user").count() == 1
    assert tab.locator("#talk .tiles").count() == 0
    assert "tokens/s" not in tab.inner_text("#talk")
    for view, button, error, left in (
        ("Infill", "#fill", "#infilled .note.bad", "#infilled .tiles"),
        ("Compare", "#compare", "#left-canvas .note.bad", "#right-canvas .tiles"),
        ("Sudoku", "#solve", "#verdict .note.bad", "#board .d"),
    ):
        pick(tab, view)
        if view == "Compare":
            choose(tab, "#left-preset", "as in the sidebar")
        tab.click(button)
        tab.wait_for_selector(error)
        assert tab.locator(left).count() == 0, view


def test_while_it_writes_a_second_question_is_told_to_wait_and_a_new_conversation_begins(tab):
    slowly(tab)
    ask(tab, "hello")
    tiles(tab)
    ask(tab, "second")
    tab.wait_for_selector("#talk :text('press Stop first')")
    assert tab.input_value("#message textarea") == "second"
    written = tab.locator("#talk .tiles i.d").count()
    tab.wait_for_function(f"() => document.querySelectorAll('#talk .tiles i.d').length > {written + 1}")
    assert tab.locator("#talk :text('press Stop first')").count(), "the next step does not paint it over"
    tab.click("#new")
    tab.wait_for_selector("#talk .welcome")
    tab.locator("#speed").get_by_role("radio", name="instant").check()
    ask(tab, f"Solve the sudoku {PUZZLE}")
    tab.wait_for_selector("#talk .verdict.good")
    assert tab.locator("#talk .turn.user").count() == 1


def test_several_turns_edit_undo_again_and_copy(tab, state, monkeypatch):
    ask(tab, "one")
    assert answer(tab) == "I know sudokus only."
    ask(tab, "two")
    tab.wait_for_function("() => document.querySelectorAll('#talk .turn.model').length == 2")
    answer(tab)
    tab.click("#undo")
    tab.wait_for_function("() => document.querySelectorAll('#talk .turn.model').length == 1")
    assert tab.input_value("#message textarea") == "two"
    monkeypatch.setitem(state.cache.engines, "champion", oracle("champion", "Still sudokus only."))
    tab.click("#again")
    tab.wait_for_selector("#talk .turn.model:has-text('Still sudokus only.'):has-text('tokens/s')")
    monkeypatch.undo()
    tab.locator("#talk .turn.user button", has_text="Edit").first.click()
    tab.wait_for_selector("#talk :text('Send replaces question 1')")
    ask(tab, "")
    tab.wait_for_selector("#talk :text('Send replaces question 1')", state="detached")
    assert tab.locator("#talk .turn.user").count() == 1
    tab.locator("#talk .turn.user button", has_text="Edit").first.click()
    tab.wait_for_function("() => document.querySelector('#message textarea').value == 'one'")
    ask(tab, f"Solve the sudoku {PUZZLE}")
    tab.wait_for_function(f"() => document.querySelector('#talk').innerText.includes('{SOLVED}')")
    assert tab.locator("#talk .turn.user").count() == 1
    tab.locator("#talk .turn.model button", has_text="Copy").click()
    assert tab.evaluate("() => getSelection().toString()").strip() == SOLVED


def test_a_message_cannot_become_part_of_the_page(tab):
    nasty = "<script>alert(1)</script><img src=x onerror=alert(2)> ${alert(3)} {{value}} \u202e"
    with tab.expect_response(lambda response: "queue/join" in response.url):
        ask(tab, "")
    tab.wait_for_selector("#talk :text('the message is empty')")
    ask(tab, nasty)
    answer(tab)
    assert tab.locator("#talk .turn.user .said").inner_text() == nasty.replace("\u202e", "\ufffd")
    assert tab.locator("#talk img, #talk script").count() == 0


def test_what_a_model_writes_cannot_become_part_of_the_page(tab, state, monkeypatch):
    nasty = "<svg onload=alert(1)>${1}"
    monkeypatch.setitem(state.cache.engines, "champion", oracle("champion", nasty))
    tab.get_by_label("Show guesses").check()
    ask(tab, "hello")
    assert answer(tab) == nasty
    assert tab.locator("#talk svg").count() == 0
    pick(tab, "Replay")
    tab.frame_locator("#replay iframe").locator("#tiles i").nth(23).wait_for()
    assert tab.frame_locator("#replay iframe").locator("svg").count() == 0


def test_guesses_and_the_present_block_are_shown_while_it_writes(tab):
    slowly(tab, block="256")
    tab.get_by_label("Show guesses").check()
    ask(tab, f"Solve the sudoku {PUZZLE}")
    seen = tiles(tab)
    assert seen["b"] == 256
    assert seen["d"] + seen["m"] == 512
    assert "".join(seen["texts"][:16]) == SOLVED, "guesses stand at masked positions"
    tab.click("#stop")
    tab.wait_for_selector("#talk :text('Stopped')")
    assert tab.locator("#talk .tiles i.b").count() == 0


def test_who_waits_sees_a_place_in_the_line(browser, url, state):
    loaded = state.cache.engines["champion"]
    tabs = [opened(browser, url) for _ in range(state.at_once + 2)]
    with loaded.turn:
        for number, page in enumerate(tabs, start=1 - state.at_once):
            ask(page, "hello")
            page.wait_for_selector(f"text=queue: {number}/" if number > 0 else "#talk .wait")
    for page in tabs:
        assert answer(page) == "I know sudokus only."
        page.close()


def test_512_tokens_are_written_in_as_many_tiles(tab):
    for knob, value in (("max_new_tokens", "512"), ("steps", "64"), ("block_length", "512")):
        tab.get_by_label(knob, exact=True).fill(value)
        tab.keyboard.press("Tab")
    tab.wait_for_selector("#exactness :text('512 tokens in 64 steps')")
    presets = [tab.get_by_role("radio", name=name) for name in ("exact", "fast", "creative")]
    assert not any(preset.is_checked() for preset in presets), "own settings are no preset"
    ask(tab, "hello")
    tab.wait_for_selector("#talk :text('tokens/s')")
    assert tab.locator("#talk .tiles i.d").count() == 512
    assert tab.evaluate("() => document.documentElement.scrollWidth <= innerWidth")


def test_everything_in_chat_is_reached_by_keyboard(tab):
    tab.focus("#message textarea")
    tab.keyboard.type("hello")
    tab.keyboard.press("Enter")
    assert answer(tab) == "I know sudokus only."
    reached = []
    tab.focus("#message textarea")
    for _ in range(8):
        tab.keyboard.press("Tab")
        reached.append(tab.evaluate("() => document.activeElement.innerText.trim()"))
    named = [name for name in reached if name]  # between them the speed, which has no text of its own
    assert named[:5] == ["Send", "Stop", "Write again", "Undo", "New conversation"]
    tab.focus("#talk .turn.user button")
    tab.keyboard.press("Enter")
    tab.wait_for_function("() => document.querySelector('#message textarea').value == 'hello'")


def test_nothing_moves_while_the_model_writes(tab):
    places = """() => ['#message', '#send', '#examples', '#line'].map(
        name => document.querySelector(name).getBoundingClientRect().top)"""
    for number in range(1, 4):
        ask(tab, "hello")
        tab.wait_for_function(f"() => document.querySelectorAll('#talk .turn.model').length == {number}")
        answer(tab)
    before = tab.evaluate(places)
    slowly(tab)
    ask(tab, "hello")
    tiles(tab)
    assert tab.evaluate(places) == before
    tab.click("#stop")
    tab.wait_for_selector("#talk :text('Stopped')")
    assert tab.evaluate(places) == before
    inside = "() => [...document.querySelectorAll('#talk .turn')].at(-1).getBoundingClientRect().bottom"
    edge = "() => document.querySelector('#talk').getBoundingClientRect().bottom"
    assert tab.evaluate(inside) <= tab.evaluate(edge), "a long conversation scrolls in its box, down to its end"


def test_replay_slides_shades_saves_and_shows_runners_up(tab, tmp_path):
    ask(tab, f"Solve the sudoku {PUZZLE}")
    answer(tab)
    pick(tab, "Replay")
    inside = tab.frame_locator("#replay iframe")
    inside.locator("#about", has_text="runners-up have not been looked up").wait_for()
    assert not inside.locator("#others").is_visible()
    tab.click("#runners")
    inside.locator("#others").wait_for()
    assert inside.locator("#others tbody tr").count() == 24, "of every position"
    written, others = inside.locator("#others tbody tr").first.locator("td").all_inner_texts()[1:]
    assert written not in others, "the token written is no runner-up"
    assert "step 24 of 24" in inside.locator("#where").inner_text()
    inside.locator("#at").fill("4")
    assert inside.locator("#tiles i.m").count() == 19
    assert inside.locator("#tiles i.f").count() == 1
    inside.locator("#shade").select_option("o")
    assert sorted(t for t in inside.locator("#tiles i.d").all_inner_texts()) == ["1", "2", "3", "4", "5"]
    inside.locator("#tiles i").first.hover()
    inside.locator("#about", has_text="Runners-up").wait_for()
    inside.locator("#tiles i").nth(1).focus()
    inside.locator("#about", has_text="Position 1:").wait_for()
    with tab.expect_download() as saved:
        inside.locator("#save").click()
    saved.value.save_as(tmp_path / "saved.html")
    tab.goto(f"file://{tmp_path}/saved.html")
    tab.faults.clear()
    assert tab.locator("#tiles i").count() == 24
    assert "step 24 of 24" in tab.inner_text("#where")


def test_gaps_are_filled(tab):
    pick(tab, "Infill")
    tab.fill("#gaps textarea", "1+[[2]]=4")
    tab.click("#fill")
    tab.wait_for_selector("#infilled :text('take them away')")
    assert tab.input_value("#infilled-text textarea") == ""
    tab.fill("#pins textarea", "")
    tab.click("#fill")
    tab.wait_for_function("() => document.querySelector('#infilled-text textarea').value == '1+33=4'")
    tab.fill("#pins textarea", "2:XY")
    tab.fill("#gaps textarea", "hello")
    tab.click("#fill")
    tab.wait_for_function("() => document.querySelector('#infilled-text textarea').value == 'I XYow sudokus only.'")
    tab.fill("#pins textarea", "")
    tab.click("#fill")
    tab.wait_for_selector("#infilled :text('no gap like [[5]]')")
    tab.fill("#gaps textarea", "")
    tab.click("#fill")
    tab.wait_for_selector("#infilled :text('the message is empty')")


def test_two_versions_answer_side_by_side(tab):
    pick(tab, "Compare")
    choose(tab, "#right-model", "other")
    choose(tab, "#right-preset", "exact")
    tab.fill("#question textarea, #question input", "hello")
    tab.click("#compare")
    tab.wait_for_function(
        "() => ['left', 'right'].every(side => document.querySelector(`#${side}-answer textarea`).value)"
    )
    assert tab.input_value("#left-answer textarea") == "I know sudokus only."
    assert tab.input_value("#right-answer textarea") == "Something else."
    assert "97.0 %" in tab.inner_text("#left-scores")


def test_one_version_answers_under_two_settings_in_step(tab):
    tab.get_by_label("threshold").fill("0.01")
    pick(tab, "Compare")
    choose(tab, "#left-preset", "as in the sidebar")
    choose(tab, "#right-preset", "exact")
    tab.fill("#question textarea, #question input", "hello")
    tab.click("#compare")
    tab.wait_for_selector("#left-canvas :text('2 steps · 2 forwards')")  # one a block
    tab.wait_for_selector("#right-canvas :text('24 steps · 24 forwards')")


def test_another_model_is_chosen_loaded_and_answers(tab):
    choose(tab, "#model", "other")
    pick(tab, "Model")
    tab.wait_for_selector("#facts :text('How well it does')")
    assert "97.0 % [91.5, 99.0] of 100 questions" in tab.inner_text("#facts")
    assert "llada chat --model other" in tab.inner_text("#facts")
    tab.click("#load")
    tab.wait_for_selector("#loaded :text('other is loaded')")
    pick(tab, "Chat")
    ask(tab, "hello")
    assert answer(tab) == "Something else."


def test_the_panel_says_what_is_approximate_and_what_is_out_of_range(tab):
    tab.get_by_role("radio", name="fast").check()
    tab.wait_for_selector("#exactness :text('Approximate: the prefix cache')")
    assert "was not measured here" in tab.inner_text("#exactness"), "a figure is the model's own, or there is none"
    tab.get_by_role("radio", name="creative").check()
    tab.wait_for_selector("#exactness :text('Drawn at random (temperature 0.8)')")
    tab.get_by_role("radio", name="exact").check()
    tab.wait_for_selector("#exactness :text('Exact: one token per step')")
    assert tab.get_by_role("radio", name="exact").is_checked(), "setting the values of a preset is not changing them"
    tab.evaluate("() => document.activeElement.blur()")  # the pointer is over it still
    paint = "() => getComputedStyle(document.querySelector('input[type=radio]:checked:hover')).backgroundColor"
    assert tab.evaluate(paint) == "rgb(59, 130, 246)", "what is chosen looks chosen under the pointer"
    tab.get_by_label("threshold").press_sequentially("7")  # the first key after a value was set from here counts
    tab.wait_for_selector("#exactness :text('less than or equal to 1')")
    presets = [tab.get_by_role("radio", name=name) for name in ("exact", "fast", "creative")]
    assert not any(preset.is_checked() for preset in presets), "own settings are no preset"
    ask(tab, "hello")
    tab.wait_for_selector("#talk :text('less than or equal to 1')")


def test_the_champion_moves_and_goes_while_the_page_is_open(tab, state, monkeypatch):
    ask(tab, "hello")
    assert answer(tab) == "I know sudokus only."
    monkeypatch.setitem(state.cache.engines, "champion", oracle("newer", "I am newer."))
    ask(tab, "hello")
    tab.wait_for_function("() => document.querySelector('#talk').innerText.includes('I am newer.')")
    assert "newer" in tab.inner_text("#talk")
    monkeypatch.delitem(state.cache.engines, "champion")
    ask(tab, "hello")
    tab.wait_for_selector("#talk :text('There is no model')")


def test_a_closed_tab_frees_the_model(browser, url, state, monkeypatch):
    closed = threading.Event()
    before = state.cache.engines["champion"]

    class Watched(LoadedModel):
        def write(self, *arguments, **options):
            try:
                yield from super().write(*arguments, **options)
            finally:
                closed.set()

    watched = Watched("champion", Path("champion"), before.model, before.tokenizer)
    monkeypatch.setitem(state.cache.engines, "champion", watched)
    page = opened(browser, url)
    slowly(page)
    ask(page, "hello")
    tiles(page)
    assert not closed.is_set()
    page.close()
    assert closed.wait(PATIENCE), "the generator was not closed with the tab"  # the answer alone would take 512 s


def test_two_tabs_have_conversations_of_their_own(browser, url):
    first, second = opened(browser, url), opened(browser, url)
    ask(first, "from the first")
    ask(second, f"Solve the sudoku {PUZZLE}")
    assert answer(first) == "I know sudokus only."
    assert answer(second) == SOLVED
    assert "from the first" not in second.inner_text("#talk")
    assert first.faults == second.faults == []


@pytest.mark.parametrize(("width", "scheme"), [(420, "light"), (1280, "dark")])
def test_a_narrow_window_and_the_dark_theme_are_usable(browser, url, width, scheme):
    page = opened(browser, f"{url}?__theme={scheme}")
    page.set_viewport_size({"width": width, "height": 900})
    if width < 800:
        page.reload()
        page.wait_for_selector("#send")
    page.fill("#message textarea", "hello")
    page.click("#send")  # nothing lies over it
    assert answer(page) == "I know sudokus only."
    assert page.evaluate("() => document.documentElement.scrollWidth <= window.innerWidth")
    ink = page.evaluate("() => getComputedStyle(document.querySelector('#talk .said')).color")
    assert (sum(map(int, re.findall(r"\d+", ink)[:3])) > 380) == (scheme == "dark")
    if width > 800:  # else behind the menu of tabs
        pick(page, "Replay")
        page.frame_locator("#replay iframe").locator(f"html.{scheme}").wait_for()
        style = "part => { const s = getComputedStyle(part); return [s.color, s.backgroundColor]; }"
        ink, ground = page.frame_locator("#replay iframe").locator("#play").evaluate(style)
        assert ground == "rgba(0, 0, 0, 0)", "no white button on a dark page"
        assert sum(map(int, re.findall(r"\d+", ink)[:3])) > 380
    assert page.faults == []
