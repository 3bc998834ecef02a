"""What the routed layers chose in an evaluation, held against what the questions are about."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from lightning import Callback, LightningModule, Trainer
from torch import nn

from lit_modules.probe import Probe, churn
from lit_modules.processes import gathered
from lit_modules.report import table
from lit_modules.retention_map import label
from lit_modules.truth_counts import TruthCounts, known
from lit_modules.truth_measures import Choices
from routing import RoutedLayer, RoutingRecord, Site

if TYPE_CHECKING:
    from lit_modules.routed_vlm import RoutedVLM


class RoutingTruth(Callback):
    """Measures what every routed layer keeps of the pictures in ``validate``, ``test`` and the validations of ``fit``.

    ========================================= =================================================================
    tag, each ``truth/…/layer_<n>``           what
    ========================================= =================================================================
    ``evidence_recall``                       share kept of the tokens that the questions are about
    ``evidence_recall_by_chance``             the same if as many vision tokens were drawn at random
    ``evidence_auc``                          how often such a token outscores another one of its row; 0.5: by chance
    ``position_share``                        share of the choice that the place in the picture explains; 0: by chance
    ``overlap``, ``overlap_by_chance``        with the routed layer before: kept by both over kept by either
    ``margin``                                worst kept score minus best dropped one, in deviations of a row's scores
    ``ties``                                  share of rows in which these two are equal
    ``churn``                                 share of kept tokens that were not kept in the validation before
    ========================================= =================================================================

    The questions count as they are asked plainly, neither blank nor under an intervention. The first three need data
    with evidence. A table is printed, and written to ``truth.json`` in the run's folder beside ``probe.npz``: the kept
    tokens of the first questions, which ``lit_modules.probe.overlap`` compares with those of another run.

    Args:
        probe: Questions about pictures in ``probe.npz``, over which churn is taken; at least 0.
    """

    def __init__(self, probe: int = 256) -> None:
        if probe < 0:
            raise ValueError(f"RoutingTruth(probe={probe}): give a number of questions, at least 0.")
        self.probe = probe
        self._open = ExitStack()
        self._records: list[RoutingRecord] = []
        self._counts: TruthCounts | None = None
        self._now: Probe | None = None
        self._before: Probe | None = None
        self._found: dict[str, list[float]] = {}

    def on_validation_start(self, trainer: Trainer, pl_module: RoutedVLM) -> None:
        assert pl_module.model is not None
        sites = sites_of(pl_module.model)
        self._counts, self._now = TruthCounts(sites).to(pl_module.device), Probe.empty(sites)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: RoutedVLM, batch: object, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._open.close()
        self._records = self._open.enter_context(pl_module.tape.recording())

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: Mapping[str, Sequence[str]],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._open.close()
        assert self._counts is not None and self._now is not None
        sites = self._counts.sites
        records, self._records = plain(self._records, sites), []
        if not records or len(records) < len(sites):  # without pictures a layer may have nothing to decide
            return
        self._counts.update(records)
        most = -(-self.probe // trainer.world_size)
        if len(self._now.ids) < most:
            self._now = self._now.with_batch(Choices.of(records), batch["ids"], most)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._counts is not None and self._now is not None
        if trainer.sanity_checking or not self._counts.sites:
            return
        if self._before is not None:
            self._counts.churned(*map(torch.from_numpy, churn(self._before, self._now)))
        self._before = self._now if trainer.state.fn == "fit" else None
        self._found = known(self._counts.compute())
        pl_module.log_dict(tags(self._found, self._counts.sites), sync_dist=True)  # equal on all ranks already

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or not self._found or self._counts is None or self._now is None:
            return
        folder, everyone = trainer.log_dir, gathered(self._now)
        names = [label(site) for site in self._counts.sites]
        if trainer.is_global_zero:
            fitting = trainer.state.fn == "fit"
            if folder is not None:
                when = {"command": trainer.state.fn, **({"step": trainer.global_step} if fitting else {})}
                write(Path(folder), {**when, "layers": by_layer(self._found, names)}, everyone)
            if not fitting:
                print(f"\n{truth_table(self._found, names)}")
        self._counts, self._found = None, {}

    on_test_start, on_test_batch_start = on_validation_start, on_validation_batch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end, on_test_end = on_validation_epoch_end, on_validation_end

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._open.close()


def sites_of(model: nn.Module) -> list[Site]:
    """Where a model is routed in depth, first layer first."""
    return [module.gate.site for module in model.modules() if isinstance(module, RoutedLayer)]


def plain(records: Iterable[RoutingRecord], sites: Sequence[Site]) -> list[RoutingRecord]:
    """The record of each site in the first prefill: a batch is asked plainly before it is asked any other way."""
    first: dict[Site, RoutingRecord] = {}
    for record in records:
        if record.tokens.phase == "prefill":
            first.setdefault(record.site, record)
    return [first[site] for site in sites if site in first]


def tags(found: Mapping[str, Sequence[float]], sites: Sequence[Site]) -> dict[str, float]:
    """What is logged."""
    return {
        f"truth/{name}/{label(site)}": value
        for name, values in found.items()
        for site, value in zip(sites, values, strict=True)
        if not isnan(value)
    }


def by_layer(found: Mapping[str, Sequence[float]], names: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """As JSON knows it, which has no NaN."""
    return {
        layer: {name: None if isnan(values[n]) else values[n] for name, values in found.items()}
        for n, layer in enumerate(names)
    }


def truth_table(found: Mapping[str, Sequence[float]], names: Sequence[str]) -> str:
    """One line per layer; what stands beside its value by chance is in brackets."""
    columns = {name: [_cell(v) for v in values] for name, values in found.items() if not name.endswith("_by_chance")}
    for name in columns:
        if chance := found.get(f"{name}_by_chance"):
            columns[name] = [
                f"{cell} ({_cell(v)})" if cell else "" for cell, v in zip(columns[name], chance, strict=True)
            ]
    header = ("routed layer", *(name.replace("_", " ") for name in columns))
    rows = [(layer, *(column[n] for column in columns.values())) for n, layer in enumerate(names)]
    return f"{table(header, rows)}\n\nIn brackets: the same if as many vision tokens were drawn at random."


def _cell(value: float) -> str:
    return "" if isnan(value) else f"{value:.3f}"


def write(folder: Path, facts: Mapping[str, object], probes: Sequence[Probe]) -> None:
    """``truth.json`` and ``probe.npz``, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    first, *others = probes
    for other in others:
        first = first.joined(other)
    if first.ids:
        first.save(folder / "probe.npz")
    partial = folder / "truth.json.partial"
    partial.write_text(json.dumps(facts, indent=1) + "\n")
    partial.replace(folder / "truth.json")
