"""What RoutingTruth and RoutingExperts wrote in the runs' folders, as tables: what routers chose and what they know."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean

from study import markdown as md
from study.grid import Run

Measures = Mapping[str, float | None]  # of one layer, by name
TRUTH, EXPERTS = "truth.json", "experts.json"
LOADS = ("load_max", "entropy", "token_bits", "question_bits", "dropped", "untaken", "null")
SHOWN = ("evidence_recall", "evidence_recall_by_chance", "evidence_auc", "position_share", "overlap", "ties")


def layers_of(run: Run, file: str = TRUTH) -> dict[str, Measures]:
    """The measures of each routed layer in the run's test; none where nobody took them."""
    written = sorted((run.folder / "logs").glob(f"version_*/{file}"))
    return json.loads(written[-1].read_text())["layers"] if written else {}


def measured(runs: Sequence[Run], file: str = TRUTH) -> dict[str, list[dict[str, Measures]]]:
    """By arm and level, the layers of each seed."""
    found: dict[str, list[dict[str, Measures]]] = {}
    for run in runs:
        if layers := layers_of(run, file):
            found.setdefault(run.cell, []).append(layers)
    return found


def lines(runs: Sequence[Run], arm: str) -> Iterator[str]:
    """Every arm, mean over its layers; then the layers of one arm."""
    found = measured(runs)
    yield (
        "Of the vision tokens that a question is about: the share kept (recall), the same if as many were drawn at"
        " random, and how well scores rank them (AUC). Of the choice: the share that position alone explains, the"
        " overlap with the routed layer before (Jaccard), the share of rows tied at the cut. Means over routed layers,"
        " questions and seeds; in brackets the smallest and largest seed."
    )
    yield ""
    rows = [(cell, *(over(seeds, name) for name in SHOWN)) for cell, seeds in found.items()]
    yield from md.table(("arm", *(name.replace("_", " ") for name in SHOWN)), rows)
    own = {cell: seeds for cell, seeds in found.items() if cell.partition("/")[0] == arm}
    for name in ("evidence_recall", "evidence_auc") if own else ():
        layers = sorted({layer for seeds in own.values() for each in seeds for layer in each})
        yield from ["", f"`{arm}` by layer, {name.replace('_', ' ')}:", ""]
        rows = [(cell, *(md.score(mean(seeds, layer, name)) for layer in layers)) for cell, seeds in own.items()]
        yield from md.table(("", *layers), rows)


def expert_lines(runs: Sequence[Run]) -> Iterator[str]:
    """Every arm with experts, mean over its layers."""
    yield (
        "Largest load over the mean one (1: balanced); bits of the router's softmax per token (0: sure); bits that the"
        " kind of a token, and of the question, tell of the expert that is chosen (0: nothing); shares of choices"
        " turned away, of tokens that nobody took, of choices that went to null experts. Of prompts, means over layers"
        " and seeds; in brackets the smallest and largest seed."
    )
    yield ""
    found = measured(runs, EXPERTS)
    shown = [name for name in LOADS if any(over(seeds, name) for seeds in found.values())]
    rows = [(cell, *(over(seeds, name) for name in shown)) for cell, seeds in found.items()]
    yield from md.table(("arm", *(name.replace("_", " ") for name in shown)), rows)


def over(seeds: Sequence[Mapping[str, Measures]], name: str) -> str:
    """The mean over layers, and how far seeds are apart."""
    each = [
        fmean(known)
        for layers in seeds
        if (known := [value for one in layers.values() if (value := one.get(name)) is not None])
    ]
    return f"{fmean(each):.3f} [{min(each):.3f}, {max(each):.3f}]" if each else ""


def mean(seeds: Sequence[Mapping[str, Measures]], layer: str, name: str) -> float | None:
    """Of one layer over seeds; None where it is not routed."""
    known = [value for layers in seeds if (value := layers.get(layer, {}).get(name)) is not None]
    return fmean(known) if known else None
