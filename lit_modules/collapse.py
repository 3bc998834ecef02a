"""Routers that a rule without a capacity has let slip: to nearly every token, or to nearly none."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from math import isnan
from typing import Literal

from lit_modules.tally import Counts
from routing import Site

Side = Literal["everything", "nothing"]

NEARLY = 0.01  # share of the candidates that may still differ
IN_A_ROW = 3  # logged steps
SETTLED = 0.1  # share of the training that a router has to find its way
MEANS: dict[Side, str] = {
    "everything": "They are as good as dense, and save nothing. Raise the weight of the plugin's loss on its load, or"
    " start the router's bias lower.",
    "nothing": "They do nothing, and a token that passes by sends its gate no gradient but that of the load. Lower the"
    " weight of the plugin's loss on its load, give that loss a target above 0, or start the router's bias higher.",
}


class CollapseWatch:
    """Tells, once of each site, where tokens decide alone and nearly all of them decide alike.

    A rule that follows a capacity is held by it, and is not watched.
    """

    def __init__(self) -> None:
        self._since: dict[Site, tuple[Side, int]] = {}
        self._told: set[Site] = set()

    def see(self, counts: Mapping[Site, Counts], progress: float) -> Iterator[str]:
        """What is to be said after one more logged step, a sentence for each plugin and side."""
        found: defaultdict[tuple[str, Side], list[tuple[Site, float]]] = defaultdict(list)
        for site, each in counts.items():
            if progress < SETTLED or not each.total:
                continue
            side = leans(each)
            before, steps = self._since.get(site, (side, 0))
            if side is None:
                self._since.pop(site, None)
                continue
            self._since[site] = side, steps + 1 if side == before else 1
            if self._since[site][1] >= IN_A_ROW and site not in self._told:
                self._told.add(site)
                found[site.by, side].append((site, each.retention))
        for (by, side), sites in found.items():
            kept = ", ".join(f"{place(site)} ({share:.1%})" for site, share in sites)
            yield (
                f"Plugin {by!r} lets {side} in: in {IN_A_ROW} logged steps in a row these kept nearly {side} of what"
                f" they decide on: {kept}. {MEANS[side]}"
            )


def leans(counts: Counts) -> Side | None:
    """Where the candidates of a site without a capacity all go; None where they differ, or where one is followed."""
    if not isnan(counts.target):
        return None
    if counts.retention >= 1 - NEARLY:
        return "everything"
    return "nothing" if counts.retention <= NEARLY else None


def place(site: Site) -> str:
    """A site in words."""
    return f"layer {site.layer}" if site.part == "layer" else f"layer {site.layer}'s {site.part}"
