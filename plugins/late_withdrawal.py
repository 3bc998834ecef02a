"""A control: after some layer no vision token is worked on, or attended to, any more."""

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
class LateWithdrawal(RoutingPlugin):
    """All vision tokens leave for good (withdrawal, arXiv 2403.06764 and others): what text has not read is lost.

    The control for every method that thins vision tokens in deep layers: it asks whether those layers need any.

    Args:
        placement: Layers without vision tokens; by default the last four.
    """

    placement: Placement = Between(-4, -1)

    def apply(self, decoder: Decoder) -> None:
        for site in decoder.sites(self.placement):
            gate = decoder.gate(site, Unscored(), Unweighted(), AllOrNothing(), Nothing())
            decoder.route_layer(site, gate, WholeBlock())
