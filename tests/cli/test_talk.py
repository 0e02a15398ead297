"""`llada sample` and `llada chat` with a tiny random model."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

from app.canvas import DONE, FRESH, OPEN, REPLACED, Frame
from app.models import LoadedModel
from cli.options import ModelOptions, settings
from cli.terminal import BOX, TerminalChat, box, picture
from llada_core.modeling import save_model
from llada_core.sampling.engine import Engine
from llada_core.sampling.params import PUBLISHED
from tests.tiny import tiny_pair

SHORT = ("--max-new-tokens", "8")


def test_questions_are_answered_as_one_batch_as_alone(call, tiny):
    both = call("sample", "12 + 3", "a much longer question", "-m", tiny, *SHORT, "--json")
    assert both.exit_code == 0, both.stderr
    first, second = map(json.loads, both.stdout.splitlines())
    alone = json.loads(call("sample", "12 + 3", "-m", tiny, *SHORT, "--json").stdout)
    assert first == {**alone, "forwards": first["forwards"]}
    assert len(first["tokens"]) == len(second["tokens"]) == 8


def test_lines_of_stdin_are_questions(call, tiny):
    result = call("sample", "-", "-m", tiny, *SHORT, "--json", stdin="one\ntwo\n")
    assert [json.loads(line)["prompt"] for line in result.stdout.splitlines()] == ["one", "two"]


def test_gaps_are_filled_and_the_rest_stays(call, tiny):
    result = call("sample", "12[[2]]34", "5[[1]]", "-m", tiny, "--infill", "--json")
    first, second = (json.loads(line)["answer"] for line in result.stdout.splitlines())
    assert first.startswith("12")
    assert first.endswith("34")
    assert second.startswith("5")


def test_pinned_words_stand_in_the_answer(call, tiny):
    tokenizer = tiny_pair()[1]
    result = call("sample", "hi", "-m", tiny, *SHORT, "--pin", "2:77", "--json")
    assert json.loads(result.stdout)["tokens"][2:4] == tokenizer.encode("77")


def test_the_canvas_is_shown_live(call, tiny):
    result = call("sample", "hi", "-m", tiny, *SHORT, "-v")
    assert "8 of 8 positions" in result.stderr
    assert "positions" not in result.stdout


def test_a_batch_and_its_gaps_are_shown_live_row_by_row(call, tiny):
    result = call("sample", "12[[2]]34", "5[[1]]", "-m", tiny, "--infill", "-v")
    assert result.exit_code == 0, result.stderr
    assert "6 of 6 positions" in result.stderr
    assert "2 of 2 positions" in result.stderr
    both = call("sample", "one", "two", "-m", tiny, *SHORT, "-v")
    assert both.stderr.count("8 of 8 positions") == 2


def test_other_settings_by_name(call, tiny):
    fewer = call("sample", "hi", "-m", tiny, *SHORT, "--json", "-S", "threshold=0.0001")
    assert json.loads(fewer.stdout)["forwards"] == 1
    wrong = call("sample", "hi", "-m", tiny, "-S", "treshold=1")
    assert wrong.exit_code == 2
    assert "threshold" in wrong.stderr
    assert call("sample", "hi", "-m", tiny, "-S", "threshold").exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--max-new-tokens", "0"), "(got 0)"),
        (("--max-new-tokens", "1000"), "longer than the model's 128"),
        (("--preset", "magic"), "there are exact, fast, creative"),
        (("--infill",), "Mark where"),
        (("--pin", "nonsense"), "position:word"),
        (("--infill", "--pin", "0:x"), "leave it out, or --infill"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(call, tiny, arguments, says):
    result = call("sample", "hi", "-m", tiny, *arguments)
    assert result.exit_code == 2
    assert says in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_length_alone_moves_what_depends_on_it(tiny):
    assert settings(PUBLISHED, ModelOptions()) == PUBLISHED
    moved = settings(PUBLISHED, ModelOptions(max_new_tokens=64))
    assert (moved.steps, moved.block_length) == (64, 32)
    fast = settings(PUBLISHED, ModelOptions(max_new_tokens=50, preset="fast", others=["threshold=0.5"]))
    assert (fast.steps, fast.block_length, fast.threshold) == (50, 50, 0.5)


def test_a_canvas_has_the_same_shape_at_every_step():
    tokens, sure = np.zeros(4, np.int32), np.array([np.nan, 0.9, 0.1, np.nan], np.float32)
    frame = Frame(tokens, tokens, sure, np.array([OPEN, FRESH, DONE, OPEN], np.int8), (0, 2))
    texts = ["", "longword", "4", ""]
    assert [len(box(frame, at, text)) for at, text in enumerate(texts)] == [BOX - 1] * 4
    assert picture(frame, texts, 12).plain.split("\n")[0] == "▒▒▒▒▒ long…"
    styles = {str(span.style) for span in picture(frame, texts, 80).spans}
    assert len(styles) == 4
    assert box(frame, 0, "") != box(frame, 3, ""), "the block is told apart without colour"
    replaced = Frame(tokens, tokens, sure, np.array([DONE, REPLACED, DONE, OPEN], np.int8), (0, 2))
    assert [box(replaced, 1, text) for text in ("4", "longword")] == ["↻4   ", "↻lon…"]
    assert {str(span.style) for span in picture(replaced, texts, 80).spans} >= {"reverse bold"}


def chat(tiny, call, *lines, options=SHORT):
    result = call("chat", "-m", tiny, *options, stdin="".join(f"{line}\n" for line in lines))
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_conversation_with_commands(call, tiny):
    shown = chat(
        tiny, call, "/help", "12 + 3", "/settings", "/preset fast", "/again", "/replay", "/undo", "/undo", "/quit"
    )
    assert "/replay" in shown
    assert "8 steps · 8 forwards · 1.00 tokens per forward" in shown
    assert "block_length = 8" in shown
    assert "Approximate: the prefix cache" in shown
    assert "8 of 8 positions" in shown
    assert "There is nothing to undo" in shown
    assert "forgotten: 12 + 3" in shown


def test_an_answer_that_cannot_be_written_anew_stays(call, tiny):
    shown = chat(tiny, call, "12 + 3", "/set max_new_tokens=999", "/again", "/undo", "/undo", "/system x", "/new")
    assert "forgotten: 12 + 3" in shown
    assert shown.count("There is nothing to undo") == 1
    assert "told so" in shown
    assert "a new conversation" in shown


def test_a_mistake_does_not_end_the_conversation(call, tiny):
    shown = chat(
        tiny, call, "/bogus", "/set steps=0", "/set steps", "/replay", "/again", "/preset x", "12", "/new", "/guesses"
    )
    for part in (
        "no command '/bogus'",
        "steps: Input should be greater than or equal to 1 (got 0)",
        "name=value",
        "nothing was written",
        "There is nothing to write again",
        "no preset 'x'",
    ):
        assert part in shown.replace("\n", " ")
    assert "8 steps" in shown
    assert "guesses are shown" in shown


def test_a_conversation_too_long_for_the_model_says_so_and_goes_on(call, tiny):
    shown = chat(tiny, call, "1 " * 200, "short", options=SHORT).replace("\n", " ")
    assert "128" in shown
    assert "8 steps" in shown


def test_ctrl_c_keeps_what_is_there(monkeypatch):
    model, tokenizer = tiny_pair()
    real = Engine.follow

    def interrupted(engine, answer):
        steps = real(engine, answer)
        for _ in range(3):
            yield next(steps)
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "follow", interrupted)
    screen = io.StringIO()
    params = PUBLISHED.at_length(8)
    talk = TerminalChat(LoadedModel("tiny", None, model, tokenizer), params, console=Console(file=screen))
    talk.conversation.ask("hi")
    talk.answer()
    assert talk.conversation.turns[0].answer is not None
    assert "stopped; what was written stays" in screen.getvalue()
    assert talk.conversation.last.trace.frames[-1].written == 3


def test_escape_sequences_of_a_model_do_not_reach_the_terminal(call, tiny, monkeypatch):
    from llada_core.tokenizer import Tokenizer

    monkeypatch.setattr(Tokenizer, "answer_text", lambda self, ids: "\x1b[2Jgone\u202e")
    assert "\x1b[2J" not in call("sample", "hi", "-m", tiny, *SHORT).stdout
    assert "\x1b[2J" not in chat(tiny, call, "hi")


@pytest.mark.parametrize("command", [("sample", "hi"), ("chat",), ("eval", "sudoku")])
@pytest.mark.parametrize(
    ("option", "said"),
    [
        (("--device", "cuda:7"), "error: device cuda:7: no CUDA GPU is visible"),
        (("--device", "gpu"), "error: device 'gpu' is none of auto, cuda, cuda:N, mps, cpu"),
        (("--bits", "4"), "error: bits=4 needs a CUDA GPU, and the model goes to the cpu; leave bits out"),
        (("--bits", "3"), "error: bits is 3; 4 and 8 are supported"),
    ],
)
def test_a_device_that_is_not_there_is_one_line(call, tiny, command, option, said):
    result = call(*command, "-m", tiny, *option)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.stderr
    assert result.stderr.startswith(said)


def test_the_device_that_is_named_is_where_the_model_goes(call, tiny, monkeypatch):
    monkeypatch.setenv("LLADAFLOW_DEVICE", "cuda")
    assert "no CUDA GPU" in call("sample", "hi", "-m", tiny, *SHORT).stderr
    assert call("sample", "hi", "-m", tiny, *SHORT, "--device", "cpu").exit_code == 0


def test_llada2_is_asked_by_its_own_sampler(call, tmp_path):
    """A folder says nothing of 2.0 or 2.1: 2.0, unless somebody says otherwise."""
    model, tokenizer = tiny_pair("llada2")
    save_model(model, tmp_path / "two", tokenizer)
    asked = ("sample", "12 + 3", "-m", str(tmp_path / "two"), *SHORT, "--json")
    result = call(*asked)
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    newer = call(*asked, "--preset", "speed")
    assert newer.exit_code == 0, newer.output
    assert newer.stderr.startswith(
        "sampler llada2.1 edits what is written, which this model does not say it was taught"
    )
    both = call(*asked, "--preset", "speed", "--sampler", "llada2.0")
    assert (both.exit_code, both.stderr) == (0, ""), "what is said of editing goes with its sampler"
    gap = call("sample", "2+[[2]]=5", "--infill", "-m", str(tmp_path / "two"))
    assert gap.exit_code == 0, gap.output
    assert gap.stdout.startswith("2+")
    wrong = call(*asked, "--cache", "dual")
    assert (wrong.exit_code, wrong.stderr.count("\n")) == (2, 1)
    assert "cache 'dual' keeps what follows the block" in wrong.stderr


def test_a_sampler_is_an_option_and_what_a_model_did_not_learn_is_said(tiny, call):
    """A model that sees all positions may be asked by LLaDA2's samplers."""
    asked = ("sample", "12 + 3", "-m", tiny, *SHORT, "--sampler", "llada2.0", "--threshold", "0.5")
    result = call(*asked)
    assert result.exit_code == 0, result.output
    assert result.stderr == "sampler llada2.0 is for models that attend by blocks; this one sees all positions\n"
    result = call(*asked[:-2])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "sampler 'llada2.0' needs a threshold; 0.95 is published" in result.stderr
