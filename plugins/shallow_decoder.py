"""A control: a dense decoder with fewer layers."""

from __future__ import annotations

from dataclasses import dataclass

from routing import (
    AllOrNothing,
    Decoder,
    Every,
    Nothing,
    Placement,
    RoutingPlugin,
    TokenKind,
    Unscored,
    Unweighted,
    WholeBlock,
    register,
)

EVERYTHING = tuple(kind for kind in TokenKind if kind is not TokenKind.PAD)


@register
@dataclass(frozen=True)
class ShallowDecoder(RoutingPlugin):
    """No token enters the given layers: what the same compute buys without any routing.

    Args:
        placement: Layers that are left out.
    """

    placement: Placement = Every(2, start=1)

    def apply(self, decoder: Decoder) -> None:
        for site in decoder.sites(self.placement):
            gate = decoder.gate(site, Unscored(), Unweighted(), AllOrNothing(EVERYTHING), Nothing())
            decoder.route_layer(site, gate, WholeBlock())
