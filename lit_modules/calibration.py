"""Thresholds measured on held-out data: each layer lets in, token by token, as many as its capacity asks for.

Shape suffixes: N scores pooled over batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

import torch
from lightning import Callback, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lit_modules.batches import model_inputs
from lit_modules.logits import logits_only_at
from lit_modules.processes import gathered
from routing import FollowingGate, Gate, RoutedLayer, RoutingRecord, Site, count_of
from routing.forecast import CalibratedRouter

if TYPE_CHECKING:
    from lit_modules.routed_vlm import RoutedVLM


class CalibrateThresholds(Callback):
    """Calibrates the thresholds of ``Calibrated`` routers before each validation of ``fit`` and at each epoch's end.

    So validations decode by thresholds that fit the weights, and so does every checkpoint that is written at the end of
    a validation or of an epoch; one that is written between holds those of the last calibration. See ``calibrate``.

    Args:
        batches: Validation batches, which all ranks run alike; at least 1.
    """

    def __init__(self, batches: int = 8) -> None:
        if batches < 1:
            raise ValueError(f"CalibrateThresholds(batches={batches}): give a number of batches, at least 1.")
        self.batches = batches
        self._at_step: int | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: RoutedVLM) -> None:
        assert pl_module.model is not None
        if not calibrated_gates(pl_module.model):
            raise ValueError(
                "CalibrateThresholds: no enabled plugin has a threshold to calibrate.\nAllowed: plugins with `router:"
                " Calibrated`.\nGive one that router, or take this callback out of trainer.callbacks."
            )
        self._at_step = None

    def on_validation_start(self, trainer: Trainer, pl_module: RoutedVLM) -> None:
        if trainer.state.fn == "fit":
            self._calibrate(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: RoutedVLM) -> None:
        self._calibrate(trainer, pl_module)  # checkpoints are written last, whatever the order of the callbacks

    def _calibrate(self, trainer: Trainer, module: RoutedVLM) -> None:
        if self._at_step == trainer.global_step:
            return
        # A loader of its own: the validation's, which may just be starting, would start again.
        loader = trainer.datamodule.val_dataloader()  # type: ignore[attr-defined]
        with trainer.precision_plugin.val_step_context():
            calibrate(module, loader, self.batches)
        self._at_step = trainer.global_step


@torch.no_grad()
def calibrate(module: RoutedVLM, loader: Iterable[Mapping[str, object]], batches: int = 8) -> dict[Site, float]:
    """Sets the cut of every gate with a ``Calibrated`` router, and returns them.

    Tokens compete as they do at the end of the training. The scores of all candidates in all batches are pooled for
    each gate, and its cut lies midway between the last score that its capacity has room for and the next one: the share
    holds on average, not in each row. All ranks take the cuts of the first, so give each the same batches. Prompts have
    no answers in them: that generated tokens score as these do is assumed. Where no token is a candidate, a cut stays.

    Args:
        module: Configured, on its device.
        loader: Held-out batches, of prompts or of whole conversations.
        batches: How many of them, at most.
    """
    assert module.model is not None
    pools = {gate.site: Pool(gate) for gate in calibrated_gates(module.model)}
    with competing(module):
        for batch in islice(loader, batches):
            for record in _records(module, batch):
                if record.site in pools:
                    pools[record.site].add(record)
    cuts = gathered({site: pool.cut() for site, pool in pools.items() if pool.candidates})[0]
    for site, pool in pools.items():
        if site in cuts:
            assert isinstance(pool.gate.router, CalibratedRouter)
            pool.gate.router.calibrate(site.layer, cuts[site])
        else:
            rank_zero_warn(
                f"Plugin {site.by!r}: the threshold of layer {site.layer} is not calibrated, as no token of the"
                f" held-out batches is routed there. Its rule routes {_kinds(pool.gate)}: calibrate on data with those."
            )
    return cuts


@dataclass
class Pool:
    """What the candidates at one gate score, and how many of them its capacity has room for.

    Args:
        gate: The gate.
    """

    gate: Gate
    scores: list[Tensor] = field(default_factory=list)
    room: int = 0

    def add(self, record: RoutingRecord) -> None:
        self.scores.append(record.scores_BTE[..., 0][record.candidate_BT].cpu())
        self.room += int(count_of(record.candidate_BT, self.gate.share()).sum())

    @property
    def candidates(self) -> int:
        return sum(map(len, self.scores))

    def cut(self) -> float:
        """Midway between the last score that there is room for and the next; infinite if all or none have room."""
        best_N = torch.cat(self.scores).double().sort(descending=True).values
        end = best_N.new_full((1,), torch.inf)
        return torch.cat([end, best_N, -end])[self.room : self.room + 2].mean().item()


@contextmanager
def competing(module: RoutedVLM) -> Iterator[None]:
    """Inside, forwards decide by the rule of training and the capacities of its end."""
    assert module.model is not None
    modes = {part: part.training for part in module.model.modules()}
    progress, module.tape.progress = module.tape.progress, 1.0
    module.model.eval()
    module.model.training = True  # the phase is read off the root alone, so that no dropout is in force
    try:
        yield
    finally:
        module.tape.progress = progress
        for part, mode in modes.items():
            part.training = mode


def calibrated_gates(model: nn.Module) -> list[Gate]:
    """The gates that decide for themselves by a router with a cut, first layer first."""
    gates = [part.gate for part in model.modules() if isinstance(part, RoutedLayer)]
    return [g for g in gates if isinstance(g.router, CalibratedRouter) and not isinstance(g, FollowingGate)]


def _records(module: RoutedVLM, batch: Mapping[str, object]) -> list[RoutingRecord]:
    batch = module.transfer_batch_to_device(batch, module.device, 0)
    inputs = model_inputs(batch, mask=True)
    positions_BT = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    nowhere = positions_BT.new_zeros(1)  # the forward is for its records
    with (
        module.tape.about(batch["tokens"]),
        module.tape.recording() as records,
        logits_only_at(module.model, nowhere),
    ):
        module.model(**inputs, position_ids=positions_BT, use_cache=False)
    return records


def _kinds(gate: Gate) -> str:
    return ", ".join(kind.name for kind in getattr(gate.selector.rule("train"), "routes", ()))
