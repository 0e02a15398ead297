"""The shape of a model that starts from nothing, as one frozen value.

Knows names and limits; does not know torch. A stage that starts from a checkpoint takes its shape from there.
"""

from typing import Literal, Self

from pydantic import Field, model_validator

from llada_core.settings import Block


class ModelParams(Block):
    """Shape of a fresh model; the first group means the same for dense and mixture-of-experts models."""

    kind: Literal["llada", "llada_moe", "masked_lm"] = "llada"
    d_model: int = Field(default=256, ge=8)
    n_layers: int = Field(default=6, ge=1)
    n_heads: int = Field(default=4, ge=1)
    n_kv_heads: int | None = Field(default=None, ge=1)
    mlp_hidden_size: int = Field(default=768, ge=8)
    max_sequence_length: int = Field(default=1024, ge=8)
    rope_theta: float = Field(default=500000.0, gt=0)
    rms_norm_eps: float = Field(default=1e-5, gt=0)
    weight_tying: bool = False
    qk_norm: bool = False
    # mixture of experts
    num_experts: int = Field(default=8, ge=2)
    experts_per_token: int = Field(default=2, ge=1)
    expert_hidden_size: int = Field(default=256, ge=8)
    # any transformers masked-LM: its `model_type` and config keys
    backbone: dict[str, str | int | float | bool] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.d_model % (2 * self.n_heads):
            raise ValueError(f"d_model {self.d_model} must be an even multiple of n_heads {self.n_heads} (RoPE pairs)")
        if self.n_kv_heads is not None and self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_kv_heads {self.n_kv_heads} must divide n_heads {self.n_heads}")
        if self.experts_per_token > self.num_experts:
            raise ValueError(f"experts_per_token {self.experts_per_token} is more than num_experts {self.num_experts}")
        if self.kind == "masked_lm" and "model_type" not in self.backbone:
            raise ValueError("kind masked_lm needs backbone.model_type, for example distilbert")
        return self


class LoraParams(Block):
    """Low-rank adapters through peft; `targets` are names or a regular expression, `all-linear` excludes the head."""

    r: int = Field(default=32, ge=1)
    alpha: int = Field(default=64, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: str | tuple[str, ...] = "all-linear"
    bias: Literal["none", "all", "lora_only"] = "none"  # biases that train: of the network, or of the adapted layers
    modules_to_save: tuple[str, ...] = ()  # trained whole beside the adapter, such as wte, ln_f and ff_out (the head)
    four_bit: bool = False  # QLoRA: the frozen weights in nf4 (needs a GPU and bitsandbytes)
    double_quant: bool = False  # four_bit: its scales in eight bits, 0.4 bit less for each weight
    merge: bool = True  # export the merged model rather than the adapter

    @model_validator(mode="after")
    def _four_bits_stay_frozen(self) -> Self:
        if self.four_bit and self.merge:
            raise ValueError("four_bit rounds the weights it freezes, so the adapter is not merged: set merge: false")
        if self.double_quant and not self.four_bit:
            raise ValueError("double_quant stores the scales of four_bit in fewer bits: set four_bit: true")
        return self
