"""``lit arank`` and ``lit plan``: which layers of a config's dense model its depth plugin should route."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning import seed_everything

from lit_modules.attention_rank import attention_ranks
from lit_modules.dense_subject import DenseSubject, Sample, loaded
from lit_modules.estimate import Estimate
from lit_modules.layer_files import LayerFiles, table
from lit_modules.layer_options import LABELS, Options, PlanOptions, RankOptions, command, parsed
from lit_modules.layer_plan import placeable, planner, refusals, upward
from lit_modules.layer_plots import plan_figure, ranks_figure
from lit_modules.layer_scores import layer_effects
from lit_modules.measured_rows import Rows


def arank(args: list[str], default_config: Path) -> None:
    """Measures ARank layer by layer, and writes what lies under the rule."""
    options, given = parsed("arank", RankOptions, args, default_config)
    dense, files = prepared(options, given, LayerFiles(Path(options.out), "arank"))
    refused = refusals(dense, options.plugin)
    options.rule.check(dense.depth - len(refused))
    rows = Rows(dense.samples(options.samples, options.split), options.samples, options.split)
    ranks = attention_ranks(dense, rows)
    chosen, complaint = (), None
    try:
        chosen = options.rule(ranks, refused)
    except ValueError as error:  # what was measured is kept
        complaint = error
    told = {n: "cannot be" if n in refused else "yes" if n in chosen else "no" for n in range(len(ranks))}
    print(table(("layer", "ARank", "ARank / (S - 1)", "routed"), [(*vars(r).values(), told[r.layer]) for r in ranks]))
    explain(options, refused, rows, ranks[0].rank.samples)
    layers = [{**asdict(r), "routed": r.layer in chosen, "why": refused.get(r.layer)} for r in ranks]
    numbers = {**asdict(options), **rows.numbers(ranks[0].rank.samples), "rule": str(options.rule), "layers": layers}
    files.measured(numbers, ranks_figure(ranks, options.rule, chosen))
    if complaint is not None:
        raise complaint
    said = place(files, dense, options, chosen, f"ARank, rule: {options.rule}; {command('arank', args)}")
    print(f"\n{len(chosen)} of {len(ranks)} layers are routed ({options.rule}); give them back by --config {said}")


def plan(args: list[str], default_config: Path) -> None:
    """Orders the layers by a score, and writes the fewest that reach the budget."""
    options, given = parsed("plan", PlanOptions, args, default_config)
    dense, files = prepared(options, given, LayerFiles(Path(options.out), "plan"))
    tokens = dense.prompts()
    planned = planner(dense, options.plugin, options.budget, tokens)
    rows = Rows(dense.samples(options.samples), options.samples, "train")
    scores = layer_scores(dense, rows, options)
    numbers = {**asdict(options), **rows.numbers(scores[0].samples), "prefill": list(tokens.shape)}
    files.write({**numbers, "layers": [{"layer": n, **asdict(score)} for n, score in enumerate(scores)]})
    order = sorted(range(len(scores)), key=lambda layer: scores[layer].mean)
    found = planned(order)
    after = dict(zip(found.order, found.shares, strict=True))
    layers = [
        {
            "layer": n,
            **asdict(scores[n]),
            "share": after.get(n),
            "routed": n in found.layers,
            "why": found.refused.get(n),
        }
        for n in order
    ]
    print(
        table(
            ("layer", options.by, "FLOPs with it", "routed"),
            [(each["layer"], scores[each["layer"]], *_told(each)) for each in layers],
        )
    )
    explain(options, found.refused, rows, scores[0].samples)
    figure = plan_figure(scores, LABELS[options.by], found, options.budget)
    files.measured({**numbers, "reached": found.share, "layers": layers}, figure)
    why = f"{options.by}, budget {options.budget:g}; {command('plan', args)}"
    said = place(files, dense, options, found.layers, why)
    print(
        f"\n{found.routed} of {len(scores)} layers are routed: a prefill's layers take {upward(found.share)} of the"
        f" dense FLOPs (budget {options.budget:g});\ngive them back by --config {said}"
    )


def _told(each: Mapping[str, Any]) -> tuple[str, str]:
    return ("-", "cannot be") if each["why"] else (upward(each["share"]), "yes" if each["routed"] else "no")


def explain(options: Options, refused: Mapping[int, str], rows: Rows, used: int) -> None:
    """Prints why layers cannot be routed, and how many rows were measured."""
    for reason in dict.fromkeys(refused.values()):
        those = ", ".join(str(n) for n, why in sorted(refused.items()) if why == reason)
        print(f"{options.plugin!r} cannot route {those} alone: {reason}")
    if rows.read:
        print(rows.told(used))


def place(files: LayerFiles, dense: DenseSubject, options: Options, layers: tuple[int, ...], why: str) -> Path:
    """Writes the config that places the plugin, and switches it on where the given one has it off."""
    off = not dense.plugins[options.plugin].enabled
    path = files.chosen(options.plugin, layers, why, {"enabled": True} if off else {})
    if off:
        print(f"{options.plugin!r} is disabled in the config; {path} enables it.")
    return path


def layer_scores(dense: DenseSubject, samples: Iterable[Sample], options: PlanOptions) -> list[Estimate]:
    """One number for each layer; the lowest are routed first."""
    if options.by == "random":
        drawn = torch.rand(dense.depth, generator=torch.Generator().manual_seed(options.seed))
        return [Estimate(number, None, 0) for number in drawn.tolist()]
    if options.by == "arank":
        return [rank.relative for rank in attention_ranks(dense, samples)]
    return layer_effects(dense, samples, options.by)


def prepared(options: Options, given: Mapping[str, Any], files: LayerFiles) -> tuple[DenseSubject, LayerFiles]:
    """The dense model with its data, and the folder for what is found; mistakes are found before any of it is long."""
    module, data = loaded(given, options.ckpt_path)
    placeable(module.plugins, options.plugin)
    files.open()
    seed = given.get("seed_everything")
    if isinstance(seed, int) and not isinstance(seed, bool):
        seed_everything(seed, verbose=False)
    dense = DenseSubject.of(module, data, given.get("trainer") or {})
    names = ", ".join(f"{name} ({type(each).__name__})" for name, each in dense.plugins.items() if each.enabled)
    if names:
        print(f"The config's plugins are not applied while layers are measured: {names}.")
    return dense, files
