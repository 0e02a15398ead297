"""What the reference does, in plain code: the yardstick of every ratio.

Forward: separate projections, RMSNorm and RoPE in float32 in every layer, the whole canvas, the whole vocabulary.
Generation: ML-GSAI's `generate` at temperature 0. Likelihood: its `get_log_likelihood`, one answer at a time. Written
from their description; knows our parameter names and nothing else of this package.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


class Reference:
    """A dense LLaDA read from a state dict; `heads` attention heads, rotary base `theta`."""

    def __init__(self, weights: dict[str, Tensor], heads: int, theta: float, eps: float) -> None:
        self.w, self.heads, self.eps = weights, heads, eps
        self.layers = 1 + max(int(name.split(".")[3]) for name in weights if ".blocks." in name)
        width = weights["model.transformer.wte.weight"].shape[1] // heads
        self.frequency = 1.0 / theta ** (torch.arange(0, width, 2).float() / width)
        self.angles: tuple[Tensor, Tensor] | None = None
        self.forwards = 0

    def norm(self, x: Tensor, name: str) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.w[name] * wide.to(x.dtype)

    def rotate(self, x: Tensor, start: int) -> Tensor:
        end = start + x.shape[-2]
        if self.angles is None or len(self.angles[0]) < end:
            angle = torch.outer(torch.arange(end).float(), self.frequency)
            angle = torch.cat([angle, angle], dim=-1).to(x.device)
            self.angles = angle.cos(), angle.sin()
        wide = x.float()
        left, right = wide.chunk(2, dim=-1)
        turned = torch.cat([-right, left], dim=-1)
        cos, sin = (angle[start:end] for angle in self.angles)
        return (wide * cos + turned * sin).to(x.dtype)

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        """(B, L) -> logits (B, L, V)."""
        return self.cached(tokens, [], 0)

    def cached(self, tokens: Tensor, kept: list[tuple[Tensor, Tensor]], start: int) -> Tensor:
        """(B, W) from position `start` -> logits (B, W, V); fills `kept` where it is empty, else writes these positions
        into it and attends to all that it holds (Fast-dLLM's dual cache).
        """
        self.forwards += 1
        filled = bool(kept)
        x = F.embedding(tokens, self.w["model.transformer.wte.weight"])
        for layer in range(self.layers):
            at = f"model.transformer.blocks.{layer}."
            h = self.norm(x, at + "attn_norm.weight")
            q, k, v = (
                F.linear(h, self.w[f"{at}{p}_proj.weight"]).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                for p in "qkv"
            )
            k = self.rotate(k, start)
            if filled:
                for held, new in zip(kept[layer], (k, v), strict=True):
                    held[:, :, start : start + new.shape[2]] = new
                k, v = kept[layer]
            else:
                kept.append((k, v))
            y = F.scaled_dot_product_attention(self.rotate(q, start), k, v)
            x = x + F.linear(y.transpose(1, 2).flatten(-2), self.w[at + "attn_out.weight"])
            h = self.norm(x, at + "ff_norm.weight")
            gate = F.silu(F.linear(h, self.w[at + "ff_proj.weight"]))
            x = x + F.linear(gate * F.linear(h, self.w[at + "up_proj.weight"]), self.w[at + "ff_out.weight"])
        return F.linear(self.norm(x, "model.transformer.ln_f.weight"), self.w["model.transformer.ff_out.weight"])


def generate(model: Reference, prompt: Tensor, *, steps: int, new: int, block: int, mask_id: int) -> Tensor:
    """ML-GSAI's sampler, greedy, low-confidence remasking; prompt (B, P)."""
    x = torch.full((len(prompt), prompt.shape[1] + new), mask_id, device=prompt.device)
    x[:, : prompt.shape[1]] = prompt
    per_block = steps // (new // block)
    for number in range(new // block):
        first, last = prompt.shape[1] + number * block, prompt.shape[1] + (number + 1) * block
        count = (x[:, first:last] == mask_id).sum(1)
        for i in range(per_block):
            logits = model(x)
            proposals = logits.argmax(-1)
            probability = F.softmax(logits, dim=-1).gather(-1, proposals[..., None])[..., 0]
            probability[:, last:] = -torch.inf
            is_open = x == mask_id
            confidence = torch.where(is_open, probability, -torch.inf)
            for row in range(len(x)):
                quota = int(count[row]) // per_block + (i < int(count[row]) % per_block)
                chosen = confidence[row].topk(quota).indices
                x[row, chosen] = proposals[row, chosen]
    return x


def log_likelihood(
    model: Reference, prompt: Tensor, answer: Tensor, *, samples: int, batch: int, mask_id: int
) -> float:
    """ML-GSAI's estimate for one answer: `samples` looks in batches of copies of the same row."""
    sequence, n, losses = torch.cat([prompt, answer]).repeat(batch, 1), len(answer), []
    for _ in range(samples // batch):
        start = torch.randint(1, n + 1, ()).item()
        counts = torch.linspace(float(start), start + (batch - 1) * (n / batch), steps=batch).round().long()
        counts = (counts - 1) % n + 1
        is_mask = torch.arange(n).repeat(batch, 1) < counts[:, None]
        for row in range(batch):
            is_mask[row] = is_mask[row][torch.randperm(n)]
        is_mask = torch.cat([torch.zeros(batch, len(prompt), dtype=torch.bool), is_mask], dim=1)
        logits = model(torch.where(is_mask, mask_id, sequence))
        share = (counts / n)[:, None].expand_as(sequence)
        loss = F.cross_entropy(logits[is_mask], sequence[is_mask], reduction="none") / share[is_mask]
        losses.append(loss.sum().item() / batch)
    return -sum(losses) / len(losses)
