"""A conversation: turns, Stop, again, undo, edit, limits; with a tiny random model."""

import copy

import pytest
import torch

from app.conversation import ALONE, LONGEST_MESSAGE, MOST_TURNS, Conversation
from app.models import LoadedModel, UserError
from llada_core.sampling.params import SamplingParams
from llada_core.usage import Usage
from tests.app.oracle import oracle
from tests.tiny import tiny_pair

PARAMS = SamplingParams(max_new_tokens=12, block_length=6, steps=12)


def answered(loaded, *questions):
    chat = Conversation()
    for question in questions:
        chat.ask(question)
        list(chat.reply(loaded, PARAMS))
    return chat


def test_every_step_is_shown_and_the_answer_is_the_samplers(loaded):
    from llada_core.sampling import generate

    chat = Conversation()
    chat.ask("12 + 3")
    frames = list(chat.reply(loaded, PARAMS))
    assert [f.written for f in frames] == list(range(1, 13))
    whole = generate(loaded.model, [loaded.tokenizer.chat_ids([{"role": "user", "content": "12 + 3"}])], PARAMS)
    assert frames[-1].tokens.tolist() == whole.answers[0].tolist()
    assert chat.last.counts.steps == chat.last.counts.forwards == whole.forwards == 12
    assert chat.last.counts.tokens == 12
    assert "12 steps · 12 forwards · 1.00 tokens per forward" in chat.last.counts.sentence()


def test_earlier_turns_and_the_system_prompt_are_part_of_the_question(loaded):
    chat = answered(loaded, "first")
    chat.system = "be brief"
    chat.ask("second")
    assert [m["role"] for m in chat.messages()] == ["system", "user", "assistant", "user"]
    frames = chat.reply(loaded, PARAMS)
    next(frames)
    assert chat.last.trace.prompt == loaded.tokenizer.chat_ids(chat.messages())
    frames.close()


def test_stop_keeps_what_is_there(loaded):
    chat = Conversation()
    chat.ask("12 + 3")
    for frame in chat.reply(loaded, PARAMS):
        if frame.written == 5:
            chat.stop()
    assert chat.last.counts.tokens == 5
    assert chat.turns[-1].answer is not None
    assert "Stopped" in chat.last.note
    assert not chat.writing


def test_stop_before_the_turn_comes_writes_nothing(loaded):
    chat = Conversation()
    chat.ask("12 + 3")
    chat.stop()
    assert list(chat.reply(loaded, PARAMS)) == []
    assert chat.turns == []
    assert chat.returned == ("12 + 3", None)


def test_a_closed_tab_frees_the_model_and_leaves_the_session_usable(loaded):
    chat = Conversation()
    chat.ask("12 + 3")
    frames = chat.reply(loaded, PARAMS)
    next(frames)
    frames.close()
    assert not loaded.turn.locked()
    assert not chat.writing
    chat.ask("again")
    assert len(list(chat.reply(loaded, PARAMS))) == 12


def test_again_undo_edit_and_clear(loaded):
    chat = answered(loaded, "one", "two")
    chat.again()
    assert chat.waiting
    list(chat.reply(loaded, PARAMS))
    assert chat.undo() == "two"
    assert not chat.last.trace.frames, "nothing of the undone answer can be replayed"
    chat.edit(0, "other")
    assert [t.user for t in chat.turns] == ["other"]
    assert chat.waiting
    list(chat.reply(loaded, PARAMS))
    chat.clear()
    assert chat.messages() == []
    for act in (chat.undo, chat.again):
        with pytest.raises(UserError):
            act()


def test_a_new_conversation_stops_the_answer_and_leaves_nothing_of_it(loaded):
    chat = answered(loaded, "one")
    chat.ask("two")
    frames = chat.reply(loaded, PARAMS)
    next(frames)
    chat.clear()
    assert chat.turns == []
    chat.ask("three")  # at once, before the other has noticed
    assert list(frames) == []
    assert chat.waiting
    assert not chat.writing
    assert len(list(chat.reply(loaded, PARAMS))) == 12
    assert [t.user for t in chat.turns] == ["three"]


def test_a_refused_question_leaves_no_trace_and_comes_back(loaded):
    chat = answered(loaded, "one", "two")
    before, shown = list(chat.turns), chat.last
    too_long = SamplingParams(max_new_tokens=999, block_length=999, steps=999)
    for act, returned in (
        (lambda: chat.ask("three"), ("three", None)),
        (lambda: chat.edit(0, "other"), ("other", 0)),
        (chat.again, ("", None)),
    ):
        act()
        assert chat.picture == ""
        with pytest.raises(UserError, match="at most"):
            list(chat.reply(loaded, too_long))
        assert chat.turns == before
        assert chat.last is shown, "what was answered can still be replayed"
        assert chat.returned == returned
        assert not chat.writing


def test_a_stopped_answer_keeps_its_gaps():
    loaded = oracle("champion")
    chat = Conversation()
    chat.ask("Solve the sudoku 1030340020030001")
    params = SamplingParams(max_new_tokens=16, block_length=16, steps=16)  # no room for an end
    for frame in chat.reply(loaded, params):
        if frame.written == 6:
            chat.stop()
    said = chat.turns[0].answer
    shown = chat.last.trace.texts(chat.last.trace.frames[-1])
    assert said == "".join(text or "_" for text in shown).rstrip("_") + "…"
    assert "_" in said
    assert chat.turns[0].verdict is None, "what is not finished is neither right nor wrong"


def test_an_answer_is_judged_where_it_can_be():
    chat = Conversation()
    for question in ("Solve the sudoku 1030340020030001", "Make 5 from 1, 2, 2"):
        chat.ask(question)
        list(chat.reply(oracle("champion"), SamplingParams(max_new_tokens=24, block_length=24, steps=24)))
    assert [turn.verdict.right for turn in chat.turns] == [True, False]


def test_a_model_of_single_turns_forgets_the_history_and_that_is_said(loaded):
    single = LoadedModel("s", None, loaded.model, loaded.tokenizer, usage=Usage(turns="single"))
    chat = Conversation()
    for question in ("first", "second"):
        chat.ask(question)
        list(chat.reply(single, PARAMS))
        assert (ALONE in chat.last.note) == (question == "second")
    assert chat.last.trace.prompt == loaded.tokenizer.chat_ids([{"role": "user", "content": "second"}])


def test_a_refused_edit_loses_nothing(loaded):
    chat = answered(loaded, "one", "two")
    with pytest.raises(UserError):
        chat.edit(0, "  ")
    assert [t.user for t in chat.turns] == ["one", "two"]


def test_an_answer_that_cannot_be_written_anew_stays(loaded):
    chat = answered(loaded, "one")
    before = chat.turns[0].answer
    chat.again()
    with pytest.raises(UserError, match="at most"):
        list(chat.reply(loaded, SamplingParams(max_new_tokens=999, block_length=999, steps=999)))
    assert chat.turns[0].answer == before != ""
    chat.again()
    chat.stop()
    assert list(chat.reply(loaded, PARAMS)) == []
    assert chat.turns[0].answer == before
    chat.again()
    chat.give_up()
    assert chat.turns[0].answer == before
    assert not chat.waiting


def test_without_bounds_only_the_models_own_length_counts(loaded):
    chat = Conversation("x" * (LONGEST_MESSAGE + 1), bounded=False)
    chat.ask("x" * (LONGEST_MESSAGE + 1))
    chat.turns *= MOST_TURNS
    chat.turns[-1].answer = ""
    chat.ask("one more")
    with pytest.raises(UserError, match="reads 700 at most"):
        list(chat.reply(loaded, PARAMS))
    wide = LoadedModel("tiny", None, loaded.model, loaded.tokenizer, max_context=600)
    assert (loaded.context, wide.context) == (700, 600)


def test_nothing_changes_under_a_running_answer(loaded):
    chat = Conversation()
    chat.ask("one")
    frames = chat.reply(loaded, PARAMS)
    next(frames)
    for act in (chat.undo, chat.again, lambda: chat.ask("x"), lambda: chat.edit(0, "x")):
        with pytest.raises(UserError, match="press Stop"):
            act()
    frames.close()


@pytest.mark.parametrize(
    ("text", "says"), [("", "empty"), (" \n\t", "empty"), ("x" * 100_000, "100,000 characters"), ("\u200e", None)]
)
def test_bad_messages_are_refused_in_a_sentence(text, says):
    chat = Conversation()
    if says is None:
        chat.ask(text)
        assert chat.turns[0].user == "\u200e"
        return
    with pytest.raises(UserError, match=says):
        chat.ask(text)
    assert not chat.turns
    assert len(text) < LONGEST_MESSAGE or says


def test_the_system_prompt_is_bounded_and_halves_are_replaced_as_in_a_message(loaded):
    chat = Conversation(system="be\ud800brief\u202e")
    chat.ask("12 + 3")
    assert chat.messages()[0] == {"role": "system", "content": "be\ufffdbrief\u202e"}
    assert list(chat.reply(loaded, PARAMS))
    with pytest.raises(UserError, match="system prompt has 100,000 characters"):
        Conversation(system="x" * 100_000).ask("12 + 3")


def test_half_surrogates_reach_the_model_as_replacement_characters(loaded):
    chat = Conversation()
    chat.ask("a\ud800b")
    assert list(chat.reply(loaded, PARAMS))


def test_a_conversation_that_no_longer_fits_says_what_to_do(loaded):
    chat = Conversation()
    chat.ask("1 " * 600)
    with pytest.raises(UserError, match=r"reads 700 at most.*lower max_new_tokens"):
        list(chat.reply(loaded, PARAMS))
    assert not chat.writing


def test_too_many_turns_are_refused():
    chat = Conversation()
    for _ in range(MOST_TURNS):
        chat.ask("x")
        chat.turns[-1].answer = "y"
    with pytest.raises(UserError, match="start a new one"):
        chat.ask("x")


def test_the_time_limit_keeps_what_is_there(loaded):
    ticks = iter(range(1000))
    chat = Conversation()
    chat.ask("12 + 3")
    frames = list(chat.reply(loaded, PARAMS, limit=4.5, clock=lambda: float(next(ticks))))
    assert len(frames) == 5
    assert "time allowed" in chat.last.note


def test_a_model_that_writes_nothing_but_end_of_text_is_explained():
    model, tokenizer = tiny_pair()
    with torch.no_grad():
        model.model.transformer.ff_out.weight.zero_()  # all logits equal: the first token, a special one, is written
    loaded = LoadedModel("mute", None, model, tokenizer)
    chat = Conversation()
    chat.ask("hello")
    list(chat.reply(loaded, PARAMS))
    assert chat.turns[-1].answer == ""
    assert "end-of-text" in chat.last.note


def test_what_is_filled_after_the_end_of_an_answer_is_not_counted_as_written():
    chat = Conversation()
    chat.ask("hello")
    params = SamplingParams(max_new_tokens=24, block_length=8, steps=24, stop_at_eos=True)
    frames = list(chat.reply(oracle("short", "hi"), params))
    assert frames[-1].written == 24
    assert chat.last.counts.tokens <= 8
    assert frames[0].caption.startswith("step 1 · 1 forward · ")


def test_guesses_beyond_the_block_are_there_on_request(loaded):
    chat = Conversation()
    chat.ask("12 + 3")
    first = next(chat.reply(loaded, PARAMS))
    assert (first.guesses[6:] == -1).all()
    chat = Conversation()
    chat.ask("12 + 3")
    watched = next(chat.reply(loaded, PARAMS, look_ahead=True))
    assert (watched.guesses[6:] >= 0).all()
    assert watched.block == (0, 6)


def test_a_session_is_a_value():
    chat = Conversation()
    chat.ask("x")
    assert copy.deepcopy(chat).turns == chat.turns
