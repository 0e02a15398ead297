"""Any masked language model of transformers (DistilBERT, BERT, ModernBERT, ...) behind the mask predictor's call.

Of a known kind only the asked-for positions go through the head; of others every position does.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, PreTrainedModel

from llada_core.modeling.predictor import KVCache, MaskPredictor, Prediction, projected_certainty, projected_nll
from llada_core.tokenizer import SpecialTokens


class MaskedLM(MaskPredictor):
    """A masked-LM as mask predictor: no cache, learned positions, its own length limit."""

    kind = "masked_lm"
    supports_cache = False
    ends_with_eos = True

    def __init__(self, backbone: PreTrainedModel, special_tokens: SpecialTokens) -> None:
        super().__init__()
        self.backbone = backbone
        self.name_special_tokens(special_tokens)

    @classmethod
    def rows_of(cls, config: Any) -> int:
        return int(config.vocab_size)

    @classmethod
    def of_config(cls, config: Any, special: SpecialTokens) -> Self:
        return cls(AutoModelForMaskedLM.from_config(config), special)

    @classmethod
    def fresh(cls, config: Any, special: SpecialTokens, seed: int) -> Self:
        """As transformers initialises it; its BERTs also want to be told what separates and what classifies."""
        for ours, theirs in (("eos", "sep"), ("bos", "cls")):
            if (value := getattr(special, f"{ours}_id")) is not None:
                setattr(config, f"{theirs}_token_id", value)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls.of_config(config, special)

    @classmethod
    def read(cls, folder: Path, config: Any, special: SpecialTokens, **how: Any) -> tuple[Self, dict[str, Any]]:
        backbone, info = AutoModelForMaskedLM.from_pretrained(folder, config=config, output_loading_info=True, **how)
        return cls(backbone, special), info

    @property
    def network(self) -> Any:
        return self.backbone

    def choose_attention(self, name: str) -> None:
        try:
            self.backbone.set_attn_implementation(name)
        except (ImportError, ValueError) as error:
            why = str(error).strip().splitlines()[0]
        else:
            why = f"it does {self.config._attn_implementation} alone"
        if self.config._attn_implementation != name:
            raise ValueError(f"attn_implementation {name!r} is none of {type(self.backbone).__name__}'s: {why}")

    @property
    def config(self) -> Any:
        """The backbone's transformers config."""
        return self.backbone.config

    @property
    def dtype(self) -> torch.dtype:
        return self.backbone.dtype

    @property
    def vocab_rows(self) -> int:
        return int(self.backbone.config.vocab_size)

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module | None:
        return self.backbone.get_output_embeddings()

    @property
    def max_length(self) -> int:
        embeddings = dict(self.backbone.base_model.named_modules()).get("embeddings.position_embeddings")
        first = getattr(embeddings, "padding_idx", None)  # RoBERTa counts positions from behind its padding id
        return int(self.backbone.config.max_position_embeddings) - (0 if first is None else first + 1)

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
        certainty: bool = False,
    ) -> Prediction:
        """As `LLaDAModelLM.forward`; `cache`, `slots` and `router_losses` are refused by name."""
        if attention_mask is not None and attention_mask.dim() == 3:
            attention_mask = attention_mask[:, None].bool()
        if cache is not None or slots is not None or router_losses:
            raise ValueError(f"{type(self.backbone).__name__} knows no cache, slots or router_losses")
        head = _head_of(self.backbone)
        network = self.backbone if head is None else self.backbone.base_model
        out = network(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            output_hidden_states=output_hidden_states,
        )
        x = out.logits if head is None else out.last_hidden_state
        states = out.hidden_states if output_hidden_states else None
        if positions is not None:
            x = x.flatten(0, 1)[positions]
        if targets is not None and certainty:
            nll, certain = projected_certainty(x, self._project, self.vocab_rows, targets)
            return Prediction(nll=nll, hidden_states=states, certainty=certain)
        if targets is not None:
            return Prediction(nll=projected_nll(x, self._project, self.vocab_rows, targets), hidden_states=states)
        return Prediction(logits=self._project(x), hidden_states=states)

    def _project(self, x: Tensor) -> Tensor:
        """All that the masked-LM applies after its body, position by position."""
        for step in _head_of(self.backbone) or ():
            x = step(x)
        return x


def _head_of(backbone: Any) -> list[Callable[[Tensor], Tensor]] | None:
    """The modules after the body, in order; None for a masked-LM not known here, which then projects every position."""
    parts: dict[str, Any] = dict(backbone.named_children())
    if "vocab_transform" in parts:  # DistilBERT
        return [parts["vocab_transform"], backbone.activation, parts["vocab_layer_norm"], parts["vocab_projector"]]
    if "cls" in parts:  # BERT and its kin
        return [parts["cls"]]
    if "head" in parts and "decoder" in parts:  # ModernBERT
        return [parts["head"], parts["decoder"]]
    if "lm_head" in parts:  # RoBERTa and its kin
        return [parts["lm_head"]]
    return None
