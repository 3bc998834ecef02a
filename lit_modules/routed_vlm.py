"""A Hugging Face vision-language model whose decoder is routed by plugins, as a LightningModule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning import LightningDataModule, LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lit_modules import architecture, interventions, parts, report, rng
from lit_modules.activation_checkpointing import recompute_layers
from lit_modules.auxiliary import Auxiliary
from lit_modules.backbones import Backbone
from lit_modules.batches import model_inputs, number
from lit_modules.evaluation import Evaluation, Generation, Score, tags
from lit_modules.following import Following
from lit_modules.logits import logits_only_at
from lit_modules.objectives import LanguageModelling, Objective, Step
from lit_modules.optimization import Optimization
from lit_modules.other_image import with_other_images
from lit_modules.outcome_writer import Row, rows
from lit_modules.processes import gathered, leave_at_exit, shard
from lit_modules.start import Start
from routing import RoutingPlugin, RoutingTape, attach
from routing.follow import following
from routing.prefill import in_buckets
from routing.specs import to_spec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Not cuDNN: on Hopper it builds a plan of 33 to 38 ms for each new length, and routed layers have many.
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
DEFAULT_PARTS = {"projector": 2e-5, "language_model": 2e-5, "routers": 2e-5}


class RoutedVLM(LightningModule):
    """A vision-language model, the plugins that route its decoder, and how it trains.

    Args:
        backbone: Builds the dense model.
        plugins: Routing strategies, merged by name; ``enabled: false`` removes one. By default the backbone's own.
        parts: Learning rate of each part that trains: ``vision``, ``projector``, ``language_model``, ``routers``, or a
            regular expression found in parameter names. The last entry that matches a parameter decides; 0 freezes.
            By default all but ``vision``, at 2e-5.
        optimization: Weight decay, momenta, warm-up.
        objective: What is trained for; the plugins' auxiliary losses are added.
        generation: How answers are made when the model is judged.
        checkpoint_activations: Whether layers are recomputed in the backward pass, which saves memory and costs time.
        start_from: Whose weights replace the backbone's at the start: a checkpoint's, or those of a run's folder or of
            one that ``save_pretrained`` wrote. Its dense model is the same; routers are taken where they fit.
    """

    def __init__(
        self,
        backbone: Backbone,
        plugins: dict[str, RoutingPlugin] | None = None,
        parts: dict[str, float] | None = None,
        optimization: Optimization = Optimization(),  # noqa: B008  (frozen)
        objective: Objective = LanguageModelling(),  # noqa: B008  (frozen)
        generation: Generation = Generation(),  # noqa: B008  (frozen)
        checkpoint_activations: bool = False,
        start_from: str | None = None,
    ) -> None:
        super().__init__()
        self.plugins = backbone.plugins() if plugins is None else plugins
        self.backbone, self.parts = backbone, DEFAULT_PARTS if parts is None else parts
        self.optimization, self.objective, self.generation = optimization, objective, generation
        self.checkpoint_activations, self.start = checkpoint_activations, Start(start_from)
        self.model: PreTrainedModel | None = None
        self.tape = RoutingTape()
        self.rates: dict[str, float] = {}
        self.pictured: list[str] = []
        self.evaluation: Evaluation | None = None
        self.scores: list[Score] = []
        self.total_steps = 0.0
        self.rng_by_rank: list[Mapping[str, object]] = []
        self.auxiliary, self.following = Auxiliary(), Following({})
        self.save_hyperparameters(self._spec())

    def _spec(self) -> dict[str, object]:
        # Not start_from: the weights of a checkpoint are its own, and where they started may be gone.
        names = ("backbone", "plugins", "parts", "optimization", "objective", "generation", "checkpoint_activations")
        instantiator = {"_instantiator": "lightning.pytorch.cli.instantiate_module"}
        own = f"{type(self).__module__}.{type(self).__qualname__}"
        return {name: to_spec(getattr(self, name)) for name in names} | instantiator | {"_class_path": own}

    def configure_model(self) -> None:
        if self.model is not None:
            return
        model = self.backbone.build()
        self.start.fill_dense(model, to_spec(self.backbone))
        self.tape = attach(model, self.plugins)
        self.following = Following(following(model))
        self.rates = parts.choose(model, self.parts)
        parts.check_experts_asked(model, self.parts)
        interventions.check(self.generation.interventions, model)
        self.pictured = parts.reached_by_pictures(model, self.rates)
        parts.freeze_all_but(model, self.rates)
        self.start.fill_routed(model, self.backbone.added(self.plugins, model))
        if self.checkpoint_activations:
            recompute_layers(model)
        if self._trainer is not None:
            parts.check_precision(model, mixed="mixed" in str(self._trainer.precision))
        else:
            self.start.say()
        if self.device_mesh is not None:
            shard(model, self.device_mesh)
        # Hugging Face answers in evaluation mode, and Lightning leaves modes as it finds them.
        self.model = model.train()
        # Sharded tensors are loaded before `on_load_checkpoint` is called.
        architecture.check_folder(getattr(self._trainer, "ckpt_path", None), architecture.shapes(self.state_dict()))

    def setup(self, stage: str) -> None:
        leave_at_exit()
        parts.refuse_true_half(str(self.trainer.precision))
        data, asked_under = self._data, self.generation.interventions
        kinds = getattr(data, "kinds", tuple(data.majority))
        self.evaluation = Evaluation(data.majority, getattr(data, "groups", {}), kinds, asked_under)

    @property
    def _data(self) -> LightningDataModule:
        data = getattr(self.trainer, "datamodule", None)
        if data is None:
            raise ValueError(
                "RoutedVLM was given data loaders without a datamodule, whose processor writes and reads words.\nPass"
                " a datamodule, such as datamodules.DigitsVQA() or datamodules.LlavaData(…)."
            )
        return data

    # Training

    def configure_optimizers(self) -> OptimizerLRScheduler:
        assert self.model is not None
        self.total_steps = self.trainer.estimated_stepping_batches
        optimizer = self.optimization.optimizer(self.model, self.rates)
        schedule = self.optimization.schedule(optimizer, self.total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        self.start.say()
        self.auxiliary, self.following = Auxiliary(), Following(self.following.routers)  # a fit may have broken off
        if len(self.rng_by_rank) == self.trainer.world_size:
            rng.restore(self.rng_by_rank[self.global_rank])
        self.rng_by_rank = []

    def training_step(self, batch: Mapping[str, object], batch_idx: int) -> Tensor:
        self.tape.progress = min(1.0, self.global_step / self.total_steps)
        step = self.forward_step(batch)
        supervised = max(len(step.logits_NV), 1)
        losses = self.objective(step)
        self.log_dict({f"loss/{n}": v.detach() / step.per_token / supervised for n, v in losses.items()}, prog_bar=True)
        auxiliary = self.auxiliary(self.plugins, step.records, self.global_step, self._mean)
        self.following.add(step.records)
        self.log_dict({f"loss/{name}": loss.detach() for name, loss in auxiliary.items()})
        # Lightning divides by the configured number of batches even where an epoch's last window is shorter.
        share = self.trainer.accumulate_grad_batches / number(batch, "batches_in_window")
        parts_of_it = [*losses.values(), *(share * loss for loss in auxiliary.values()), *self._touched()]
        return torch.stack(parts_of_it).sum()

    def forward_step(self, batch: Mapping[str, object]) -> Step:
        """One training forward, with logits at the supervised positions only."""
        assert self.model is not None
        positions_N = batch["positions_N"]
        with (
            self.tape.about(batch["tokens"]),
            self.tape.recording() as records,
            logits_only_at(self.model, positions_N),
        ):
            # Right padding needs no mask under causal attention, and a mask would cost the flash kernel.
            output = self.model(**model_inputs(batch), use_cache=False)
        per_token = self._per_token(number(batch, "supervised_in_window"))
        return Step(batch, output.logits, records, per_token)

    def _touched(self) -> list[Tensor]:
        """Zeros, one from every trained parameter that pictures reach.

        All ranks wait for the gradients of all that train, and a batch without pictures has none for these; no batch
        has any for the vision layers behind the one whose features are taken.
        """
        assert self.model is not None
        return [0 * self.model.get_parameter(name).sum() for name in self.pictured]

    def _per_token(self, supervised: int) -> float | Tensor:
        batches, ranks = self.trainer.accumulate_grad_batches, self.trainer.world_size
        if ranks == 1:
            return batches / max(supervised, 1)
        return batches / self._mean(torch.tensor(float(supervised), device=self.device)).clamp_min(1 / ranks)

    def _mean(self, sums: Tensor) -> Tensor:
        return sums if self.trainer.world_size == 1 else self.trainer.strategy.reduce(sums, reduce_op="mean")

    def optimizer_step(self, *step: Any) -> None:
        super().optimizer_step(*step)
        self.following.end(self._mean)  # here, because callbacks that save come before the module's own hooks

    # Evaluation

    def on_validation_start(self) -> None:
        self.start.say()

    on_test_start = on_predict_start = on_validation_start

    def answers(self, batch: Mapping[str, object], *, blank: bool = False) -> list[str]:
        """Greedy answers; ``blank`` replaces every image by its mean colour."""
        assert self.model is not None
        inputs = model_inputs(batch, mask=True, blank=blank)
        tokenizer, most = self._data.processor.tokenizer, 4 if self.device_mesh is None else 1  # ranks read in step
        grouped = in_buckets(self.model, self.tape, inputs, batch.get("pictures"), most=most)
        with self.tape.about(batch["tokens"]), grouped, sdpa_kernel(KERNELS):
            ids_BT = self.model.generate(
                **inputs,
                max_new_tokens=self.generation.max_new_tokens,
                do_sample=False,
                synced_gpus=self.device_mesh is not None,  # a rank that is done gathers layers for the others
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
                # A model that answers with an image token would be asked for that image in the next step.
                suppress_tokens=[self.model.config.image_token_id],
            )
        end = getattr(self._data, "answer_end", None)
        said = tokenizer.batch_decode(ids_BT[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [(answer.lstrip().split(end)[0] if end else answer).strip() for answer in said]

    def validation_step(self, batch: Mapping[str, object], batch_idx: int) -> list[Row]:
        """Asks plainly first, then in every other way."""
        assert self.evaluation is not None
        answers, seen = self.answers(batch), "pixel_values" in batch
        ways = {}
        if self.generation.asks_blank(batch_idx):
            ways["blank"] = self.answers(batch, blank=True) if seen else answers
        if self.generation.asks_other_image(batch_idx) and (other := with_other_images(batch)):
            ways["other_image"] = self.answers(other) if seen else answers
        replaced = self.evaluation.interventions.ask(batch, self.tape, lambda: self.answers(batch))
        self.evaluation.update(batch["kinds"], batch["truths"], answers, ways.get("blank"), replaced)
        return interventions.beside(rows(batch, answers, ways), replaced)

    def on_validation_epoch_end(self) -> None:
        self._conclude("val")

    def test_step(self, batch: Mapping[str, object], batch_idx: int) -> list[Row]:
        return self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        self._conclude("test")

    def predict_step(self, batch: Mapping[str, object], batch_idx: int) -> list[dict[str, str]]:
        columns = (batch["ids"], batch["questions"], batch["kinds"], batch["truths"], self.answers(batch))
        names = ("id", "question", "kind", "truth", "prediction")
        return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]

    def _conclude(self, stage: str) -> None:
        assert self.evaluation is not None
        self.scores = self.evaluation.scores()
        self.evaluation.reset()
        if self.trainer.sanity_checking:
            return
        self.log_dict(tags(self.scores, stage), sync_dist=True)  # equal on all ranks already
        if not self.trainer.training and self.trainer.state.fn != "fit":
            self._print_report()

    def on_fit_end(self) -> None:
        self._print_report()

    @rank_zero_only
    def _print_report(self) -> None:
        print(f"\n{report.data_table(self._data.summary())}")
        if self.scores:
            print(f"\n{report.evaluation_table(self.scores)}")

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, object]) -> None:
        checkpoint[architecture.KEY] = architecture.shapes(self.state_dict())
        checkpoint["rng"] = gathered(rng.state())
        checkpoint["origins"] = self.start.origins

    def on_load_checkpoint(self, checkpoint: dict[str, object]) -> None:
        self.configure_model()
        architecture.check(checkpoint, architecture.shapes(self.state_dict()))
        architecture.check_backbone(checkpoint, cast("Mapping[str, object]", to_spec(self.backbone)))
        self.start.overruled(checkpoint)
        if self._trainer is not None and self._trainer.state.fn == "fit":  # not where only weights are taken
            self.rng_by_rank = cast("list[Mapping[str, object]]", checkpoint.get("rng", []))
