"""Accumulation windows: what a batch knows of the batches that share its optimizer step."""

from __future__ import annotations

import pickle
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.data import _update_dataloader
from torch.utils.data import DistributedSampler

from datamodules import DigitsVQA
from datamodules.loader import WindowLoader
from datamodules.sampler import ResumableSampler

from .conftest import make_digits


def _windows(loader: WindowLoader) -> list[tuple[int, int, int]]:
    return [(len(b["targets_N"]), b["supervised_in_window"], b["batches_in_window"]) for b in loader]


def _loader(digits: DigitsVQA, window: int, **changes: Any) -> WindowLoader:
    loader = digits.train_dataloader()
    return WindowLoader(
        loader.dataset, batch_size=3, collate_fn=loader.collate_fn, window=window, policy=digits.policy, **changes
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_uneven_windows(digits: DigitsVQA, workers: int) -> None:
    loader = _loader(digits, window=3, num_workers=workers, persistent_workers=workers > 0)
    for _ in range(2):  # a second epoch, with the same workers
        seen = _windows(loader)
        sizes = [supervised for supervised, *_ in seen]
        assert [batches for *_, batches in seen] == [3, 3, 3, 1]  # ten conversations, three a batch
        assert [total for _, total, _ in seen] == [sum(sizes[:3])] * 3 + sizes[3:]


@pytest.mark.parametrize(("limit", "expected"), [(2, [2, 2]), (0.75, [3, 3, 3]), (0.5, [2, 2]), (1, [1])])
def test_limits_end_the_last_window(digits: DigitsVQA, limit: float, expected: list[int]) -> None:
    assert [batches for *_, batches in _windows(_loader(digits, window=3, limit=limit))] == expected


@pytest.mark.parametrize("taken", [1, 2, 3])  # in the first window, at its end, in the second
def test_an_interrupted_epoch_goes_on_with_what_is_left(digits: DigitsVQA, taken: int) -> None:
    def made() -> WindowLoader:
        rows = digits.train_dataloader().dataset
        return _loader(digits, window=2, sampler=ResumableSampler(rows, num_replicas=1, rank=0))

    whole = [(b["input_ids"].tolist(), b["supervised_in_window"]) for b in made()]
    first = made()
    for _, _ in zip(range(taken), first, strict=False):
        pass
    again = made()
    state = {**first.progress(), "batches": taken}
    if taken % 2:
        with pytest.warns(UserWarning, match="does not hold their gradients"):
            again.resume(state)
    else:
        again.resume(state)
    rest = [(b["input_ids"].tolist(), b["supervised_in_window"]) for b in again]
    assert [ids for ids, _ in rest] == [ids for ids, _ in whole[taken:]]
    assert rest[taken % 2 :] == whole[taken + taken % 2 :]  # later steps are whole again
    assert [b["input_ids"].tolist() for b in again] == [ids for ids, _ in whole]  # the next epoch is whole


def test_another_order_of_the_data_is_said_and_starts_again(digits: DigitsVQA) -> None:
    loader = _loader(digits, window=2)
    with pytest.warns(UserWarning, match="under another order"):
        loader.resume({"batches": 1, "rows": 99, "window": 2})
    assert len(list(loader)) == 4


def test_lightning_can_put_in_a_distributed_sampler(digits: DigitsVQA) -> None:
    loader = _loader(digits, window=2)
    again = _update_dataloader(loader, DistributedSampler(loader.dataset, num_replicas=2, rank=1))
    assert isinstance(again, WindowLoader) and again.window == 2 and again.policy == digits.policy
    assert [batches for *_, batches in _windows(again)] == [2, 2]  # five conversations


class Watch(L.LightningModule):
    """Remembers what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[tuple[int, int, list[str]]] = []

    def training_step(self, batch: dict[str, Any], _: int) -> torch.Tensor:
        phase = batch["tokens"].phase
        self.seen.append((batch["supervised_in_window"], batch["batches_in_window"], [phase]))
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters())


def test_windows_follow_the_trainer(digits: DigitsVQA) -> None:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = L.Trainer(accelerator="cpu", max_epochs=1, accumulate_grad_batches=3, limit_train_batches=4, **quiet)
    model = Watch()
    trainer.fit(model, datamodule=make_digits(digits.root))
    assert [batches for _, batches, _ in model.seen] == [3, 3, 3, 1] and trainer.global_step == 2


def test_order_is_seeded(digits: DigitsVQA) -> None:
    def first(seed: int) -> list[int]:
        data = make_digits(digits.root)
        data.setup()
        data.seed = seed
        return next(iter(data.train_dataloader()))["input_ids"].flatten().tolist()

    assert first(1) == first(1) != first(2)


def test_hyperparameters_are_plain_values(digits: DigitsVQA) -> None:
    saved = pickle.dumps(dict(digits.hparams))
    assert b"datamodules" not in saved
    again = DigitsVQA(**{k: v for k, v in digits.hparams.items() if k in ("root", "stem", "train_scenes")})
    assert again.spec.stem == digits.spec.stem


def test_the_order_follows_from_seed_and_epoch(digits: DigitsVQA) -> None:
    orders = []
    for epoch in (0, 1, 1):
        loader = digits.train_dataloader()
        loader.sampler.set_epoch(epoch)  # as Lightning does, after a resume too
        orders.append([batch["input_ids"].tolist() for batch in loader])
    assert orders[0] != orders[1] and orders[1] == orders[2]
