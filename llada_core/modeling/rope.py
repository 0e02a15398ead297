"""Rotary position embedding: cached fp32 tables and the rotation itself.

Knows angles; does not know attention, heads' meaning, or which positions are padding.
"""

import torch
from torch import Tensor


class RotaryTables:
    """cos and sin of every position, fp32, grown to the longest length asked for and kept per device.

    No buffer: nothing to save, and nothing that loading on the meta device could leave unfilled.
    """

    def __init__(self, theta: float, head_width: int) -> None:
        self.theta, self.head_width = theta, head_width
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def upto(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and signed sin, each (length, H) fp32, for positions 0..length-1; sin is negated in its first half."""
        if device not in self._tables or self._tables[device][0].shape[0] < length:
            # a table made under inference_mode could not be used by a later training step
            with torch.inference_mode(False), torch.no_grad():
                self._tables[device] = self._compute(length, device)
        cos, sin = self._tables[device]
        return cos[:length], sin[:length]

    def _compute(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        exponent = torch.arange(0, self.head_width, 2, device=device, dtype=torch.float32) / self.head_width
        angle = torch.outer(torch.arange(length, device=device, dtype=torch.float32), 1.0 / self.theta**exponent)
        return torch.cat([angle.cos()] * 2, dim=-1), torch.cat([-angle.sin(), angle.sin()], dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x` (B, L, N, H) rotated half-split in fp32 and cast back; cos and signed sin broadcast as (..., L, 1, H)."""
    wide = x.float()
    return torch.addcmul(wide * cos, wide.roll(x.shape[-1] // 2, dims=-1), sin).type_as(x)
