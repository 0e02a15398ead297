"""config.json of the published families as transformers configurations, written back as it was read.

Knows how transformers makes and stores a configuration; `architecture.py` knows what the keys mean.
"""

import functools
from importlib import import_module
from typing import Any, ClassVar, Self

from transformers import AutoConfig, PreTrainedConfig

from llada_core.modeling.architecture import TOKEN_KEYS, Architecture, dense_architecture, moe_architecture


@functools.cache
def _register_models() -> None:
    """Tells transformers which classes a LLaDA config stands for; done with the first config, as it imports torch."""
    auto, model = import_module("transformers"), import_module("llada_core.modeling.model")
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
