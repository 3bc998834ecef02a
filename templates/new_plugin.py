"""NewPlugin: in the second half of the decoder, vision tokens skip layers (AUTHORS YEAR, arXiv NUMBER)."""

from __future__ import annotations

from dataclasses import dataclass

from routing import (
    Between,
    Constant,
    Decoder,
    ExpertChoice,
    LinearRouter,
    RouterSpec,
    RoutingPlugin,
    Sigmoid,
    TokenKind,
    WholeBlock,
    register,
)


@register
@dataclass(frozen=True)
class NewPlugin(RoutingPlugin):
    """NewPlugin (arXiv NUMBER): a vision token that is taken becomes x + w * (layer(x) - x), the others stay x.

    Each layer of the decoder's second half takes its best-scored vision tokens, w = sigmoid(score). Text is never
    routed, and attends only to the vision tokens that the layer takes.

    Args:
        share: Share of a row's vision tokens that a layer takes, in (0, 1].
        router: How vision tokens are scored.
    """

    share: float = 0.5
    router: RouterSpec = LinearRouter()

    def apply(self, decoder: Decoder) -> None:
        for site in decoder.sites(Between(len(decoder) // 2, -1)):
            best = ExpertChoice((TokenKind.VISION,))
            gate = decoder.gate(site, self.router, Sigmoid(), best, Constant(self.share))
            decoder.route_layer(site, gate, WholeBlock())
