"""The golden numbers in tests/golden (see the README of the set they come from) and the models that made them."""

import functools
import json
from pathlib import Path

import numpy as np
import torch

from llada_core.modeling import load_model
from llada_core.modeling.predictor import MaskPredictor
from llada_core.tokenizer import SpecialTokens

GOLDEN = Path(__file__).parent / "golden"
DENSE = SpecialTokens(mask_id=126, eos_id=120, pad_id=120, bos_id=121, eot_id=122)
MOE = SpecialTokens(mask_id=155, eos_id=152, pad_id=152)
BLOCKS = SpecialTokens(mask_id=157, eos_id=152, pad_id=152)


@functools.cache
def cases() -> dict:
    """cases.json."""
    return json.loads((GOLDEN / "cases.json").read_text())


def case(file: str, name: str) -> dict:
    """The settings of one case."""
    return next(c for c in cases()[file] if c["name"] == name)


def names(file: str) -> list[str]:
    """The names of all cases of one file."""
    return [c["name"] for c in cases()[file]]


@functools.cache
def arrays(file: str) -> dict[str, torch.Tensor]:
    """The arrays of one .npz."""
    with np.load(GOLDEN / f"{file}.npz") as values:
        return {name: torch.from_numpy(values[name]) for name in values.files}


@functools.cache
def golden_model(name: str) -> MaskPredictor:
    """One of the golden models, float32."""
    return load_model(GOLDEN / name, special_tokens=special_of(name)).eval()


def special_of(name: str) -> SpecialTokens:
    """The special ids of a golden model."""
    return BLOCKS if name.startswith("llada2") else MOE if "moe" in name else DENSE


@functools.cache
def block_cases(file: str) -> dict[str, dict]:
    """The cases of one file of LLaDA2 by name, from cases_llada2.json; those that pin a defect left out."""
    found = json.loads((GOLDEN / "cases_llada2.json").read_text())[file]
    return {name: case for name, case in found.items() if not name.startswith("quirk")}
