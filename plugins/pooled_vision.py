"""A control: vision tokens averaged over squares of patches, one token left for each.

Shape suffixes: B batch, T tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from routing import (
    All,
    Constant,
    Decoder,
    ExpertChoice,
    FixedScores,
    RouterInputs,
    RoutingPlugin,
    TokenKind,
    Tokens,
    Unweighted,
    WholeBlock,
    register,
)

FAR = 1 << 10  # more than the rows or columns of any tile


def squares_BT(tokens: Tokens, size: int) -> Tensor:
    """The number of the square that each vision token lies in, -1 elsewhere; int64 (B, T).

    Where places in the picture are unknown, size * size neighbours in the sequence stand for a square.
    """
    vision_BT = tokens.mask((TokenKind.VISION,))
    known_BT = vision_BT & (tokens.row_BT >= 0) & (tokens.column_BT >= 0)
    tile_BT = tokens.image_BT.long() * FAR + tokens.tile_BT.long()
    placed_BT = (tile_BT * FAR + tokens.row_BT.long() // size) * FAR + tokens.column_BT.long() // size
    counted_BT = (vision_BT.long().cumsum(1) - 1) // (size * size)
    return torch.where(known_BT, placed_BT, counted_BT).masked_fill(~vision_BT, -1)


def firsts_BT(square_BT: Tensor) -> Tensor:
    """True at the first token of each square; bool (B, T)."""
    order_BT = square_BT.argsort(dim=1, stable=True)
    sorted_BT = square_BT.gather(1, order_BT)
    first_BT = torch.ones_like(sorted_BT, dtype=torch.bool)
    first_BT[:, 1:] = sorted_BT[:, 1:] != sorted_BT[:, :-1]
    return torch.zeros_like(first_BT).scatter(1, order_BT, first_BT) & (square_BT >= 0)


@dataclass(frozen=True)
class Pooled(WholeBlock):
    """Each vision token comes to the layer as the mean of its square.

    Args:
        size: Patches of a square's side.
    """

    size: int = 2
    mixes = True

    def entering(self, x_BTD: Tensor, tokens: Tokens) -> Tensor:
        square_BT = squares_BT(tokens, self.size)
        # Squares get small numbers, in each row apart: 0 for what is none.
        order_BT = square_BT.argsort(dim=1, stable=True)
        sorted_BT = square_BT.gather(1, order_BT)
        new_BT = torch.zeros_like(sorted_BT)
        new_BT[:, 1:] = (sorted_BT[:, 1:] != sorted_BT[:, :-1]).long()
        number_BT = torch.zeros_like(new_BT).scatter(1, order_BT, new_BT.cumsum(1))
        index_BTD = number_BT[..., None].expand_as(x_BTD)
        sum_BTD = torch.zeros_like(x_BTD, dtype=torch.float32).scatter_add(1, index_BTD, x_BTD.float())
        count_BT = torch.zeros_like(number_BT, dtype=torch.float32).scatter_add(
            1, number_BT, torch.ones_like(number_BT, dtype=torch.float32)
        )
        mean_BTD = (sum_BTD / count_BT.clamp_min(1)[..., None]).gather(1, index_BTD)
        return torch.where((square_BT >= 0)[..., None], mean_BTD.to(x_BTD.dtype), x_BTD)


@dataclass(frozen=True)
class Corners(FixedScores):
    """Scores the first token of each square 1, all others 0.

    Args:
        size: Patches of a square's side.
    """

    size: int = 2

    def scores_BT(self, inputs: RouterInputs) -> Tensor:
        return firsts_BT(squares_BT(inputs.tokens, self.size)).to(torch.float32)


@register
@dataclass(frozen=True)
class PooledVision(RoutingPlugin):
    """The control that needs no routing: a coarser picture, each square of patches averaged to one token.

    The mean stands at the place of the square's first patch, and all layers work on the means alone. Sides of a picture
    that are no multiple of ``size`` leave smaller squares, of which as many are lost as the capacity has no place for.

    Args:
        size: Patches of a square's side, at least 2.
    """

    size: int = 2

    def __post_init__(self) -> None:
        if self.size < 2:
            raise ValueError(f"PooledVision(size={self.size}): squares have a side of at least 2 patches.")

    def apply(self, decoder: Decoder) -> None:
        first, *later = decoder.sites(All())
        share = Constant(1 / self.size**2 + 1e-6)  # counts are rounded down
        gate = decoder.gate(first, Corners(self.size), Unweighted(), ExpertChoice(), share)
        decoder.route_layer(first, gate, Pooled(self.size))
        for site in later:
            decoder.route_layer(site, decoder.follow(site, gate), WholeBlock())
