"""What the routers do, as numbers and pictures."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from math import isnan
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_modules.collapse import CollapseWatch
from lit_modules.expert_collapse import ExpertWatch
from lit_modules.expert_map import ExpertMap
from lit_modules.expert_tally import ExpertCounts, ExpertTally, expert_loads, width_scalars
from lit_modules.kept_patches import KeptPatches
from lit_modules.logged_pictures import write_histogram, write_image
from lit_modules.phases import PhaseCounts, PhaseTally
from lit_modules.processes import gathered
from lit_modules.retention_map import History, label
from lit_modules.score_histograms import Scores
from lit_modules.tally import Counts, Reduce, Tally, bits
from routing import RoutingRecord, Site

if TYPE_CHECKING:
    from lit_modules.routed_vlm import RoutedVLM

Detail = Literal["nothing", "brief", "detailed"]
T = TypeVar("T")


class RoutingMonitor(Callback):
    """Shows what the routed layers decided in every ``log_every_n_steps``-th step and in validation, on all ranks.

    ======================================== ======== ==============================================================
    tag                                      detail   what
    ======================================== ======== ==============================================================
    ``depth/retention``, ``…/<kind>``        brief    share of the candidate tokens that enter, over all layers
    ``depth/target``                         brief    share that the capacities ask for
    ``depth/agreement``                      brief    share of them on which the rule in force agrees with decoding's
    ``depth/map``                            brief    layer by step: asked for beside kept
    ``depth/kept/<id>``                      brief    the patches that each layer kept of the first validation images
    ``depth/retention/<phase>``              brief    the same share in prefill and decode, while answers are generated
    ``depth/kv_share``                       brief    keys and values that the prefill stores, of the dense model's
    ``width/load_max``                       brief    largest load of an expert over the mean; 1: balanced
    ``width/information``                    brief    bits that a token's kind tells of its expert; 0: nothing
    ``width/dropped``                        brief    share of the choices that full experts turn away
    ``width/untaken``                        brief    share of the tokens that no expert takes
    ``width/null``                           brief    share of the choices that go to null experts
    ``width/map``                            brief    layer by expert, of the last logged step: shares of the choices
    ``router/entropy``                       brief    bits per candidate, of softmax over experts or of sigmoid(score)
    ``router/scores``                        brief    histogram of the candidates' scores
    ``…/layer_<n>``, ``…/layer_<n>_<part>``  detailed retention, target, agreement, entropy, scores, ``kv_share``; all
                                                      numbers of width, experts being of the part ``mlp``
    ``width/load/layer_<n>_mlp/expert_<e>``  detailed share of the layer's choices that the expert gets
    ======================================== ======== ==============================================================

    Pictures also go to the run's folder as PNG files. Steps in between cost nothing. What does not apply is not drawn.
    The phases and ``kv_share`` are of one validation or test, over its plain answers, not those under interventions or
    to blank images. Experts' loads are what tokens chose, before full experts turned any away; ``load_max`` and
    ``information`` are means over layers. A warning tells, once of each layer, where a rule without a capacity lets in
    nearly every token or nearly none after a tenth of the training; and, from the first step on, where nearly all
    choices go to as few experts as one token takes, or none to some expert.

    Args:
        detail: ``nothing``, ``brief`` or ``detailed``.
        patches: How the kept patches are drawn.
    """

    def __init__(self, detail: Detail = "brief", patches: KeptPatches = KeptPatches()) -> None:  # noqa: B008  (frozen)
        if detail not in ("nothing", "brief", "detailed"):
            raise ValueError(f"RoutingMonitor(detail={detail!r}): give 'nothing', 'brief' or 'detailed'.")
        self.detail, self.patches = detail, patches
        self.history, self.experts = History(), ExpertMap()
        self._tally, self._experts, self._scores = Tally(), ExpertTally(), Scores()
        self._watch, self._watch_experts, self._open = CollapseWatch(), ExpertWatch(), ExitStack()
        self._phases = PhaseTally()
        self._records: list[RoutingRecord] = []
        self._step = 0

    # Numbers

    def on_train_batch_start(self, trainer: Trainer, pl_module: RoutedVLM, batch: object, batch_idx: int) -> None:
        self._open.close()
        self._records, self._step = [], trainer.global_step
        every = trainer.log_every_n_steps
        if self.detail != "nothing" and every and (self._step + 1) % every == 0:
            self._records = self._open.enter_context(pl_module.tape.recording())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: RoutedVLM, outputs: object, batch: object, batch_idx: int
    ) -> None:
        self._open.close()
        for collected in (self._tally, self._experts, self._scores):
            collected.add(self._records)
        self._records = []
        if trainer.global_step > self._step and self._scores.sites:
            self._log(trainer, pl_module)
            self._tally, self._experts, self._scores = Tally(), ExpertTally(), Scores()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._open.close()

    def _log(self, trainer: Trainer, module: RoutedVLM) -> None:
        reduce = over_ranks(trainer)
        depth = self._tally.counts(reduce)
        nulls = {name: getattr(plugin, "nulls", 0) for name, plugin in module.plugins.items()}
        width = self._experts.counts(reduce, nulls)
        if depth:
            self.history.add(self._step, depth)
        self.experts.show(self._step, width)
        for message in (*self._watch.see(depth, module.tape.progress), *self._watch_experts.see(width)):
            rank_zero_warn(message)
        groups, values = {"": self._scores.sites}, scalars("", depth, width)
        by_kind = Counts.sum(depth.values()).by_kind()
        values |= {f"depth/retention/{kind.name.lower()}": share for kind, share in by_kind.items()}
        for site in self._scores.sites if self.detail == "detailed" else ():
            groups[f"/{label(site)}"] = [site]
            values |= scalars(f"/{label(site)}", only(site, depth), only(site, width))
            values |= expert_loads(label(site), width[site]) if site in width else {}
        module.log_dict({tag: value for tag, value in values.items() if not isnan(value)})
        for tag, scores in zip(groups, self._scores.histograms(groups.values(), reduce), strict=True):
            if scores is not None:
                write_histogram(trainer, f"router/scores{tag}", scores, self._step)

    # Phases

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: RoutedVLM, batch: Mapping[str, object], batch_idx: int, loader: int = 0
    ) -> None:
        if trainer.sanity_checking or self.detail == "nothing":
            return
        if self.patches.images and not batch_idx:
            self._draw_patches(trainer, pl_module, batch)
        self._count_answers(trainer, pl_module)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: RoutedVLM, batch: object, batch_idx: int, loader: int = 0
    ) -> None:
        if self.detail != "nothing":
            self._count_answers(trainer, pl_module)

    def _count_answers(self, trainer: Trainer, module: RoutedVLM) -> None:
        self._open.close()
        ends = trainer.datamodule.processor.tokenizer.eos_token_id  # type: ignore[attr-defined]
        self._open.enter_context(self._phases.counting(module.model, module.tape, ends))

    def on_validation_batch_end(self, *_: object) -> None:
        self._open.close()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: RoutedVLM) -> None:
        if trainer.sanity_checking or self.detail == "nothing":
            return
        counts, self._phases = PhaseCounts.sum(gathered(self._phases.counts())), PhaseTally()
        values = counts.scalars(each=self.detail == "detailed")
        known = {tag: value for tag, value in values.items() if not isnan(value)}
        pl_module.log_dict(known, sync_dist=True)  # equal on all ranks already

    on_test_batch_end, on_test_epoch_end = on_validation_batch_end, on_validation_epoch_end

    # Pictures

    def _draw_patches(self, trainer: Trainer, pl_module: RoutedVLM, batch: Mapping[str, object]) -> None:
        folder = trainer.log_dir  # a collective: all ranks ask
        if not trainer.is_global_zero and pl_module.device_mesh is None:
            return
        with trainer.precision_plugin.val_step_context():
            records = self.patches.records(pl_module, batch)
        if not trainer.is_global_zero or "pixel_values" not in batch:
            return
        for name, drawn in self.patches.sheets(records, batch):
            name = name.replace("/", "_")
            write_image(trainer, folder, f"depth/kept/{name}", f"kept_patches/{name}.png", drawn)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw_maps(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw_maps(trainer)

    def _draw_maps(self, trainer: Trainer) -> None:
        folder = trainer.log_dir  # a collective: all ranks ask
        if trainer.is_global_zero and self.history.new:
            write_image(trainer, folder, "depth/map", "retention_map.png", self.history.drawn())
        if trainer.is_global_zero and self.experts.new:
            write_image(trainer, folder, "width/map", "expert_map.png", self.experts.drawn())

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        return self.history.state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = History.of(state_dict)


def scalars(suffix: str, depth: Mapping[Site, Counts], width: Mapping[Site, ExpertCounts]) -> dict[str, float]:
    """What is drawn of some sites, by tag; NaN of what they do not have."""
    counts = Counts.sum(depth.values())
    return {
        f"depth/retention{suffix}": counts.retention,
        f"depth/target{suffix}": counts.target,
        f"depth/agreement{suffix}": counts.agreement,
        f"router/entropy{suffix}": bits([*depth.values(), *width.values()]),
        **width_scalars(suffix, width.values()),
    }


def only(site: Site, counts: Mapping[Site, T]) -> dict[Site, T]:
    """What was counted there."""
    return {site: counts[site]} if site in counts else {}


def over_ranks(trainer: Trainer) -> Reduce:
    """Sums, or takes the largest, over all processes; gives a tensor on the CPU."""

    def reduce(values: Tensor, how: str) -> Tensor:
        if trainer.world_size == 1:
            return values
        reduced = trainer.strategy.reduce(values.to(trainer.strategy.root_device), reduce_op=how)
        assert isinstance(reduced, Tensor)
        return reduced.cpu()

    return reduce
