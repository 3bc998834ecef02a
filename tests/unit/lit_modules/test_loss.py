"""The loss is the mean over the supervised tokens of the optimizer step, and costs no more logits than that."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning import Callback, Trainer
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lit_modules import RoutedVLM, TinyLlava
from lit_modules.batches import model_inputs
from lit_modules.logits import logits_only_at
from plugins.progressive_depths import ProgressiveDepths
from routing import RouterCrossEntropy, ZLoss
from stub_data import StubData, training_batch

TINY = TinyLlava(layers=3, width=16, heads=2, hidden=32)
ROUTED = {"depth": ProgressiveDepths()}


class Gradients(Callback):
    """Keeps the gradients of each optimizer step."""

    def __init__(self, path: Path | None = None) -> None:
        self.steps: list[dict[str, Tensor]] = []
        self.path = path  # where another process finds them

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        named = pl_module.model.named_parameters()
        self.steps.append({n: p.grad.clone() for n, p in named if p.grad is not None})

    def on_train_end(self, trainer, pl_module) -> None:
        if self.path is not None and trainer.is_global_zero:
            torch.save(self.steps, self.path)


class Shards(StubData):
    """One batch per rank, with unlike numbers of rows."""

    def train_dataloader(self) -> DataLoader[object]:
        rank = self.trainer.global_rank
        return DataLoader([training_batch(rank, 2 + rank)], batch_size=None)


def fit(module: RoutedVLM, data: StubData, *callbacks: Callback, **trainer: object) -> Trainer:
    settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    settings |= {
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "limit_val_batches": 0,
        "max_epochs": 1,
    }
    fitted = Trainer(**settings | trainer, callbacks=list(callbacks))
    fitted.fit(module, data)
    return fitted


def accumulated(accumulate: int) -> list[dict[str, Tensor]]:
    """Gradients of the steps of three batches."""
    torch.manual_seed(0)
    gradients = Gradients()
    data = StubData(batches=3, accumulate=accumulate)
    fit(RoutedVLM(TINY, ROUTED), data, gradients, accumulate_grad_batches=accumulate)
    return gradients.steps


def whole_batch_gradients(batches: list[dict]) -> dict[str, Tensor]:
    """One forward over all rows with full logits, and Hugging Face's own mean."""
    torch.manual_seed(0)
    module = RoutedVLM(TINY, ROUTED)
    module.configure_model()
    whole = {k: torch.cat([b[k] for b in batches]) for k in ("input_ids", "labels", "pixel_values")}
    logits = module.model(input_ids=whole["input_ids"], pixel_values=whole["pixel_values"], use_cache=False).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), whole["labels"][:, 1:].flatten()).backward()
    return {n: p.grad for n, p in module.model.named_parameters() if p.grad is not None}


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, atol=2e-6, rtol=2e-4, msg=name)


def test_accumulated_windows_equal_one_big_batch():
    steps = accumulated(2)
    assert len(steps) == 2  # three batches: the second window is shorter
    # Only the first step starts from the same weights.
    assert_close(steps[0], whole_batch_gradients([training_batch(seed, 2) for seed in (0, 1)]))


def test_a_window_shorter_than_configured_is_a_mean_too():
    steps = accumulated(8)
    assert_close(steps[0], whole_batch_gradients([training_batch(seed, 2) for seed in (0, 1, 2)]))


def test_ranks_with_unlike_batches_share_one_mean(tmp_path):
    torch.manual_seed(0)
    gradients = Gradients(tmp_path / "gradients.pt")
    fit(RoutedVLM(TINY, ROUTED), Shards(), gradients, strategy="ddp_fork", devices=2)
    (step,) = torch.load(gradients.path)
    assert_close(step, whole_batch_gradients([training_batch(0, 2), training_batch(1, 3)]))


def test_auxiliary_losses_are_weighted_means_or_sums_over_their_plugin():
    summed = RouterCrossEntropy(0.25, layers="sum")
    module = RoutedVLM(TINY, {"depth": ProgressiveDepths(losses=(ZLoss(0.5), summed))})
    module.configure_model()
    batch = training_batch(0, 2)
    module._trainer = type("T", (), {"accumulate_grad_batches": 1, "world_size": 1})()
    step = module.forward_step(batch)
    losses = module.auxiliary(module.plugins, step.records, 0, module._mean)
    expected = 0.5 * torch.stack([ZLoss()(record) for record in step.records]).mean()
    assert losses.keys() == {"depth_ZLoss", "depth_RouterCrossEntropy"}
    assert torch.equal(losses["depth_ZLoss"], expected)
    each = [summed(record) for record in step.records]
    assert torch.equal(losses["depth_RouterCrossEntropy"], 0.25 * torch.stack(each).sum())
    assert len(step.records) == 2


def test_logits_at_the_supervised_positions_are_those_of_a_full_forward():
    module = RoutedVLM(TINY, ROUTED)
    module.configure_model()
    batch = training_batch(0, 3, text_only=(1,))
    full = module.model(**model_inputs(batch), use_cache=False).logits.flatten(0, 1)[batch["positions_N"]]
    with logits_only_at(module.model, batch["positions_N"]):
        asked = module.model(**model_inputs(batch), use_cache=False).logits
    assert torch.equal(asked, full)
    parameters = [p for p in module.model.parameters() if p.requires_grad]
    gradients = [torch.autograd.grad(x.square().sum(), parameters, allow_unused=True) for x in (asked, full)]
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert module.model(**model_inputs(batch), use_cache=False).logits.ndim == 3  # the hook is gone


def test_progress_runs_from_0_to_1():
    module = RoutedVLM(TINY, ROUTED)
    trainer = fit(module, StubData(batches=3))
    assert trainer.global_step == module.total_steps == 3
    assert module.tape.progress == pytest.approx(2 / 3)


def test_a_batch_without_counts_is_refused():
    module = RoutedVLM(TINY)
    module.configure_model()
    batch = training_batch(0, 2)
    del batch["supervised_in_window"]
    with pytest.raises(ValueError, match="supervised_in_window"):
        module.forward_step(batch)
