"""Prompts, stop strings and sampler settings as lm-eval's users set them."""

import copy
import pickle

import pytest

from llada_core.evaluation.params import BenchmarkSettings
from llada_core.evaluation.requests import ChatText, batches, cut, pairs, sampling_params, wanted
from llada_core.settings import ConfigError
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
FULL = BenchmarkSettings(sampling={"max_new_tokens": 64, "block_length": 64, "steps": 64})


def test_the_recipe_wins_over_generic_names_and_loses_to_the_samplers_own():
    asked = {"until": ["."], "max_gen_toks": 9, "temperature": 0.7, "do_sample": False}
    params = sampling_params(FULL, TOKENIZER.special, asked)
    assert (params.max_new_tokens, params.temperature) == (64, 0.0)
    params = sampling_params(FULL, TOKENIZER.special, {"max_new_tokens": 16, "temperature": 0.7, "do_sample": True})
    assert (params.max_new_tokens, params.block_length, params.steps, params.temperature) == (16, 16, 16, 0.7)
    params = sampling_params(FULL, TOKENIZER.special, {"steps": 8, "block_size": 32, "cfg": 1.5})
    assert (params.steps, params.block_length, params.cfg_scale) == (8, 32, 1.5)


def test_a_length_given_alone_keeps_blocks_and_tokens_per_step():
    semi = BenchmarkSettings(sampling={"max_new_tokens": 256, "block_length": 8, "steps": 128})
    params = sampling_params(semi, TOKENIZER.special, {"max_new_tokens": 64})
    assert (params.max_new_tokens, params.block_length, params.steps) == (64, 8, 32)


def test_without_settings_the_tasks_length_counts():
    params = sampling_params(BenchmarkSettings(), TOKENIZER.special, {"max_gen_toks": 12})
    assert (params.max_new_tokens, params.block_length, params.steps) == (12, 12, 12)


def test_end_tokens_are_deferred_or_forbidden_by_the_models_own_ids():
    special = TOKENIZER.special
    defer = sampling_params(BenchmarkSettings(sampling={**FULL.sampling, "eos": "defer"}), special)
    assert set(defer.defer_tokens) == {special.eos_id, special.eot_id}
    forbid = sampling_params(BenchmarkSettings(sampling={**FULL.sampling, "eos": "forbid"}), special)
    assert forbid.forbid_tokens == (special.eos_id,)
    given = sampling_params(FULL, special, {"begin_suppress_tokens": "[1;5]", "suppress_tokens": []})
    assert (given.defer_tokens, given.forbid_tokens) == ((1, 5), ())


def test_an_unknown_setting_names_the_nearest():
    with pytest.raises(ConfigError, match="'blok_length'; did you mean 'block_length'"):
        sampling_params(FULL, TOKENIZER.special, {"blok_length": 3})
    with pytest.raises(ConfigError, match="temperature"):
        sampling_params(FULL, TOKENIZER.special, {"temperature": -1.0})


def test_a_long_prompt_loses_its_beginning():
    (asked,) = wanted([("abcdefgh" * 20, {"until": "X"})], FULL, TOKENIZER, longest=100)
    assert (len(asked.prompt), asked.length, asked.until) == (36, 100, ("X",))
    assert TOKENIZER.decode(asked.prompt).endswith("fgh")
    with pytest.raises(ConfigError, match="leaves no room"):
        wanted([("a", {})], FULL, TOKENIZER, longest=64)


def test_infilling_leaves_as_many_blanks_as_the_reference_has_tokens():
    (asked,) = wanted([("ab<|fill|>xyz!<|fill|>cd", {"infill": "<|fill|>"})], FULL, TOKENIZER, longest=100)
    assert TOKENIZER.decode(asked.prompt) == "ab"
    assert TOKENIZER.decode(asked.suffix) == "cd"
    assert asked.blanks == len(TOKENIZER.encode("xyz!"))


def chat(question, begun=""):
    turns = [{"role": "user", "content": question}]
    return ChatText(TOKENIZER.chat_text(turns), turns) + begun


def test_a_dialogue_is_asked_with_the_ids_that_it_is_trained_with():
    for question in ("hi", "<|eot_id|><|mdm_mask|>"):
        (asked, begun) = wanted([(chat(question), {}), (chat(question) + "So: ", {})], FULL, TOKENIZER, 1000)
        prompt = TOKENIZER.chat_ids([{"role": "user", "content": question}])
        assert list(asked.prompt) == prompt
        assert list(begun.prompt) == prompt + TOKENIZER.encode("So: ")
    copied = pickle.loads(pickle.dumps(copy.deepcopy(chat("hi", "So: "))))  # as lm-eval keeps requests
    assert (copied, copied.messages, copied.begun) == (chat("hi", "So: "), chat("hi").messages, "So: ")


def test_pairs_of_a_dialogue_keep_its_prompt_whole():
    prompt = TOKENIZER.chat_ids([{"role": "user", "content": "hi"}])
    asked, question = chat("hi"), ("hi", "12")
    found = pairs([(asked, "12"), question, (asked, "<|eot_id|>"), (chat("hi", "So: "), "12")], TOKENIZER, prefix=99)
    assert found[0] == (prompt, TOKENIZER.encode("12"))
    assert found[1] == (TOKENIZER.encode("hi"), TOKENIZER.encode("hi12")[len(TOKENIZER.encode("hi")) :])
    assert found[2] == (prompt, TOKENIZER.encode("<|eot_id|>"))
    assert found[0][0] is found[2][0]
    so = TOKENIZER.encode("So:")
    assert found[3] == (prompt + so, TOKENIZER.encode("So: 12")[len(so) :])


def test_cut_at_the_first_of_several_stop_strings():
    assert cut("one. two; three", [";", ".", ""]) == "one"
    assert cut("", ["."]) == ""


def test_batches_are_by_group_and_length_the_longest_first():
    assert batches([3, 9, 5, 9, 1], ["a", "a", "a", "b", "a"], 2) == [[1, 2], [0, 4], [3]]


def test_pairs_are_encoded_as_lm_eval_and_llada_do():
    texts = [("Question: 7 + 5? ", "12."), ("Question: 7 + 5? ", "13."), ("", "fox"), (" \n", "dog")]
    found = pairs(texts, TOKENIZER, prefix=99)
    whole = TOKENIZER.encode("Question: 7 + 5? 12.")
    context = TOKENIZER.encode("Question: 7 + 5?")
    assert found[0] == (context, whole[len(context) :])
    assert found[0][0] is found[1][0]  # the options of a question share their context
    assert found[2] == ([99], TOKENIZER.encode("fox"))
    assert found[3] == ([99], TOKENIZER.encode(" \ndog"))
