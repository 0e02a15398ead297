"""The sampler panel: every value with its range and its sentence; presets; refusals."""

import dataclasses

import pytest

from app import panel
from app.models import UserError
from llada_core.sampling.params import PRESETS, SamplingParams, exactness, preset

BASE = SamplingParams(max_new_tokens=32, block_length=8, steps=32, stop_at_eos=True)


def test_every_setting_has_a_description():
    assert list(panel.SETTINGS) == [name for name in vars(BASE) if name != "rule"]  # it names code to be run
    assert all(len(setting.description) > 20 for setting in panel.SETTINGS.values())


def test_ranges_are_those_of_the_params():
    settings = panel.SETTINGS
    assert (settings["steps"].low, settings["steps"].kind) == (1, "integer")
    assert (settings["threshold"].low, settings["threshold"].high, settings["threshold"].optional) == (0, 1, True)
    assert settings["remasking"].choices == ("low_confidence", "random", "margin", "entropy")
    assert settings["forbid_tokens"].kind == "list"
    assert settings["stop_at_eos"].kind == "switch"


def test_what_the_panel_shows_comes_back_unchanged():
    made = dataclasses.replace(BASE, threshold=0.9, forbid_tokens=(3, 4), seed=7)
    shown = {
        name: ", ".join(map(str, value)) if isinstance(value, tuple) else "" if value is None else value
        for name, value in vars(made).items()
    }
    assert panel.params(shown) == made


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("steps", 0, "steps.*greater than or equal to 1"), ("temperature", -1, "temperature"),
        ("threshold", "abc", "number"), ("threshold", "2", "threshold"), ("forbid_tokens", "1, x", "token numbers"),
        ("max_new_tokens", 100_000, "at most"), ("block_length", 1.5, "valid integer"),
        ("remasking", "magic", "remasking"), ("steps", float("inf"), "finite number"), ("threshold", "9" * 5000, "5,000 characters"), ("temperature", "nan", "number"),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_one_sentence(name, value, says):
    with pytest.raises(UserError, match=says):
        panel.params({**vars(BASE), name: value})


def test_settings_that_exclude_each_other_are_refused():
    with pytest.raises(UserError, match="one choice"):
        panel.params({**vars(BASE), "threshold": "0.9", "factor": "1"})


def test_presets_say_whether_they_are_exact():
    assert exactness(preset("exact", BASE)).startswith("Exact")
    assert exactness(preset("creative", BASE)).startswith("Drawn at random (temperature 0.8)")
    assert exactness(preset("fast", BASE)).startswith("Approximate: the prefix cache")
    assert exactness(dataclasses.replace(BASE, steps=16)).startswith("Approximate: 32 tokens in 16 steps")
    assert preset("exact", BASE).stop_at_eos
    with pytest.raises(ValueError, match="there are exact"):
        preset("magic", BASE)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_run(loaded, name):
    from app.conversation import Conversation

    chat = Conversation()
    chat.ask("12 + 3")
    assert list(chat.reply(loaded, preset(name, BASE)))


def test_a_choice_that_may_be_left_out_has_a_field_for_it():
    """What the page sends for it is a choice of its own, and no setting."""
    component = panel._component(panel.SETTINGS["sampler"], None)
    assert [value for _, value in component.choices] == ["", "llada2.0", "llada2.1"]
    assert component.preprocess(component.value) == ""
    assert panel.params({**vars(BASE), "sampler": ""}).sampler is None
    assert panel.params({**vars(BASE), "sampler": "llada2.0", "threshold": "0.9"}).sampler == "llada2.0"


def test_fast_says_what_was_measured_for_this_model_or_how_to_measure_it(tmp_path):
    from app.models import ModelIndex
    from app.panel import FAST, cost_of_fast
    from llada_core.evaluation.speed import EXACT, Point, as_values
    from llada_core.sampling.params import preset
    from tasks.folders import write_json
    from tasks.project import Project

    index, name = ModelIndex(Project(tmp_path)), "models:/puzzles@champion"
    assert f"llada eval BENCHMARK -m {name} --speed {FAST} does" in cost_of_fast(index, name)
    points = {
        EXACT: {"plain": Point((1.0,) * 100, 30, 30, 1)},
        FAST: {"plain": Point((1.0,) * 97 + (0.0,) * 3, 30, 4, 9)},
    }
    folder = tmp_path / "reports/checkpoints/puzzles-at-champion"
    folder.mkdir(parents=True)
    write_json(folder / "speed-sudoku.json", as_values("sudoku", points))
    assert "Measured here for this model: sudoku 97.0 % right, -3.0 [" in cost_of_fast(index, name)
    fast = preset("fast", SamplingParams(8, 8, 8))
    assert f"cache={fast.cache},threshold={fast.threshold}" == FAST
