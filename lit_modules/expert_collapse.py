"""Experts that nobody takes, and routers that send nearly everything to the same few.

Shape suffixes: E experts that are not null.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from lit_modules.collapse import IN_A_ROW, NEARLY, place
from lit_modules.expert_tally import ExpertCounts
from routing import Site

ENOUGH = 10  # choices an expert would get in a logged step if loads were equal; fewer may leave one out by chance
ADVICE = (
    "Raise the weight of the plugin's LoadBalance, give the router a std above 0, or start the experts unlike each"
    " other: upcycling: Copies(noise=0.01)."
)


class ExpertWatch:
    """Tells, once of each site, where nearly all choices go to as few experts as one token takes, or to some none.

    From the first logged step on: experts that learn nothing at the start fall behind for good.
    """

    def __init__(self) -> None:
        self._few: dict[Site, int] = {}  # for how many logged steps in a row nearly all choices went to a few experts
        self._nothing_E: dict[Site, np.ndarray] = {}  # for how many each expert got nothing
        self._told: dict[str, set[Site]] = {"collapsed": set(), "idle": set()}

    def see(self, counts: Mapping[Site, ExpertCounts]) -> Iterator[str]:
        """What is to be said after one more logged step, a sentence for each plugin and finding."""
        collapsed: defaultdict[str, list[str]] = defaultdict(list)
        idle: defaultdict[str, list[str]] = defaultdict(list)
        for site, each in counts.items():
            if each.choices < ENOUGH * each.experts:
                continue
            few, nobody = self._seen(site, each)
            if few and site not in self._told["collapsed"]:
                self._told["collapsed"].add(site)
                got = each.load_E[few].sum() / each.load_E.sum()
                collapsed[site.by].append(f"{place(site)} ({named(few)} of {each.experts} got {got:.1%})")
            elif nobody and site not in self._told["collapsed"] | self._told["idle"]:
                self._told["idle"].add(site)
                idle[site.by].append(f"{place(site)} ({named(nobody)} of {each.experts})")
        yield from (collapse(by, sites) for by, sites in collapsed.items())
        yield from (idleness(by, sites) for by, sites in idle.items())

    def _seen(self, site: Site, counts: ExpertCounts) -> tuple[list[int], list[int]]:
        """The few experts that have shared nearly all choices for some steps, and those that got none; else empty."""
        few, load_E = busiest(counts.load_E), counts.load_E
        alike = len(few) <= per_token(counts) < counts.experts
        self._few[site] = self._few.get(site, 0) + 1 if alike else 0
        self._nothing_E[site] = np.where(load_E == 0, self._nothing_E.get(site, 0) + 1, 0)
        nobody = np.flatnonzero(self._nothing_E[site] >= IN_A_ROW).tolist()
        return (few if self._few[site] >= IN_A_ROW else []), nobody


def collapse(by: str, sites: Sequence[str]) -> str:
    """In words."""
    return (
        f"Plugin {by!r} has collapsed: in {IN_A_ROW} logged steps in a row at least {1 - NEARLY:.0%} of the choices"
        f" went to no more experts than one token takes, lastly at {', '.join(sites)}. Nearly all tokens get the same"
        f" experts: the layer is as good as dense, and the other experts learn nothing. {ADVICE}"
    )


def idleness(by: str, sites: Sequence[str]) -> str:
    """In words."""
    return (
        f"Plugin {by!r} has experts that nobody takes: in {IN_A_ROW} logged steps in a row no choice at all went to"
        f" these: {', '.join(sites)}. They learn nothing, and only take memory. {ADVICE}"
    )


def per_token(counts: ExpertCounts) -> int:
    """Experts that a token takes, null ones too; at least 1."""
    return max(1, round(counts.choices / max(counts.total, 1)))


def busiest(load_E: np.ndarray) -> list[int]:
    """The fewest experts that share nearly all choices, lowest first; all of them where there are no choices."""
    order_E = np.argsort(-load_E, kind="stable")
    enough_E = load_E[order_E].cumsum() >= (1 - NEARLY) * max(load_E.sum(), 1)
    most = int(enough_E.argmax()) + 1 if enough_E.any() else len(load_E)
    return sorted(order_E[:most].tolist())


def named(experts: Sequence[int]) -> str:
    """In words."""
    return f"expert{'s' * (len(experts) > 1)} {', '.join(map(str, experts))}"
