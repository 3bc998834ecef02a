"""What the routers do, as pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from PIL import Image
from torch import Tensor

from lit_modules.batches import model_inputs
from lit_modules.pictures import Tile, kept_patches, lit, picture, sheet
from routing import KeptTokens, RoutingRecord, TokenKind, Tokens

if TYPE_CHECKING:
    from lit_modules.routed_vlm import RoutedVLM


class RoutingMonitor(Callback):
    """Draws, at each validation, the patches that every routed layer kept of the first validation images.

    The sheets go to TensorBoard (``depth/kept/<id>``) and as PNG files into the run's folder, under ``kept_patches``.

    Args:
        images: Images that are drawn, at least 1.
        scale: Side of a drawn pixel, at least 1.
        columns: Tiles in a row, at least 1.
    """

    def __init__(self, images: int = 4, scale: int = 2, columns: int = 6) -> None:
        if min(images, scale, columns) < 1:
            raise ValueError(f"RoutingMonitor(images={images}, scale={scale}, columns={columns}): each is at least 1.")
        self.images, self.scale, self.columns = images, scale, columns

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Mapping[str, object], batch_idx: int, loader: int = 0
    ) -> None:
        if batch_idx or trainer.sanity_checking:
            return
        folder = trainer.log_dir  # a collective: all ranks ask
        if not trainer.is_global_zero or "pixel_values" not in batch:
            return
        with trainer.precision_plugin.val_step_context():
            for name, drawn in self.sheets(pl_module, batch):
                self._show(trainer, folder, name, drawn)

    def sheets(self, module: RoutedVLM, batch: Mapping[str, object]) -> Iterator[tuple[str, np.ndarray]]:
        """A name and a sheet for each of the first images of a batch, from one forward."""
        tokens, pixels, ids = batch["tokens"], batch["pixel_values"], batch["ids"]
        assert isinstance(tokens, Tokens) and isinstance(pixels, Tensor) and isinstance(ids, Sequence)
        with torch.no_grad(), module.tape.about(tokens), module.tape.recording() as records:
            module.model(**model_inputs(batch, mask=True), use_cache=False)
        depth = [record for record in records if isinstance(record.decision, KeptTokens)]
        drawn: list[Tensor] = []
        for number, (row, image) in enumerate(places(tokens) if depth else ()):
            if len(drawn) < self.images and not any(torch.equal(pixels[number], other) for other in drawn):
                drawn.append(pixels[number])  # several questions may share one picture
                name = f"{ids[row]}/image_{image}" if image else str(ids[row])
                yield name, self._sheet(name, depth, row, image, pixels[number])

    def _sheet(
        self, name: str, records: Sequence[RoutingRecord], row: int, image: int, pixels_3HW: Tensor
    ) -> np.ndarray:
        shown = picture(pixels_3HW, self.scale)
        tiles = [Tile("image", shown)]
        for record in records:
            kept_RC = kept_patches(record, row, image, grid(record.tokens, row, image))
            caption = f"layer {record.site.layer}: {int(kept_RC.sum())} of {kept_RC.numel()}"
            tiles.append(Tile(caption, lit(shown, kept_RC)))
        return sheet(f"{name}: patches kept by each routed layer", tiles, self.columns)

    def _show(self, trainer: Trainer, run: str | None, name: str, drawn: np.ndarray) -> None:
        name = name.replace("/", "_")
        if run is not None:
            folder = Path(run) / "kept_patches"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(drawn).save(folder / f"{name}.png")
        add_image = getattr(getattr(trainer.logger, "experiment", None), "add_image", None)
        if add_image is not None:
            add_image(f"depth/kept/{name}", drawn, trainer.global_step, dataformats="HWC")


def places(tokens: Tokens) -> list[tuple[int, int]]:
    """Row and image number of each picture whose patches have a known place, in the order of ``pixel_values``."""
    vision_BT = tokens.kind_BT == TokenKind.VISION
    found = []
    for row in range(tokens.shape[0]):
        images = tokens.image_BT[row][vision_BT[row]].unique().tolist()
        found += [(row, image) for image in images]
    return found if bool((tokens.row_BT[vision_BT] >= 0).all()) else []


def grid(tokens: Tokens, row: int, image: int) -> tuple[int, int]:
    """Rows and columns of a picture's patches."""
    ours_T = (tokens.kind_BT[row] == TokenKind.VISION) & (tokens.image_BT[row] == image)
    return int(tokens.row_BT[row][ours_T].max()) + 1, int(tokens.column_BT[row][ours_T].max()) + 1
