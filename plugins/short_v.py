"""ShortV: in some layers vision tokens are attended to as they are, and not worked on (arXiv 2504.00502)."""

from __future__ import annotations

from dataclasses import dataclass

from routing import (
    AllOrNothing,
    Between,
    Decoder,
    Nothing,
    Placement,
    RoutingPlugin,
    Unscored,
    Unweighted,
    WholeBlock,
    register,
)


@register
@dataclass(frozen=True)
class ShortV(RoutingPlugin):
    """ShortV (Yuan et al. 2025, arXiv 2504.00502): vision tokens frozen in the layers that change them least.

    A frozen token still gives its keys and values to the layer, made from what it is; it asks nothing and enters no
    feed-forward network. Needs no training and has no parameters. The paper picks the layers whose freezing moves the
    output least (layer contribution) and freezes about 60 % of them; here they are given.

    Args:
        placement: Layers in which vision tokens are frozen.
    """

    placement: Placement = Between(-4, -1)

    def apply(self, decoder: Decoder) -> None:
        for site in decoder.sites(self.placement):
            gate = decoder.gate(site, Unscored(), Unweighted(), AllOrNothing(), Nothing())
            decoder.route_layer(site, gate, WholeBlock(), passed_give="keys_and_values")
