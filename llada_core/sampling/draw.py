"""How a token is drawn from logits: the likeliest, or a Gumbel-max sample with noise of the row's own.

Every row has a private generator, seeded by (seed, prompt, how many equal prompts precede it in the batch): the same
seed gives the same answer whatever else is in the batch, and equal prompts get different answers. Does not know
models.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def gumbel_argmax(logits_PV: Tensor, temperature: float, uniforms_PV: Tensor) -> Tensor:
    """Samples softmax(logits / temperature) by argmax of exp(logit) / (-ln u)^temperature, taken as its logarithm.

    In float64, as arXiv:2409.02908 shows that low precision distorts the distribution. Overwrites `uniforms_PV`.
    """
    noise = uniforms_PV.log_().neg_().log_().mul_(temperature)
    return (logits_PV.double() - noise).argmax(-1)


@dataclass
class RowNoise:
    """One generator per active row."""

    generators: list[torch.Generator]

    @classmethod
    def of_prompts(cls, prompts: Sequence[Tensor], seed: int | None, device: torch.device) -> "RowNoise":
        """Generators that depend on nothing but `seed`, the row's prompt and its number among equal prompts.

        Without a seed one is drawn from torch's global generator.
        """
        base = int(torch.randint(2**62, ()).item()) if seed is None else seed
        seen: dict[bytes, int] = {}
        generators = []
        for prompt in prompts:
            text = prompt.cpu().numpy().tobytes()
            number = seen[text] = seen.get(text, -1) + 1
            digest = hashlib.blake2b(f"{base} {number} ".encode() + text, digest_size=8).digest()
            generator = torch.Generator(device=device)
            generator.manual_seed(int.from_bytes(digest, "little") >> 1)
            generators.append(generator)
        return cls(generators)

    def uniforms(self, counts: Sequence[int], width: int) -> Tensor:
        """(sum of counts, width) float64 in [0, 1): the next `counts[i]` rows of numbers of row i."""
        device = self.generators[0].device
        result = torch.empty(sum(counts), width, dtype=torch.float64, device=device)
        place = 0
        for generator, count in zip(self.generators, counts, strict=True):
            if count:
                torch.rand(count, width, dtype=torch.float64, generator=generator, out=result[place : place + count])
            place += count
        return result

    def keep(self, rows: Sequence[int]) -> None:
        """Only these of the active rows go on."""
        self.generators = [self.generators[i] for i in rows]
