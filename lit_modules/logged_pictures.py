"""Pictures and histograms for the run's folder and for every logger that takes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from lightning import Trainer
from PIL import Image

from lit_modules.score_histograms import Histogram


def write_image(trainer: Trainer, run: str | None, tag: str, file: str, drawn: np.ndarray) -> None:
    """Into the run's folder, and to every logger that takes images as TensorBoard's does."""
    if run is not None:
        path = Path(run) / file
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(drawn).save(path)
    for logger in trainer.loggers:
        if hasattr(logger.experiment, "add_image"):
            logger.experiment.add_image(tag, drawn, trainer.global_step, dataformats="HWC")


def write_histogram(trainer: Trainer, tag: str, scores: Histogram, step: int) -> None:
    """To every logger that takes histograms as TensorBoard's does."""
    for logger in trainer.loggers if trainer.is_global_zero else ():
        if hasattr(logger.experiment, "add_histogram_raw"):
            logger.experiment.add_histogram_raw(
                tag,
                min=scores.edges[0],
                max=scores.edges[-1],
                num=int(scores.counts.sum()),
                sum=scores.total,
                sum_squares=scores.squares,
                bucket_limits=scores.edges[1:].tolist(),
                bucket_counts=scores.counts.tolist(),
                global_step=step,
            )
