"""The settings themselves: another length, and the one description that panel, `--help` and docs share."""

from pathlib import Path

import pytest
import typer

from cli.main import llada
from llada_core.sampling.params import PUBLISHED, SamplingParams
from llada_core.settings import ConfigError, describe

CONCEPTS = Path(__file__).parents[2] / "docs" / "concepts.md"


@pytest.mark.parametrize(
    ("before", "length", "after"),
    [
        ((64, 64, 64), 16, (16, 16, 16)),  # one block stays one block
        ((256, 8, 128), 64, (64, 8, 32)),  # two tokens a step before and after
        ((128, 32, 128), 64, (64, 32, 64)),
        ((128, 32, 128), 50, (50, 50, 50)),  # 50 has no blocks of 32
        ((128, 32, 128), 16, (16, 16, 16)),
        ((64, 64, 32), 128, (128, 128, 64)),
        ((32, 64, 32), 32, (32, 32, 32)),  # a block is no longer than its answer
    ],
)
def test_another_length_takes_blocks_and_steps_along(before, length, after):
    made = SamplingParams(*before, stop_at_eos=True, seed=3).at_length(length)
    assert made == SamplingParams(*after, stop_at_eos=True, seed=3)


def test_blocks_that_need_not_divide_stay():
    assert SamplingParams(128, 32, 128, schedule="linear").at_length(50).block_length == 32
    assert SamplingParams(128, 32, 128, threshold=0.9).at_length(50).block_length == 32


def test_a_length_that_is_none_is_one_line():
    with pytest.raises(ConfigError, match=r"max_new_tokens: Input should be greater than or equal to 1 \(got 0\)"):
        PUBLISHED.at_length(0)


def test_the_options_say_what_the_settings_say_of_themselves():
    settings = describe(SamplingParams)
    for command in ("sample", "chat"):
        options = {option.name: option.help for option in typer.main.get_command(llada).commands[command].params}
        shared = options.keys() & settings.keys()
        assert shared == {
            "max_new_tokens",
            "block_length",
            "steps",
            "temperature",
            "threshold",
            "cache",
            "sampler",
            "seed",
        }
        assert all(options[name] == settings[name].description for name in shared)
        assert all(name in options["others"] for name in settings.keys() - shared)


def test_the_docs_list_every_setting_with_its_description():
    """A change of a description is copied into docs/concepts.md; these are the lines that belong there."""
    lines = [f"| `{s.name}` | {_values(s)} | {s.description} |" for s in describe(SamplingParams).values()]
    missing = [line for line in lines if line not in CONCEPTS.read_text(encoding="utf-8").splitlines()]
    assert not missing, "\n".join(missing)


def _values(setting):
    ranged = f"{setting.kind}" + (f" of {', '.join(setting.choices)}" if setting.choices else "")
    ranged += f", from {setting.low:g}" if setting.low is not None else ""
    ranged += f" to {setting.high:g}" if setting.high is not None else ""
    default = "off" if setting.optional else setting.default
    return ranged + ("" if default in (None, []) else f"; {str(default).lower()}")
