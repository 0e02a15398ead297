"""Tiny models and tokenizers, made on the spot: no files, no network, well under a second."""

import functools
import tempfile
from pathlib import Path

from llada_core.modeling import new_model
from llada_core.modeling.families import ModelParams
from llada_core.modeling.predictor import MaskPredictor
from llada_core.tokenizer import SpecialTokens, Tokenizer, train_tokenizer

SPECIAL = SpecialTokens(mask_id=126, eos_id=120, pad_id=120, bos_id=121, eot_id=122)
"""The ids of the golden dense models, valid for every tiny model of vocabulary 136."""

TEXTS = [
    "Write a number that follows 12, 34 and 56.",
    "The quick brown fox jumps over the lazy dog.",
    "Question: what is 7 + 5? Answer: 12.\n",
    "Once upon a time there was a little girl who liked to read.",
]


def tiny_params(kind: str = "llada", **changes) -> ModelParams:
    """The shape shared by all tiny models: width 32, 2 layers, 4 heads."""
    values = {
        "kind": kind, "d_model": 32, "n_layers": 2, "n_heads": 4, "mlp_hidden_size": 64, "max_sequence_length": 128,
        "num_experts": 4, "experts_per_token": 2, "expert_hidden_size": 16, "qk_norm": kind == "llada_moe",
    }  # fmt: skip
    return ModelParams(**{**values, **changes})


def tiny_model(
    kind: str = "llada", *, vocab_size: int = 136, special: SpecialTokens = SPECIAL, seed: int = 0, **changes
) -> MaskPredictor:
    """A random model in evaluation mode; `kind` is llada, llada_moe or one of distilbert, bert, modernbert."""
    if kind in TINY_BACKBONES:
        changes["backbone"] = {"model_type": kind, **TINY_BACKBONES[kind]}
        kind = "masked_lm"
    return new_model(tiny_params(kind, **changes), vocab_size, special, seed).eval()


TINY_BACKBONES = {
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 128},
    "bert": {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
        "max_position_embeddings": 128,
    },
    "modernbert": {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
        "max_position_embeddings": 128, "local_attention": 16,
    },
}  # fmt: skip


@functools.cache
def tiny_tokenizer(vocab_size: int = 300) -> Tokenizer:
    """A byte-level tokenizer trained on four sentences, special ids 0..5 (BOS 0, EOS 1, MASK 2, ..., EoT 5)."""
    with tempfile.TemporaryDirectory() as folder:
        return train_tokenizer(TEXTS, vocab_size, Path(folder))


def tiny_pair(kind: str = "llada", seed: int = 0, **changes) -> tuple[MaskPredictor, Tokenizer]:
    """A model and a tokenizer that fit each other."""
    tokenizer = tiny_tokenizer()
    return tiny_model(kind, vocab_size=tokenizer.vocab_size, special=tokenizer.special, seed=seed, **changes), tokenizer
