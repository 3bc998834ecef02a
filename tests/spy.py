"""Writes down what a monitor should have counted, from the data and from the routers themselves."""

from pathlib import Path

import torch
from lightning import Callback

from routing.router import Router


class Spy(Callback):
    """One file a batch: the kinds of its tokens and, in training, what every router said of them.

    Args:
        folder: Where the files go.
    """

    def __init__(self, folder: str) -> None:
        self.folder, self.scores, self.seen = Path(folder), [], 0

    def on_train_start(self, trainer, pl_module) -> None:
        for router in (module for module in pl_module.model.modules() if isinstance(module, Router)):
            router.register_forward_hook(lambda _, __, scores_BTE: self.scores.append(scores_BTE.detach()))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.scores, self.step = [], trainer.global_step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        seen = {"step": self.step, "kind_BT": batch["tokens"].kind_BT, "scores": self.scores}
        torch.save(seen, self.folder / f"{trainer.global_rank}_{self.seen}.pt")
        self.seen += 1

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if not trainer.sanity_checking:
            torch.save(batch["tokens"].kind_BT, self.folder / f"asked_{trainer.global_rank}_{trainer.global_step}.pt")
