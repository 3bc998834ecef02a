"""Predictions as a file: one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter


class AnswerWriter(BasePredictionWriter):
    """Writes ``predict``'s answers to ``predictions.jsonl`` in the run's folder: id, question, kind, truth, prediction.

    The file appears when all of them are written; with several processes, each writes ``predictions_<rank>.jsonl``.
    """

    def __init__(self) -> None:
        super().__init__("batch")
        self.path: Path | None = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = trainer.log_dir
        if folder is None:
            raise ValueError(
                "Predictions have nowhere to go: `trainer.logger` is off. Give a logger that has a folder."
            )
        name = "predictions.jsonl" if trainer.world_size == 1 else f"predictions_{trainer.global_rank}.jsonl"
        self.path = Path(folder) / name
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._partial(self.path).write_text("")

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Sequence[Mapping[str, str]],
        batch_indices: Sequence[int] | None,
        batch: object,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        assert self.path is not None
        with self._partial(self.path).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(answer, ensure_ascii=False) + "\n" for answer in prediction)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self.path is not None
        self._partial(self.path).replace(self.path)
        print(f"\nAnswers: {self.path}")

    @staticmethod
    def _partial(path: Path) -> Path:
        return path.with_suffix(".partial")
