"""How a model is to be asked: said by its data, saved with it, and read by whoever asks it."""

import json
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest

from llada_core.modeling import save_model
from llada_core.sampling.params import PUBLISHED, SamplingParams
from llada_core.settings import ConfigError
from llada_core.training.params import GRPOParams, SFTParams
from llada_core.usage import FILE, Usage
from tasks.folders import content_hash
from tasks.project import Project
from tasks.record.model_usage import GENERAL, saved_usage, usage_of, usage_to_register
from tasks.work.training import learnt_usage
from tests.tiny import tiny_pair, tiny_tokenizer

SHORT = SamplingParams(8, 8, 4, stop_at_eos=True)
OWN = Usage(sampling=SHORT, turns="single", system="Be brief.", examples=("Why?",))
QUESTION = {"role": "user", "content": "7 + 5"}
REPLY = {"role": "assistant", "content": "12."}


def test_a_single_turn_model_is_asked_the_last_question_alone_and_told_its_system_prompt():
    said = [QUESTION, REPLY, {"role": "user", "content": "and 1?"}]
    assert OWN.messages(said) == [{"role": "system", "content": "Be brief."}, said[-1]]
    assert Usage().messages(said) == said
    other = {"role": "system", "content": "Rhyme."}
    assert OWN.messages([other, *said]) == [other, said[-1]]


def test_a_folder_says_what_was_saved_in_it(tmp_path):
    assert Usage.load(tmp_path) is None
    OWN.save(tmp_path)
    assert (
        Usage.load(tmp_path)
        == OWN
        == saved_usage(Project.at(tmp_path), ".")
        == usage_of(Project.at(Path("/")), str(tmp_path))
    )
    OWN.model_copy(update={"sampling": SamplingParams(8, 8, 4, rule="somebody.s.code")}).save(tmp_path)
    assert Usage.load(tmp_path).sampling == SamplingParams(8, 8, 4), "weights name no code to be run"
    (tmp_path / FILE).write_text('{"sampling": {"max_new_tokens": 0, "block_length": 1, "steps": 1}}')
    with pytest.raises(ConfigError, match=r"usage.json: .*max_new_tokens.*got 0"):
        Usage.load(tmp_path)


def test_folders_of_old_are_asked_as_they_were(tmp_path):
    (tmp_path / "m").mkdir()
    assert usage_of(Project.at(tmp_path), "m") == Usage(sampling=PUBLISHED, examples=GENERAL)
    (tmp_path / "m/training.json").write_text("{}")
    assert usage_of(Project.at(tmp_path), "m").sampling == PUBLISHED
    block = {"name": "own", "sampling": {"max_new_tokens": 8, "block_length": 8, "steps": 4, "stop_at_eos": True}}
    (tmp_path / "params.yaml").write_text(json.dumps({"name": "p", "stages": ["register"], "register": block}))
    asked = usage_of(Project.at(tmp_path), "m")
    assert asked.sampling == SHORT
    assert any("sudoku" in question for question in asked.examples)


def test_a_name_on_the_hub_says_which_sampler_a_model_is_for(tmp_path):
    """The files of LLaDA2.0 and 2.1 do not."""
    found = {
        name: usage_of(Project.at(tmp_path), f"inclusionAI/{name}").sampling.sampler
        for name in ("LLaDA2.0-mini", "LLaDA2.0-flash@main", "LLaDA2.1-mini", "another")
    }
    assert [*found.values()] == ["llada2.0", "llada2.0", "llada2.1", None]


def dialogues(folder, *, several):
    tokenizer = tiny_tokenizer()
    said = [
        [QUESTION, REPLY],
        [QUESTION, REPLY, QUESTION, {**REPLY, "content": "12 or 3 + 9."}] if several else [QUESTION, REPLY],
    ]
    rows = list(tokenizer.dialogues(said, answered=True))
    spans = [[any(a <= i < b for a, b in row.replies) for i in range(len(row.ids))] for row in rows]
    table = {"input_ids": [list(row.ids) for row in rows], "maskable": [list(map(int, span)) for span in spans]}
    datasets.Dataset.from_dict(table).save_to_disk(str(folder / "train"))
    return max(b - a for row in rows for a, b in row.replies)


def test_fine_tuning_keeps_the_sampler_that_a_model_is_for(tmp_path):
    """LLaDA2's blocks and thresholds stay; only the room is that of the replies."""
    longest = dialogues(tmp_path / "data", several=False)
    model, tokenizer = tiny_pair("llada2")
    save_model(model, tmp_path / "LLaDA2.1-own", tokenizer)
    params = SFTParams(max_steps=1, init_from=str(tmp_path / "LLaDA2.1-own"))
    learnt = learnt_usage(params, tokenizer, tmp_path / "data").sampling
    assert (learnt.sampler, learnt.threshold, learnt.editing_threshold) == ("llada2.1", 0.7, 0.5)
    assert (learnt.max_new_tokens, learnt.block_length) == (longest, 32)


@pytest.mark.parametrize("several", [False, True])
def test_fine_tuning_leaves_room_for_the_longest_reply_and_knows_dialogues(tmp_path, several):
    longest = dialogues(tmp_path, several=several)
    learnt = learnt_usage(SFTParams(max_steps=1), tiny_tokenizer(), tmp_path)
    assert learnt.turns == ("multi" if several else "single")
    assert learnt.sampling == SamplingParams(longest, longest, longest, stop_at_eos=True)
    assert learnt.examples == ()
    (tmp_path / "card.json").write_text('{"examples": ["When does it open?"]}')  # one's own questions, kept by prepare
    assert learnt_usage(SFTParams(max_steps=1), tiny_tokenizer(), tmp_path).examples == ("When does it open?",)


def test_a_model_by_blocks_is_asked_by_its_blocks(tmp_path):
    longest = dialogues(tmp_path, several=False)
    learnt = learnt_usage(SFTParams(max_steps=1), tiny_tokenizer(), tmp_path, 4)
    usual = {"sampler": "llada2.0", "threshold": 0.95, "cache": "prefix", "stop_at_eos": True}
    assert learnt.sampling == SamplingParams(longest, 4, 4, **usual)
    edits = {**usual, "sampler": "llada2.1", "threshold": 0.7, "editing_threshold": 0.5}
    Usage(sampling=SamplingParams(9, 32, 32, **edits)).save(tmp_path)
    params = SFTParams(max_steps=1, init_from=str(tmp_path))
    assert learnt_usage(params, tiny_tokenizer(), tmp_path, 8).sampling == SamplingParams(longest, 8, 8, **edits)


def test_reinforcement_learning_is_asked_as_it_was_validated_and_keeps_the_system_prompt(tmp_path):
    OWN.save(tmp_path)
    ids = tiny_tokenizer().chat_ids([QUESTION])
    datasets.Dataset.from_dict({"prompt_ids": [ids, ids], "prompt": ["7 + 5", "7 + 5"]}).save_to_disk(
        str(tmp_path / "train")
    )
    params = GRPOParams(max_steps=1, init_from=str(tmp_path), sampling=SamplingParams(6, 3, 6, temperature=1.0))
    learnt = learnt_usage(params, tiny_tokenizer(), tmp_path)
    assert learnt == Usage(sampling=SamplingParams(6, 3, 6), turns="single", system="Be brief.", examples=("7 + 5",))


def test_what_is_registered_has_the_settings_of_the_project_and_the_questions_it_answered(tmp_path):
    weights = tmp_path / "store" / "abc"
    weights.mkdir(parents=True)
    OWN.save(weights)
    assert usage_to_register(Project.at(tmp_path), "abc", PUBLISHED) == OWN.model_copy(update={"sampling": PUBLISHED})
    (tmp_path / "data/eval").mkdir(parents=True)
    asked = [{"id": str(i), "prompt": f"question {i}"} for i in range(4)]
    (tmp_path / "data/eval/seats.jsonl").write_text("".join(json.dumps(q) + "\n" for q in asked))
    (tmp_path / "store/abc.scores.json").write_text(json.dumps({"seats": {"0": 0.0, "1": 1.0, "2": 1.0, "3": 1.0}}))
    assert usage_to_register(Project.at(tmp_path), "abc", SHORT).examples == ("question 1", "question 2")


def test_a_served_version_asks_as_its_usage_says(tmp_path, monkeypatch):
    import llada_core
    from tasks.record.mlflow_model import ChatModel, Conversation

    model, tokenizer = tiny_pair()
    save_model(model, tmp_path / "m", tokenizer)
    config = {"path": str(tmp_path / "m"), "hash": content_hash(tmp_path / "m"), "sampling": vars(SHORT)}
    prompts = []
    real = llada_core.generate
    monkeypatch.setattr(llada_core, "generate", lambda m, p, s: (prompts.extend(p), real(m, p, s))[1])
    for usage in ({}, {"usage": OWN.model_dump(mode="json")}):  # a version of old, and one of now
        served = ChatModel()
        served.load_context(SimpleNamespace(model_config=config | usage))
        served.predict([Conversation(messages=[QUESTION, REPLY, QUESTION])])
    assert prompts == [tokenizer.chat_ids([QUESTION, REPLY, QUESTION]), tokenizer.chat_ids(OWN.messages([QUESTION]))]
