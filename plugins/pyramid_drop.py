"""PyramidDrop: vision tokens leave for good in stages, ranked anew at each (arXiv 2410.17247)."""

from __future__ import annotations

from dataclasses import dataclass

from routing import (
    Between,
    Constant,
    Decoder,
    ExpertChoice,
    Gate,
    ReceivedAttention,
    RoutingPlugin,
    Unweighted,
    WholeBlock,
    register,
)


@register
@dataclass(frozen=True)
class PyramidDrop(RoutingPlugin):
    """PyramidDrop (Xing et al. 2024, arXiv 2410.17247, section 3.2): stages of equal depth, each with fewer tokens.

    At the start of each stage but the first, the vision tokens still there are ranked by the attention that the last
    token of the instruction pays them in the layer before, averaged over heads, and the best ``ratio`` of them stay.
    Works without training, and may be trained with.

    Args:
        stages: Stages of equal depth, at least 2.
        ratio: Share of a stage's vision tokens that the next one keeps, the paper's lambda, in (0, 1).
    """

    stages: int = 4
    ratio: float = 0.5

    def __post_init__(self) -> None:
        if self.stages < 2 or not 0 < self.ratio < 1:
            raise ValueError(
                f"PyramidDrop(stages={self.stages}, ratio={self.ratio}): give at least 2 stages and a ratio in (0, 1),"
                " such as the paper's 4 and 0.5."
            )

    def apply(self, decoder: Decoder) -> None:
        if len(decoder) < self.stages:
            raise ValueError(
                f"PyramidDrop(stages={self.stages}): a decoder of {len(decoder)} layers has no place for them; give at"
                f" most {len(decoder)}."
            )
        starts = [round(stage * len(decoder) / self.stages) for stage in range(1, self.stages)]
        leader: Gate | None = None
        for site in decoder.sites(Between(starts[0], -1)):
            if site.layer in starts:
                share = Constant(self.ratio ** (1 + starts.index(site.layer)))
                leader = decoder.gate(site, ReceivedAttention("last"), Unweighted(), ExpertChoice(), share)
                decoder.route_layer(site, leader, WholeBlock())
            elif leader is not None:
                decoder.route_layer(site, decoder.follow(site, leader), WholeBlock())
