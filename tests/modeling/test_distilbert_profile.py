"""profiles/distilbert.yaml at tiny width: prepared, fine-tuned, saved, and writing from nothing by both strategies."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as Engine
from tokenizers import models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from llada_core.modeling import MaskedLM, load_model, save_model
from llada_core.sampling import generate
from llada_core.sampling.params import SamplingParams
from llada_core.settings import read_yaml, with_overrides
from llada_core.tokenizer import Tokenizer
from llada_core.training.train import RunPaths, train
from tasks.project import Params
from tasks.work.prepare import prepare
from tests.tiny import TEXTS, tiny_model

PROFILE = Path(__file__).parents[2] / "profiles" / "distilbert.yaml"
SPECIALS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}


def wordpiece() -> Tokenizer:
    """A tokenizer of the kind that distilbert-base-uncased has: no EOS, no BOS, no chat template."""
    engine = Engine(models.WordPiece(unk_token="[UNK]"))
    engine.normalizer = normalizers.BertNormalizer(lowercase=True)
    engine.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    engine.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=120, special_tokens=list(SPECIALS.values())))
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=engine, **SPECIALS))


@pytest.fixture
def params(tmp_path) -> Params:
    tokenizer, stories = wordpiece(), tmp_path / "stories.txt"
    base = tiny_model("distilbert", vocab_size=tokenizer.vocab_size, special=tokenizer.special)
    save_model(base, tmp_path / "base", tokenizer)
    stories.write_text("\n".join(TEXTS * 60))
    changes = {
        "data.tokenizer.name": tmp_path / "base",
        "data.workers": 1,
        "data.pretrain.length": 16,
        "data.pretrain.sources": f"[{{name: {stories}, unit: line}}]",
        "pretrain.init_from": tmp_path / "base",
        "pretrain.epochs": "null",
        "pretrain.precision": "fp32",  # accelerate keeps the first precision that a process asks for
        "pretrain.max_steps": 3,
    }
    return Params.parse(with_overrides(read_yaml(PROFILE), [f"{k}={v}" for k, v in changes.items()]), "distilbert")


def test_it_is_fine_tuned_and_writes_from_nothing(params, tmp_path):
    prepare(params.data, seed=params.seed, out=tmp_path / "data", home=tmp_path)
    model, tokenizer = load_model(params.pretrain.init_from), Tokenizer.load(tmp_path / "data" / "tokenizer")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    place = RunPaths(tmp_path / "data", tmp_path / "run", tmp_path / "trained")
    assert train(params.pretrain, model, tokenizer, place, seed=params.seed).finished
    trained = load_model(tmp_path / "trained")
    assert isinstance(trained, MaskedLM)
    assert any(not torch.equal(weight, before[name]) for name, weight in trained.state_dict().items())
    cls, mask = tokenizer.special.bos_id, tokenizer.special.mask_id
    for temperature in (0.0, 1.0):
        settings = SamplingParams(
            max_new_tokens=12, block_length=12, steps=8, schedule="linear", stochastic_transfer=True,
            remasking="random", temperature=temperature, seed=0, forbid_tokens=(cls,),
        )  # fmt: skip
        (text,) = generate(trained, [[]], settings).answers
        assert len(text) == 12
        assert not torch.isin(text, torch.tensor([cls, mask])).any()
