"""Any transformers masked-LM (DistilBERT, BERT, ModernBERT ...) behind the mask predictor's call.

Knows how to reach the vocabulary projection of such a model; does not know which backbone it is.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedModel

from llada_core.families import SpecialTokens
from llada_core.modeling.cache import KVCache
from llada_core.modeling.nll import projected_nll
from llada_core.modeling.predictor import MaskPredictor, Prediction


class MaskedLM(MaskPredictor):
    """A masked-LM as mask predictor: no cache, learned positions, its own length limit."""

    supports_cache = False
    closes = True

    def __init__(self, backbone: PreTrainedModel, special_tokens: SpecialTokens) -> None:
        super().__init__()
        self.backbone = backbone
        self._special = special_tokens.check(backbone.config.vocab_size)

    @property
    def config(self) -> Any:
        """The backbone's transformers config."""
        return self.backbone.config

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    @property
    def dtype(self) -> torch.dtype:
        return self.backbone.dtype

    @property
    def vocab_rows(self) -> int:
        return int(self.backbone.config.vocab_size)

    @property
    def max_length(self) -> int:
        return int(self.backbone.config.max_position_embeddings)

    def forward(  # noqa: PLR0913 - the one call of the library, see LLaDAModelLM.forward
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        targets: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache: KVCache | None = None,
        slots: Tensor | None = None,
        output_hidden_states: bool = False,
        router_losses: bool = False,
    ) -> Prediction:
        """As `LLaDAModelLM.forward`; `cache`, `slots` and `router_losses` are refused by name."""
        if cache is not None or slots is not None or router_losses:
            raise ValueError(f"{type(self.backbone).__name__} knows no cache, slots or router_losses")
        body = self.backbone.base_model
        out = body(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            output_hidden_states=output_hidden_states,
        )
        x = out.last_hidden_state
        states = out.hidden_states if output_hidden_states else None
        if positions is not None:
            x = x.flatten(0, 1)[positions]
        head = _Head(self.backbone)
        if targets is not None:
            return Prediction(nll=projected_nll(x, head, targets), hidden_states=states)
        return Prediction(logits=head(x), hidden_states=states)


class _Head(nn.Module):
    """All that a masked-LM applies after its body, row by row."""

    def __init__(self, backbone: PreTrainedModel) -> None:
        super().__init__()
        self.weight = backbone.get_output_embeddings().weight
        self.apply_to = _head_of(backbone)

    def forward(self, x: Tensor) -> Tensor:
        for step in self.apply_to:
            x = step(x)
        return x


def _head_of(backbone: PreTrainedModel) -> list[Any]:
    """The modules after the body, in order, of the masked-LM classes of transformers."""
    parts = dict(backbone.named_children())
    if "vocab_transform" in parts:  # DistilBERT
        return [parts["vocab_transform"], backbone.activation, parts["vocab_layer_norm"], parts["vocab_projector"]]
    if "cls" in parts:  # BERT and its kin
        return [parts["cls"]]
    if "head" in parts and "decoder" in parts:  # ModernBERT
        return [parts["head"], parts["decoder"]]
    if "lm_head" in parts:  # RoBERTa and its kin
        return [parts["lm_head"]]
    raise ValueError(f"{type(backbone).__name__}: its vocabulary head was not found; use BERT, DistilBERT or ModernBERT")


def new_masked_lm(values: dict[str, Any], vocab_size: int, special_tokens: SpecialTokens, seed: int) -> MaskedLM:
    """A freshly initialised masked-LM from its `model_type` and config keys."""
    kind = values.pop("model_type")
    config = AutoConfig.for_model(kind, **{**values, "vocab_size": vocab_size, "pad_token_id": special_tokens.pad_id})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MaskedLM(AutoModelForMaskedLM.from_config(config), special_tokens)
