"""Kept answers: no old answer serves a new model, other settings, another prompt or changed code.

A new case from a bug report is a line of the table: what is changed between two evaluations.
"""

import json
import os
from pathlib import Path

import pytest

from llada_core import files
from llada_core.evaluation import answering
from llada_core.evaluation.answering import keys_of
from llada_core.evaluation.harness import LladaLM, _said
from llada_core.evaluation.requests import ChatText
from llada_core.modeling import add_lora, save_model
from llada_core.modeling.adapters import save_adapter
from llada_core.modeling.families import LoraParams
from tests.tiny import tiny_pair

QUICK = "max_new_tokens=8,steps=8,block_length=8"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base, an adapter beside it that names it by its place, and code of its own."""
    model, tokenizer = tiny_pair()
    save_model(model, tmp_path / "base", tokenizer)
    add_lora(tiny := tiny_pair(seed=3)[0], LoraParams(r=2))
    save_adapter(tiny, tmp_path / "adapter", "../base", tokenizer)
    for name in ("llada_core/evaluation/benchmark.py", "llada_core/training/loop.py", "tasks/evaluate.py"):
        (tmp_path / "code" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "code" / name).write_text("first")
    deps = ["llada_core/evaluation/benchmark.py", "tasks/evaluate.py", "data/eval"]
    (tmp_path / "code/dvc.yaml").write_text(json.dumps({"stages": {"evaluate": {"do": {"deps": deps}}}}))
    monkeypatch.setattr(answering, "ROOT", tmp_path / "code")
    return tmp_path


def other_weights(place: Path) -> None:
    """As large, and as old, as those before."""
    file = place / "base/model.safetensors"
    stat = file.stat()
    save_model(tiny_pair(seed=1)[0], place / "base", tiny_pair()[1])
    assert file.stat().st_size == stat.st_size
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def written(name: str):
    return lambda place: (place / name).write_text((place / name).read_text() + " ")


def as_before(place: Path) -> None:
    pass


def touched(place: Path) -> None:
    for file in place.rglob("*.safetensors"):
        os.utime(file)


CHANGES = [  # what is changed, settings of the second evaluation, whether old answers serve
    (as_before, QUICK, True),
    (touched, QUICK, True),
    (as_before, QUICK + ",batch_size=4", True),
    (as_before, QUICK + ",patience=5", True),
    (written("code/llada_core/training/loop.py"), QUICK, True),
    (other_weights, QUICK, False),
    (written("base/config.json"), QUICK, False),
    (written("base/tokenizer_config.json"), QUICK, False),
    (written("adapter/adapter_config.json"), QUICK, False),
    (written("code/llada_core/evaluation/benchmark.py"), QUICK, False),
    (written("code/tasks/evaluate.py"), QUICK, False),
    (as_before, QUICK.replace("steps=8", "steps=4"), False),
    (as_before, QUICK + ",temperature=0.5", False),
    (as_before, QUICK + ",dtype=bfloat16", False),
    (as_before, QUICK + ",mc_num=4", False),
    (as_before, QUICK + ",seed=1", False),
    (as_before, QUICK + ",eos=forbid", False),
]


@pytest.mark.parametrize(("change", "settings", "same"), CHANGES)
def test_old_answers_serve_what_would_give_them_again(place: Path, change, settings: str, same: bool) -> None:
    def folder(given: str) -> Path | None:
        model_args = f"pretrained={place / 'adapter'},answers={place / 'answers'},{given}"
        return LladaLM.create_from_arg_string(model_args).store.folder

    first = folder(QUICK)
    change(place)
    assert (folder(settings) == first) is same


def test_a_large_model_is_read_once_and_not_by_every_process(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "REMEMBERED", 1)
    monkeypatch.delenv("LLADAFLOW_HOME", raising=False)
    (place / ".dvc").mkdir()
    monkeypatch.chdir(place)
    for file in place.rglob("*.*"):
        os.utime(file, (1, 1))
    first = answering.key_of_answers(str(place / "adapter"), {})
    with monkeypatch.context() as patched:
        patched.setattr(files.hashlib, "file_digest", lambda *_: pytest.fail("it is read again"))
        assert answering.key_of_answers(str(place / "adapter"), {}) == first
    (place / "base/config.json").write_text("{}")
    assert answering.key_of_answers(str(place / "adapter"), {}) != first


def test_dialogues_that_read_alike_are_not_the_same_prompt() -> None:
    text = "one<|eot_id|>two"
    asked = [ChatText(text, [{"role": "user", "content": said}]) for said in ("one", "one<|eot_id|>two")]
    keys = [keys_of("generate_until", [[_said(chat), {}]])[0] for chat in (*asked, asked[0] + "So:", text)]
    assert len(set(keys)) == 4
