"""The published families as data: special tokens, special strings and complete config.json templates.

Knows the checkpoints' conventions and where the templates lie; does not know torch or transformers.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class SpecialTokens:
    """The token ids a masked-diffusion model cannot do without, and the two that only a chat needs."""

    mask_id: int
    eos_id: int
    pad_id: int
    bos_id: int | None = None
    eot_id: int | None = None

    def check(self, vocab_size: int) -> "SpecialTokens":
        """These tokens, once every id lies in `[0, vocab_size)` and MASK is none of the others; else `ValueError`."""
        named = {k: v for k, v in vars(self).items() if v is not None}
        for name, value in named.items():
            if not 0 <= value < vocab_size:
                raise ValueError(f"{name} {value} is outside the vocabulary (0..{vocab_size - 1})")
            if name != "mask_id" and value == self.mask_id:
                raise ValueError(f"{name} is {value}, which is also mask_id; the mask must be a token of its own")
        return self

    @property
    def end_ids(self) -> frozenset[int]:
        """The ids after which an answer is over."""
        return frozenset(i for i in (self.eos_id, self.eot_id) if i is not None)


BOS, EOS, MASK = "<|startoftext|>", "<|endoftext|>", "<|mdm_mask|>"
HEADER_START, HEADER_END, EOT = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
SPECIAL_STRINGS = (BOS, EOS, MASK, HEADER_START, HEADER_END, EOT)
"""LLaDA's special strings in the order in which a tokenizer trained here numbers them."""

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
"""LLaDA's chat format (LLaDA-8B-Instruct)."""

MASK_STRINGS = (MASK, "<|mask|>", "[MASK]", "<mask>")
EOT_STRINGS = (EOT, "<|role_end|>")


@dataclass(frozen=True)
class Family:
    """One published family: where its special tokens are when nothing nearer names them, and its config.json."""

    name: str
    special: SpecialTokens

    @cached_property
    def config(self) -> dict[str, Any]:
        """The published config.json."""
        return dict(json.loads((Path(__file__).parent / "modeling" / f"{self.name}.json").read_text(encoding="utf-8")))

    @property
    def vocab_size(self) -> int:
        return int(self.config["vocab_size"])


LLADA = Family("LLaDA-8B", SpecialTokens(126336, 126081, 126081, bos_id=126080, eot_id=126348))
LLADA_MOE = Family("LLaDA-MoE-7B-A1B", SpecialTokens(156895, 156892, 156892))
FAMILIES = (LLADA, LLADA_MOE)


def family_of(architectures: list[str], vocab_size: int) -> Family | None:
    """The published family with this architecture and exactly this vocabulary (same vocabulary, same ids)."""
    same = (f for f in FAMILIES if f.config["architectures"] == architectures and f.vocab_size == vocab_size)
    return next(same, None)
