"""Where kept tokens stand in a layer that numbers them anew.

Shape suffixes: B batch, K kept tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from routing.cache import RoutedKV
from routing.decision import KeptTokens


@dataclass(frozen=True, eq=False)
class CompactPositions:
    """Kept tokens stand at 0, 1, 2, … in their layer, whoever passed it by (gamma-MoD's code).

    No ``nn.Module``: the rotary module belongs to the decoder, which all layers share.

    Args:
        rotary: The decoder's rotary module, which turns positions into angles.
    """

    rotary: nn.Module

    def __call__(self, x_BTD: Tensor, entering: KeptTokens | None, held: RoutedKV | None) -> tuple[Tensor, ...]:
        """Angles of the tokens that enter (None: all), behind those that the layer holds already; (B, K, …) each."""
        B, T, _ = x_BTD.shape
        if entering is None:
            place_BK = torch.arange(T, device=x_BTD.device).expand(B, -1)
        else:
            place_BK = (entering.valid_BK.long().cumsum(1) - 1).clamp_min(0)
        before = 0 if held is None else held.filled_B()
        behind_BK = place_BK + (before[:, None] if isinstance(before, Tensor) else before)
        angles: tuple[Tensor, ...] = self.rotary(x_BTD, position_ids=behind_BK)
        return angles
