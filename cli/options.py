"""Options that several commands share: the model, and the sampler's settings with a sentence each.

Knows names and defaults; loads a model only when it is asked to.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from llada_core.sampling.params import PRESETS, PUBLISHED, SENTENCES, SamplingParams, preset
from llada_core.settings import DEVICE_SETTING, DEVICES

if TYPE_CHECKING:
    from llada_core.modeling.predictor import MaskPredictor
    from llada_core.tokenizer import Tokenizer

MODEL_HELP = "a folder, models:/NAME@alias, or a Hub name; none: the champion of params.yaml"
Model = Annotated[str, typer.Option("--model", "-m", help=MODEL_HELP)]
Preset = Annotated[str, typer.Option(help=f"{', '.join(PRESETS)}; none: the settings the model was registered with")]
Length = Annotated[int | None, typer.Option("--max-new-tokens", help=SENTENCES["max_new_tokens"])]
Block = Annotated[int | None, typer.Option("--block-length", help=SENTENCES["block_length"])]
Steps = Annotated[int | None, typer.Option("--steps", help=SENTENCES["steps"])]
Temperature = Annotated[float | None, typer.Option("--temperature", help=SENTENCES["temperature"])]
Threshold = Annotated[float | None, typer.Option("--threshold", help=SENTENCES["threshold"])]
Cache = Annotated[str | None, typer.Option("--cache", help=SENTENCES["cache"])]
Device = Annotated[
    str, typer.Option(help=f"where the model lies: {DEVICES}; auto: GPUs if there are any", envvar=DEVICE_SETTING)
]
Bits = Annotated[int | None, typer.Option(help="weights of 4 or 8 bits, on a CUDA GPU; none: as stored")]
Seed = Annotated[int | None, typer.Option("--seed", help=SENTENCES["seed"])]
OTHERS = ", ".join(sorted(set(SENTENCES) - {"max_new_tokens", "block_length", "steps", "temperature", "cache", "seed"}))
Set = Annotated[list[str], typer.Option("-S", "--set", help=f"any sampler setting as name=value; repeatable: {OTHERS}")]


def name_or_champion(name: str) -> str:
    """The name that was given, else that of the project's champion."""
    from tasks.record.registry import champion_of

    return name or champion_of(Path.cwd())


def loaded(name: str, device: str = "auto", bits: int | None = None) -> "tuple[MaskPredictor, Tokenizer]":
    """The model and its tokenizer, ready to write; raises `ConfigError`, ValueError or OSError with one line."""
    from transformers.utils import logging

    from llada_core.modeling import load_to_answer
    from llada_core.modeling.place import checked_bits
    from llada_core.tokenizer import Tokenizer
    from tasks.record.registry import resolve

    logging.disable_progress_bar()
    as_wished = checked_bits(device, bits)
    folder = resolve(name)
    return load_to_answer(folder, device=device, bits=as_wished), Tokenizer.load(folder)


def settings(name: str, chosen: str, given: dict[str, Any], others: list[str]) -> SamplingParams:
    """The settings of a model, changed by a preset, then by what was given; a length alone moves what depends on it."""
    base = recommended(name)
    values = {key: value for key, value in given.items() if value is not None}
    for text in others:
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set {text!r}: write it as name=value")
        values[key.strip()] = yaml.safe_load(value)
    return changed(preset(chosen, with_length(base, values)) if chosen else with_length(base, values), values)


def with_length(base: SamplingParams, values: dict[str, Any]) -> SamplingParams:
    """`base` at another answer length: as many steps, and a block that still divides it."""
    length = values.get("max_new_tokens", base.max_new_tokens)
    if length == base.max_new_tokens:
        return base
    fits = isinstance(length, int) and length % base.block_length == 0
    return changed(
        base, {"max_new_tokens": length, "steps": length, "block_length": base.block_length if fits else length}
    )


def changed(base: SamplingParams, values: dict[str, Any]) -> SamplingParams:
    """`base` with other values; raises ValueError that names an unknown one."""
    return SamplingParams(**{**vars(base), **values})


def recommended(name: str) -> SamplingParams:
    """The settings that a model was registered with, else those of LLaDA's demo."""
    from tasks.record.registry import named, sampling_of, version_of

    reference = None if Path(name).is_dir() else named(name)
    if reference is None:
        return PUBLISHED
    return sampling_of(Path.cwd(), version_of(Path.cwd(), *reference)) or PUBLISHED
