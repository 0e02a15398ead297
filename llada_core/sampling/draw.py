"""How a token is drawn from logits: the likeliest, or a Gumbel-max sample with noise of the row's own.

Noise is counter-based as in `diffusion`: a number is a hash of (seed, prompt, how many equal prompts precede it in the
batch), of how many numbers the row has drawn, and of the column. So the same seed gives the same answer whatever else
is in the batch and on whatever device, equal prompts get different answers, and there is no generator to keep in step.
Does not know models.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llada_core.diffusion import hashed, keyed


def gumbel_argmax(logits_PV: Tensor, temperature: float, uniforms_PV: Tensor) -> Tensor:
    """Samples softmax(logits / temperature) by argmax of exp(logit) / (-ln u)^temperature, taken as its logarithm.

    In the precision of `uniforms_PV`, float64 where the device has it, as arXiv:2409.02908 shows that low precision
    distorts the distribution. Overwrites `uniforms_PV`.
    """
    noise = uniforms_PV.log_().neg_().log_().mul_(temperature)
    return (logits_PV.to(noise.dtype) - noise).argmax(-1)


@dataclass
class RowNoise:
    """The random numbers of the active rows: `keys` (A,) int64, and how many rows of numbers each has drawn so far."""

    keys: Tensor
    drawn: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.drawn = [0] * len(self.keys)

    @classmethod
    def of_prompts(cls, prompts: Sequence[Tensor], seed: int | None, device: torch.device) -> "RowNoise":
        """Keys that depend on nothing but `seed`, the row's prompt and its number among equal prompts.

        Without a seed one is drawn from torch's global generator.
        """
        base = int(torch.randint(2**62, ()).item()) if seed is None else seed
        seen: dict[bytes, int] = {}
        keys = []
        for prompt in prompts:
            text = prompt.cpu().numpy().tobytes()
            number = seen[text] = seen.get(text, -1) + 1
            digest = hashlib.blake2b(f"{base} {number} ".encode() + text, digest_size=8).digest()
            keys.append(int.from_bytes(digest, "little", signed=True))
        return cls(torch.tensor(keys, dtype=torch.int64, device=device))

    def uniforms(self, counts: Sequence[int], width: int) -> Tensor:
        """(sum of counts, width) float64 in [0, 1), all 53 bits: the next `counts[i]` rows of numbers of row i.

        float32 of 24 bits on devices without float64 (mps).
        """
        device = self.keys.device
        numbers = [first + i for first, count in zip(self.drawn, counts, strict=True) for i in range(count)]
        rows = [row for row, count in enumerate(counts) for _ in range(count)]
        self.drawn = [first + count for first, count in zip(self.drawn, counts, strict=True)]
        row, number = torch.tensor([rows, numbers], dtype=torch.int64).to(device, non_blocking=True)
        bits = hashed(keyed(self.keys[row], number), width)
        if device.type == "mps":
            return ((bits >> 40) & 0xFFFFFF).to(torch.float32) * 2.0**-24
        return ((bits >> 11) & 0x1FFFFFFFFFFFFF).to(torch.float64) * 2.0**-53

    def keep(self, rows: Sequence[int]) -> None:
        """Only these of the active rows go on."""
        self.keys = self.keys[torch.tensor(rows, dtype=torch.int64, device=self.keys.device)]
        self.drawn = [self.drawn[i] for i in rows]
