"""What transformers needs to read and write a LLaDA: configurations, and the published names of weights."""

import functools
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming

from llada_core.modeling.architecture import (
    Architecture,
    blocks_architecture,
    dense_architecture,
    dream_architecture,
    illada_architecture,
    llada2_architecture,
    moe_architecture,
    refuse_merged,
)
from llada_core.modeling.families import FAMILIES, LLADA, LLADA_NAMES, TOKEN_KEYS, Family, family_of


def published_shapes(own: Mapping[str, Tensor], family: Family) -> dict[str, tuple[int, ...]]:
    """Published name and shape of every weight of a state dict of ours; experts, which lie in stacks here, one by one."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, weight in own.items():
        stem, dot, stack = family.published_name(name).partition(".experts.")
        if not dot:
            shapes[stem] = tuple(weight.shape)
            continue
        n_experts, rows, columns = weight.shape
        parts = {"down_proj": rows} if stack == "down" else {"gate_proj": rows // 2, "up_proj": rows // 2}
        for part, height in parts.items():
            shapes.update({f"{stem}.experts.{e}.{part}.weight": (height, columns) for e in range(n_experts)})
    return shapes


def register_names(family: Family) -> None:
    """Makes transformers load and save a family's network under the published names; experts are stacked on the way."""
    experts = [
        WeightConverter(
            ["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"],
            "mlp.experts.gate_up",
            [MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter("mlp.experts.*.down_proj.weight", "mlp.experts.down", [MergeModulelist(dim=0)]),
    ]
    renamings = [WeightRenaming(published, own) for published, own in family.renamed.items()]
    network = family.network.rpartition(".")[2]
    register_checkpoint_conversion_mapping(network, [*renamings, *experts], overwrite=True)


@functools.cache
def _register_models() -> None:
    """Tells transformers' Auto classes which network a config stands for; with the first config, as it imports torch."""
    for family in FAMILIES.values():
        if family.claims is not None:
            for chooser in (AutoModel, AutoModelForCausalLM):
                chooser.register(family.config_class, family.network_class, exist_ok=True)


class LLaDAConfig(PreTrainedConfig):
    """config.json of the dense family (LLaDA 8B, 1.5); `from_dict` gives the MoE one where the file is one."""

    model_type = "llada"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "max_position_embeddings": "max_sequence_length",
        "intermediate_size": "mlp_hidden_size",
    }

    def __init__(self, **values: Any) -> None:
        self._published = {k: v for k, v in values.items() if k != "name_or_path" and not k.startswith("_")}
        _register_models()
        # transformers keeps a RoPE standard of its own under this key; ours is read from what was published
        super().__init__(**{k: v for k, v in values.items() if k != "rope_scaling"})
        tied = values.get("weight_tying", values.get("tie_word_embeddings", False))
        self.tie_word_embeddings = bool(tied)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Self:
        """The config of whichever family the file is one of: two of them call their `model_type` "llada"."""
        chosen = family_of({**config_dict, "model_type": cls.model_type}).config_class
        return super(LLaDAConfig, chosen).from_dict(config_dict, **kwargs)

    @classmethod
    def for_model(cls, **values: Any) -> Self:
        """From the keys of a config.json, as transformers' `AutoConfig.for_model`."""
        return cls(**values)

    def architecture(self) -> Architecture:
        """What to build; raises `ValueError` naming the first key that is missing, unknown or unsupported."""
        return dense_architecture(self.published())

    def name_block_length(self, length: int) -> None:
        """Lets config.json name the blocks by which the model attends; the usual length of its family stays unsaid."""
        if length != self.architecture().block_length:
            self._published["block_length"] = self.block_length = length

    def dense(self) -> dict[str, Any]:
        """The keys by which LLaDA names this network, where it is a dense one."""
        return self.published()

    def published(self) -> dict[str, Any]:
        """The published keys with their present values: those of the file read, or of the template."""
        now = {k: self.__dict__.get(k, v) for k, v in self._published.items()}
        tokens = {k: self.__dict__[k] for k in TOKEN_KEYS if self.__dict__.get(k) is not None}
        return {**now, **tokens}

    def to_diff_dict(self) -> dict[str, Any]:
        """What `save_pretrained` writes: the published layout of config.json and nothing else."""
        written = {**self.published(), "model_type": self.model_type, "architectures": self.architectures}
        for key in ("dtype", "torch_dtype"):
            if key in written and self.dtype is not None:
                written[key] = str(self.dtype).removeprefix("torch.")
        return written

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        values.pop("_published", None)
        return values


class LLaDABlocksConfig(LLaDAConfig):
    """config.json of a dense model that attends by blocks: LLaDA's keys and `block_length`.

    Its `model_type` is its own, so that nobody else's code loads it and lets all positions see each other.
    """

    model_type = "llada_blocks"

    def __init__(self, **values: Any) -> None:  # as in LLaDAMoEConfig
        super().__init__(**values)

    def architecture(self) -> Architecture:
        return blocks_architecture(self.published())


class LLaDAMoEConfig(LLaDAConfig):
    """config.json of LLaDA-MoE, which also calls its `model_type` "llada"."""

    attribute_map: ClassVar[dict[str, str]] = {}

    def __init__(self, **values: Any) -> None:  # transformers would replace an inherited one by a dataclass's
        super().__init__(**values)

    def architecture(self) -> Architecture:
        return moe_architecture(self.published())


class LLaDA2Config(LLaDAConfig):
    """config.json of LLaDA2.0 and 2.1, which are the same; which sampler a model is for is a setting of its own."""

    model_type = "llada2_moe"
    attribute_map: ClassVar[dict[str, str]] = {}

    def __init__(self, **values: Any) -> None:  # as in LLaDAMoEConfig
        super().__init__(**values)

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """As transformers', which would first warn of another `model_type` and say nothing of what it is."""
        values, unused = super().get_config_dict(*args, **kwargs)
        refuse_merged(values)
        return values, unused

    def architecture(self) -> Architecture:
        return llada2_architecture(self.published())


class DreamConfig(LLaDAConfig):
    """config.json of Dream-7B: Qwen2's keys."""

    model_type = "Dream"
    attribute_map: ClassVar[dict[str, str]] = {}

    def __init__(self, **values: Any) -> None:  # as in LLaDAMoEConfig
        super().__init__(**values)

    def architecture(self) -> Architecture:
        return dream_architecture(self.published())


class ILLaDAConfig(LLaDAConfig):
    """config.json of iLLaDA-8B: a LLaMA's keys."""

    model_type = "illada"
    attribute_map: ClassVar[dict[str, str]] = {}

    def __init__(self, **values: Any) -> None:  # as in LLaDAMoEConfig
        super().__init__(**values)

    def architecture(self) -> Architecture:
        return illada_architecture(self.published())

    def dense(self) -> dict[str, Any]:
        here = self.published()
        tokens = {key: here[key] for key in TOKEN_KEYS if key in here}
        named = {own: here[key] for key, own in LLADA_NAMES.items()}
        return {**LLADA.template(), **named, "embedding_size": here["vocab_size"], **tokens}


AutoConfig.register("illada", ILLaDAConfig, exist_ok=True)
AutoConfig.register("Dream", DreamConfig, exist_ok=True)
AutoConfig.register("llada2_moe", LLaDA2Config, exist_ok=True)
AutoConfig.register("llada_blocks", LLaDABlocksConfig, exist_ok=True)
AutoConfig.register("llada", LLaDAConfig, exist_ok=True)  # importing this is enough for the Auto classes
