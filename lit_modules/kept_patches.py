"""Which patches of a batch's pictures every routed layer kept, drawn as one sheet a picture.

Shape suffixes: B batch, T tokens, H height and W width in pixels, R rows and C columns of patches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lit_modules.batches import model_inputs
from lit_modules.pictures import Tile, lit, picture, sheet
from routing import KeptTokens, RoutingRecord, TokenKind, Tokens

if TYPE_CHECKING:
    from lit_modules.routed_vlm import RoutedVLM


@dataclass(frozen=True)
class KeptPatches:
    """How the sheets are drawn.

    Args:
        images: Images that are drawn; 0 draws none.
        scale: Side of a drawn pixel, at least 1.
        columns: Tiles in a row, at least 1.
    """

    images: int = 4
    scale: int = 2
    columns: int = 3

    def __post_init__(self) -> None:
        if self.images < 0 or min(self.scale, self.columns) < 1:
            raise ValueError(f"{self}: images is at least 0, scale and columns at least 1.")

    def records(self, module: RoutedVLM, batch: Mapping[str, object]) -> list[RoutingRecord]:
        """What the depth-routed layers decide about a batch, from one forward; a collective call if it is sharded."""
        tokens = batch["tokens"]
        assert isinstance(tokens, Tokens)
        with torch.no_grad(), module.tape.about(tokens), module.tape.recording() as records:
            module.model(**model_inputs(batch, mask=True), use_cache=False)
        return [record for record in records if isinstance(record.decision, KeptTokens)]

    def sheets(self, records: Sequence[RoutingRecord], batch: Mapping[str, object]) -> Iterator[tuple[str, np.ndarray]]:
        """A name and a sheet for each of the first pictures of a batch."""
        tokens, pixels, ids = batch["tokens"], batch["pixel_values"], batch["ids"]
        assert isinstance(tokens, Tokens) and isinstance(pixels, Tensor) and isinstance(ids, Sequence)
        drawn: list[Tensor] = []
        for number, (row, image) in enumerate(places(tokens) if records else ()):
            if len(drawn) < self.images and not any(torch.equal(pixels[number], other) for other in drawn):
                drawn.append(pixels[number])  # several questions may share one picture
                name = f"{ids[row]}/image_{image}" if image else str(ids[row])
                drawings = tiles(picture(pixels[number], self.scale), records, row, image)
                yield name, sheet(f"{name}: patches kept by each routed layer", drawings, self.columns)


def tiles(shown: np.ndarray, records: Sequence[RoutingRecord], row: int, image: int) -> list[Tile]:
    """A picture (H, W, 3), and for each record the same with the patches dimmed that it did not keep."""
    drawn = [Tile("image", shown)]
    for record in records:
        kept_RC = kept_patches(record, row, image, grid(record.tokens, row, image))
        caption = f"layer {record.site.layer}: {int(kept_RC.sum())} of {kept_RC.numel()}"
        drawn.append(Tile(caption, lit(shown, kept_RC)))
    return drawn


def kept_patches(record: RoutingRecord, row: int, image: int, shape: tuple[int, int]) -> Tensor:
    """True where a patch of that picture was kept; bool (R, C), on the CPU."""
    tokens, decision = record.tokens, record.decision
    assert isinstance(decision, KeptTokens)
    ours_T = (tokens.kind_BT[row] == TokenKind.VISION) & (tokens.image_BT[row] == image)
    kept_N = decision.keep_BT()[row][ours_T].cpu()
    grid_RC = torch.zeros(shape, dtype=torch.bool)
    grid_RC[tokens.row_BT[row][ours_T].long().cpu(), tokens.column_BT[row][ours_T].long().cpu()] = kept_N
    return grid_RC


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
