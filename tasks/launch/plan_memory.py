"""A model's shape and what one GPU holds while it trains, at its worst (rows of full length, every token masked).

Taken from the training step itself, run on tensors without memory; what cannot be run so (ZeRO, 4-bit weights,
experts in fp32, the buckets of DDP, offloaded states) is counted by a formula, and told to be. Builds no weights and downloads none.
"""

import math
import os
import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llada_core.settings import ConfigError, nearest
from llada_core.training.params import (
    BlockParams,
    GRPOParams,
    PreferenceParams,
    PretrainParams,
    SFTParams,
    TrainingParams,
)
from tasks.project import Params
from tasks.stages import TRAINING_STAGES

if TYPE_CHECKING:
    from llada_core.modeling import MaskPredictor


GIB = 2**30
GPUS = {"A100-40": (39.0, 312e12), "A100": (79.0, 312e12), "H100": (79.0, 989e12), "H200": (139.0, 989e12)}
RESERVE = 0.1  # of a GPU's memory: context, fragments, buffers of the communication
FOUR_BIT = 0.5 + 4 / 64  # bytes of a weight: nf4, and one fp32 scale for 64 of them
# Bytes that the backward pass of one block keeps for each token: by width, and by feed-forward width.
KEPT = {"fp32": (44, 16), "bf16": (30, 8)}
# Of the models whose steps are run: from two on, memory is a straight line in the number of layers (one alone would
# have no neighbour whose weights FSDP gathers in advance).
LAYERS = (2, 4)


@dataclass(frozen=True)
class Asked:
    """A step to be measured: `rows` x `length` tokens in one forward of one of `ranks`; equal steps are measured once."""

    key: str  # the parameters as JSON
    params: Params = field(compare=False)
    stage: str
    ranks: int
    rows: int
    length: int
    accumulates: bool  # gradients of an earlier micro-batch are there


def estimate(asked: Asked) -> float:
    """The same by formula and at once, to see which of several settings are worth measuring."""
    model, stored = trained_shape(asked.params, asked.stage)
    block = asked.params.settled(asked.stage, gpu=True)
    return sum(counted(model, block, asked.ranks, _fed(asked, model, block), stored).values())


def memory_of(asked: Asked) -> tuple[dict[str, float], bool]:
    """Bytes of one GPU by purpose, and whether they were measured rather than counted."""
    block = asked.params.settled(asked.stage, gpu=True)
    unseen = block.distribution.kind in ("zero2", "zero3") or (block.lora is not None and block.lora.four_bit)
    if block.precision == "fp32" and not unseen:  # torch knows the shapes of experts' products in bf16 alone
        model, stored = shape_of(asked.params, asked.stage)
        unseen = model.expert_share < 1 and (stored == 4 or block.lora is None)
    if unseen or unknown_step(block) is not None:
        model, stored = trained_shape(asked.params, asked.stage)
        return counted(model, block, asked.ranks, _fed(asked, model, block), stored), False
    return dict(_measured(asked)), True


def unknown_step(block: TrainingParams) -> str | None:
    """The objective that does not say what a step of it holds; None where it does."""
    from llada_core.training.footprint import case_of

    return block.OBJECTIVE if case_of(block) is None else None


def copies_of(model: "MaskPredictor", block: TrainingParams, length: int) -> int:
    """How often each row goes through a forward, at most: also clean where it attends by blocks, also inverted."""
    from llada_core.diffusion import fed_copies

    blocks = block.blocks or BlockParams()
    shortest = blocks.shortest(blocks.length or model.block_length)
    return fed_copies(shortest, length) * (1 + (isinstance(block, SFTParams) and block.complementary))


def _fed(asked: Asked, model: "MaskPredictor", block: TrainingParams) -> int:
    return asked.rows * asked.length * copies_of(model, block, asked.length)


@lru_cache(maxsize=64)
def _measured(asked: Asked) -> dict[str, float]:
    """The fullest moment of a step, at the model's depth: each part of the step is a line through what few layers take."""
    from llada_core.training.footprint import footprint

    block, ranks = asked.params.settled(asked.stage, gpu=True), asked.ranks
    model, stored = trained_shape(asked.params, asked.stage)
    depth = len(model.blocks)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)

    def of(layers: int) -> dict[str, dict[str, float]]:
        few, _ = trained_shape(asked.params, asked.stage, layers)
        return footprint(few, block, asked.rows, asked.length, ranks=ranks, accumulates=asked.accumulates)

    few, more = (min(layers, depth) for layers in LAYERS)
    high = of(more)
    low = of(few) if few < more else high
    further = (depth - more) / max(more - few, 1)
    parts = {
        part: {name: max(0.0, value + further * (value - low[part][name])) for name, value in found.items()}
        for part, found in high.items()
    }
    if offloaded := block.distribution.offload and block.distribution.kind == "fsdp":
        parts.pop("update")  # the processor's
    memory = max(parts.values(), key=lambda found: sum(found.values()))
    if offloaded:
        memory |= {"gradients": 0.0, "optimiser": 0.0}
        memory["weights"] = max(0.0, memory["weights"] - (4 * trained + stored * frozen) / ranks)
    if _has_copy(block):
        memory |= {"reference": 4.0 * (trained + frozen), "weights": memory["weights"] - 4.0 * (trained + frozen)}
    if ranks > 1 and block.distribution.kind in ("auto", "ddp"):
        memory["buckets (formula)"] = 4.0 * trained
    by_blocks = copies_of(model, block, asked.length) > 1  # where documents are told by their numbers
    if (
        isinstance(block, PretrainParams) and block.document_mask and not by_blocks
    ):  # as bools, in fp32 and in what attention takes
        memory["document mask (formula)"] = 7.0 * asked.rows * asked.length**2
    return memory


def trained_shape(params: Params, stage: str, layers: int | None = None) -> tuple["MaskPredictor", int]:
    """`shape_of`, with the adapters and in the dtypes that the stage trains; of a model with its last `layers` alone."""
    import torch

    from llada_core.training.train import prepare_weights

    model, stored = shape_of(params, stage)
    if layers is not None:  # first: peft takes a second to give adapters to 32 blocks
        cut(model, layers)
    if stored == 2:
        model.to(torch.bfloat16)
    prepare_weights(model, params.training(stage))
    return model, stored


def cut(model: "MaskPredictor", layers: int) -> "MaskPredictor":
    """The same model with its last `layers` blocks alone; it is changed."""
    del model.blocks[:-layers]
    return model


def _has_copy(block: TrainingParams) -> bool:
    return isinstance(block, GRPOParams | PreferenceParams) and block.beta > 0 and block.lora is None


def counted(model: "MaskPredictor", block: TrainingParams, ranks: int, tokens: int, stored: int) -> dict[str, float]:
    """By formula, bytes of one GPU; `tokens` go through a forward at once, frozen weights take `stored` bytes each."""
    from llada_core.modeling.adapters import linear_layers
    from llada_core.modeling.predictor import CHUNK_ELEMENTS

    kind = block.distribution.kind if block.distribution.kind != "auto" else "ddp" if ranks > 1 else "none"
    low, offload = 2 if block.precision == "bf16" else 4, block.distribution.offload
    shards = ranks if kind in ("fsdp", "zero3") else 1
    split = ranks if kind in ("fsdp", "zero2", "zero3") else 1
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    frozen_bytes = float(frozen * stored)
    if block.lora is not None and block.lora.four_bit:
        body = sum(model.get_submodule(name).get_parameter("weight").numel() for name in linear_layers(model))
        frozen_bytes += body * (FOUR_BIT - stored)
    blocks, (width, inner) = model.blocks, model.widths
    largest = max((sum(p.numel() for p in layer.parameters()) for layer in blocks), default=0)
    outer = trained + frozen - sum(p.numel() for layer in blocks for p in layer.parameters())
    copies = 0 if low == 4 or kind == "fsdp" else 2 * trained / shards  # bf16 beside the fp32 that is updated
    gathered = low * (2 * largest + outer) if shards > 1 else 0
    on_gpu = 0 if offload and kind == "fsdp" else 1
    by_token, by_inner = KEPT[block.precision]
    one = tokens * (by_token * width + by_inner * inner)
    logits = min(tokens * model.vocab_rows, max(CHUNK_ELEMENTS, model.vocab_rows))
    return {
        "weights": on_gpu * (4 * trained / split + frozen_bytes / shards) + copies + gathered,
        "reference": 4.0 * (trained + frozen) if _has_copy(block) else 0.0,
        "gradients": on_gpu * (8 if kind == "ddp" else low if kind.startswith("zero") else 4) * trained / split,
        "optimiser": 0 if offload and split > 1 else (4 if block.optimiser == "muon" else 8) * trained / split,
        "activations": one + 4 * tokens * width * len(blocks) if block.activation_checkpointing else one * len(blocks),
        "logits": logits * (6 if block.precision == "bf16" else 4),
    }


def shape_of(params: Params, stage: str) -> tuple["MaskPredictor", int]:
    """The model of a stage without memory for its weights, and how many bytes each has where it comes from."""
    import torch

    from llada_core.modeling.families import family_of, published_as
    from llada_core.modeling.pretrained import empty_model
    from llada_core.tokenizer import SpecialTokens

    source = params.training(stage).init_from
    if source in TRAINING_STAGES:
        return shape_of(params, source)
    special = SpecialTokens(mask_id=2, eos_id=1, pad_id=1)  # a shape may not name them, and their numbers do not matter
    if source is None:
        assert params.model is not None
        return empty_model(params.model, vocabulary(params), special), 4
    named = None if Path(source).is_dir() else published_as(source)
    if named is not None and named.published is not None:
        family, config = named, named.config_class.for_model(**named.published.config)
    else:
        config = _stored_config(source, stage)
        family = family_of(config.to_dict())
    with torch.device("meta"):
        model = family.network_class.of_config(config, special)
    return model, family.stored_bytes if config.dtype is None else config.dtype.itemsize


def _stored_config(source: str, stage: str) -> Any:
    from transformers import AutoConfig

    import llada_core.modeling.configuration  # noqa: F401 - so that AutoConfig knows ours

    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{stage}.init_from {source!r}: no shape to be had: {str(error).splitlines()[0]}") from None


def vocabulary(params: Params) -> int:
    """How many tokens a fresh model gets."""
    from llada_core.modeling.families import published_as

    asked = params.data.tokenizer if params.data is not None else None
    if asked is None or asked.name is None:
        return asked.vocab_size if asked is not None else 512
    family = published_as(asked.name)
    if family is not None and family.published is not None and not Path(asked.name).is_dir():
        return family.published.vocab_size
    from llada_core.tokenizer import Tokenizer

    return Tokenizer.load(asked.name).vocab_size


def room(gpu: str) -> float:
    """Bytes of a GPU that a plan may fill; raises `ConfigError` for one it does not know."""
    return _gpu(gpu)[0] * GIB * (1 - RESERVE)


def peak_of(gpu: str) -> float:
    """FLOP/s of a GPU in bf16, nan where its memory alone was given; raises `ConfigError` for one that is not known."""
    return _gpu(gpu)[1]


HERE = "this machine"  # in the place of a GPU's name, where a run goes on its processors


def machine_memory() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _gpu(name: str) -> tuple[float, float]:
    """Memory in GiB and FLOP/s in bf16; of `24GB`, and of a machine without a GPU, the memory alone."""
    if name == HERE:
        return machine_memory() / GIB, math.nan
    if size := re.fullmatch(r"(\d+(?:\.\d+)?) ?gi?b?", name.lower()):
        return float(size[1]) - 1, math.nan  # as the table: what the driver leaves of it
    if name not in GPUS:
        raise ConfigError(f"--gpu {name!r} is not in the table{nearest(name, [*GPUS, 'its memory, as 24GB'])}")
    return GPUS[name]
