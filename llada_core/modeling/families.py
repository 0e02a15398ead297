"""What tells one family of networks from another: its configuration, the names of its weights, its special tokens."""

import functools
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming

from llada_core.files import document
from llada_core.modeling.architecture import TOKEN_KEYS, Architecture, dense_architecture, moe_architecture
from llada_core.tokenizer import SpecialTokens, family_of, named_ids


def special_tokens_of(folder: Path, defaults: Mapping[str, Any], rows: int) -> SpecialTokens:
    """Each id as config.json writes it, else as the tokenizer beside it, else `defaults`, else the published family.

    The family is that with this architecture and this very vocabulary; `defaults` are a configuration class's own.
    `ValueError` if nobody names MASK and EOS, if config.json and tokenizer disagree on MASK, or an id is not below
    `rows`, the number of vocabulary rows.
    """
    config = document(folder / "config.json")
    family = family_of(config.get("architectures") or [], config.get("vocab_size", rows))
    usual = {} if family is None else vars(family.special)
    spoken = named_ids(folder)
    sources = (usual, _ids(defaults), spoken, _ids(config))
    ids = {name: value for source in sources for name, value in source.items() if value is not None}
    if not {"mask_id", "eos_id"} <= ids.keys():
        raise ValueError(
            f"{folder}: neither config.json nor a tokenizer names the mask and end tokens;"
            " pass special_tokens=SpecialTokens(mask_id=..., eos_id=..., pad_id=...)"
        )
    if "mask_id" in spoken and spoken["mask_id"] != ids["mask_id"]:
        raise ValueError(
            f"{folder}: config.json says mask_token_id {ids['mask_id']}, its tokenizer {spoken['mask_id']};"
            " pass special_tokens=SpecialTokens(...) to decide"
        )
    return SpecialTokens(**{"pad_id": ids["eos_id"], **ids}).check(rows)


def _ids(config: Mapping[str, Any]) -> dict[str, int | None]:
    return {key.replace("_token_id", "_id"): config.get(key) for key in TOKEN_KEYS}


_RENAMED = {
    "model.embed_tokens": "model.transformer.wte",
    "model.norm": "model.transformer.ln_f",
    "model.layers": "model.transformer.blocks",
    "lm_head": "model.transformer.ff_out",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ff_norm",
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "self_attn.q_norm": "q_norm",
    "self_attn.k_norm": "k_norm",
}


def own_name(published: str) -> str:
    """Our name of a LLaDA-MoE parameter that is not an expert's."""
    for theirs, ours in _RENAMED.items():
        published = published.replace(theirs, ours)
    return published


def published_name(own: str) -> str:
    """The published name of a LLaDA-MoE parameter of ours that is not an expert's."""
    for theirs, ours in reversed(_RENAMED.items()):
        own = own.replace(ours, theirs)
    return own


def published_shapes(own: Mapping[str, Tensor], *, sparse: bool) -> dict[str, tuple[int, ...]]:
    """Published name and shape of every weight of a state dict of ours; experts one by one."""
    if not sparse:
        return {name: tuple(weight.shape) for name, weight in own.items()}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, weight in own.items():
        stem, dot, stack = published_name(name).partition(".experts.")
        if not dot:
            shapes[stem] = tuple(weight.shape)
            continue
        n_experts, rows, columns = weight.shape
        parts = {"down_proj": rows} if stack == "down" else {"gate_proj": rows // 2, "up_proj": rows // 2}
        for part, height in parts.items():
            shapes.update({f"{stem}.experts.{e}.{part}.weight": (height, columns) for e in range(n_experts)})
    return shapes


def register_names() -> None:
    """Makes transformers load and save `LLaDAMoEModelLM` under the published names; experts are stacked on the way."""
    experts = [
        WeightConverter(
            ["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"],
            "mlp.experts.gate_up",
            [MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter("mlp.experts.*.down_proj.weight", "mlp.experts.down", [MergeModulelist(dim=0)]),
    ]
    renamings = [WeightRenaming(published, own) for published, own in _RENAMED.items()]
    register_checkpoint_conversion_mapping("LLaDAMoEModelLM", [*renamings, *experts], overwrite=True)


@functools.cache
def _register_models() -> None:
    """Tells transformers which classes a LLaDA config stands for; done with the first config, as it imports torch."""
    auto, model = import_module("transformers"), import_module("llada_core.modeling.network")
    for chooser in (auto.AutoModel, auto.AutoModelForCausalLM):
        chooser.register(LLaDAConfig, model.LLaDAModelLM, exist_ok=True)
        chooser.register(LLaDAMoEConfig, model.LLaDAMoEModelLM, exist_ok=True)


class LLaDAConfig(PreTrainedConfig):
    """config.json of the dense family (LLaDA 8B, 1.5, iLLaDA); `from_dict` gives the MoE one where the file is one."""

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
        """The config of either family: MoE where `architectures` or `num_experts` says so, whatever `model_type` is."""
        architectures = config_dict.get("architectures") or []
        is_moe = "LLaDAMoEModelLM" in architectures or "num_experts" in config_dict
        chosen = LLaDAMoEConfig if is_moe else LLaDAConfig
        return super(LLaDAConfig, chosen).from_dict(config_dict, **kwargs)

    def architecture(self) -> Architecture:
        """What to build; raises `ValueError` naming the first key that is missing, unknown or unsupported."""
        return dense_architecture(self.published())

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


class LLaDAMoEConfig(LLaDAConfig):
    """config.json of LLaDA-MoE, which also calls its `model_type` "llada"."""

    attribute_map: ClassVar[dict[str, str]] = {}

    def __init__(self, **values: Any) -> None:  # transformers would replace an inherited one by a dataclass's
        super().__init__(**values)

    def architecture(self) -> Architecture:
        return moe_architecture(self.published())


AutoConfig.register("llada", LLaDAConfig, exist_ok=True)  # importing this is enough for the Auto classes
