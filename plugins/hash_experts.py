"""A control: experts that every word and every place in a picture is given by lot (Hash Layers, arXiv 2106.04426).

Shape suffixes: B batch, T tokens, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from routing import (
    Copies,
    Decoder,
    Every,
    Placement,
    Router,
    RouterInputs,
    RouterSpec,
    RoutingPlugin,
    Softmax,
    TokenChoice,
    TokenKind,
    Upcycling,
    register,
)

NEVER = -1e4  # a score whose weight is 0 in float32
PRIME, MASK = 0x9E3779B1, 0xFFFFFFFF


class HashRouter(Router):
    """Scores two experts of a token 0, all others so low that their weight is 0; has no parameters."""

    def __init__(self, experts: int, seed: int) -> None:
        super().__init__()
        self.experts, self.seed = experts, seed

    def forward(self, inputs: RouterInputs) -> Tensor:
        tokens, words_BT = inputs.tokens, inputs.words_BT
        if words_BT is None:
            raise ValueError(
                f"HashExperts: layer {inputs.site.layer} was asked without the tokens' numbers.\nAllowed: a forward"
                " with input_ids.\nPass those."
            )
        place_BT = (tokens.tile_BT.long() * 4096 + tokens.row_BT.long()) * 4096 + tokens.column_BT.long()
        key_BT = torch.where(tokens.kind_BT.eq(TokenKind.VISION), ~place_BT, words_BT)
        key_BT = mixed(key_BT + ((self.seed * 512 + inputs.site.layer) * PRIME & MASK))
        first_BT = key_BT % self.experts
        second_BT = (first_BT + 1 + mixed(key_BT) % (self.experts - 1)) % self.experts
        lot_BT2 = torch.stack([first_BT, second_BT], dim=-1)
        scores_BTE = torch.full((*tokens.shape, self.experts), NEVER, device=key_BT.device)
        return scores_BTE.scatter(2, lot_BT2, 0.0)


def mixed(key: Tensor) -> Tensor:
    """Numbers of 32 bits, each bit of which depends on all bits of the key, the same on every device."""
    for _ in range(2):
        key = ((key & MASK) ^ ((key & MASK) >> 16)) * 0x45D9F3B & MASK
    return key ^ (key >> 16)


@dataclass(frozen=True)
class Hashed(RouterSpec):
    """Two experts by lot, for each word of the vocabulary and each place in a picture, in each layer anew.

    Args:
        seed: Of the lot.
    """

    seed: int = 0

    def build(self, dim: int, experts: int) -> Router:
        if experts < 2:
            raise ValueError(f"{self} was asked for {experts} experts.\nAllowed: 2 or more.\nGive more experts.")
        return HashRouter(experts, self.seed)


@register
@dataclass(frozen=True)
class HashExperts(RoutingPlugin):
    """The control that knows what a token is, and nothing of what it means here: two experts by lot, weighed alike.

    A word has the same experts wherever it stands, a patch those of its place in the picture. What learned routers are
    worth beyond more parameters is their distance to this. Without ``tape.about``, which ``lit``'s commands use, nobody
    tells a patch's place, and all patches have the same experts.

    Args:
        placement: Routed layers.
        experts: Experts of a layer, at least 2.
        upcycling: What the experts start as.
        seed: Of the lot.
    """

    placement: Placement = Every(2)
    experts: int = 4
    upcycling: Upcycling = Copies()
    seed: int = 0

    def apply(self, decoder: Decoder) -> None:
        for site in decoder.sites(self.placement, "mlp"):
            gate = decoder.gate(
                site, Hashed(self.seed), Softmax(), TokenChoice(2), None, "shared", experts=self.experts
            )
            decoder.route_mlp(site, gate, self.upcycling, self.experts)
