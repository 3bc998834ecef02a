"""A small vision tower that has learned to name handwritten digits: a stand-in for CLIP on the embedded task."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from datamodules.digits import canvas
from datamodules.digits.scans import Scans, scramble, stretch, vary
from datamodules.digits.scene import LARGEST_ITEM, Geometry

log = logging.getLogger(__name__)
NOTHING = 10  # the class of a patch that shows no digit
MOST_VARIANTS = 8  # drawings of each scan and size that training chooses from
GROUNDS = 64  # that it draws on
POSITION_SCALE = 0.3  # of the first position embedding, beside patch embeddings of about 0.15
CROWD = (40, 90)  # attempts to place a drawing: many digits a picture, since the pictures are what costs time


@dataclass(frozen=True)
class StemSpec:
    """How the vision tower is built and trained. Every patch learns which digit it is part of, or that it is of none.

    Args:
        hidden_size: Width of the tower.
        layers: Its number of layers.
        heads: Attention heads of a layer.
        steps: Training steps; 0 leaves the tower at random weights.
        batch_size: Pictures of a step.
        learning_rate: Peak of the one-cycle schedule.
    """

    hidden_size: int = 96
    layers: int = 3
    heads: int = 3
    steps: int = 400
    batch_size: int = 16
    learning_rate: float = 2e-3


@dataclass(frozen=True)
class Painter:
    """Draws pictures crowded with digits and scrambled strokes, and says which digit each patch shows.

    Args:
        drawings: For each size in patches, the ready-drawn digits (M, side, side).
        fakes: The same, scrambled.
        digits: The digit of each drawing (M,).
        grounds: Ready-made grounds (G, image_size, image_size).
        patch_size: Pixels of a patch's side.
    """

    drawings: dict[int, NDArray[np.float32]]
    fakes: dict[int, NDArray[np.float32]]
    digits: NDArray[np.int64]
    grounds: NDArray[np.float32]
    patch_size: int

    @classmethod
    def of(cls, scans: Scans, geometry: Geometry, variants: int, rng: np.random.Generator) -> Painter:
        """``variants`` varied drawings of each scan and size; 0 draws each scan once, as it is."""
        drawings, fakes = {}, {}
        for size in range(1, LARGEST_ITEM + 1):
            side = size * geometry.patch_size
            repeated = [s for s in scans.strokes for _ in range(max(variants, 1))]
            drawings[size] = np.stack([vary(s, side, rng) if variants else stretch(s, side) for s in repeated])
            fakes[size] = np.stack([stretch(scramble(s, rng), side) for s in repeated])
        grounds = np.stack([canvas.ground(rng, geometry.image_size) for _ in range(GROUNDS)])
        return cls(drawings, fakes, np.repeat(scans.digits, max(variants, 1)), grounds, geometry.patch_size)

    def batch(self, count: int, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures in [-1, 1] (count, 3, side, side); class and number of the drawing of each patch (count, P)."""
        pictures, classes, owners = zip(*(self._picture(rng) for _ in range(count)), strict=True)
        pixels = torch.from_numpy(np.stack(pictures))[:, None].expand(-1, 3, -1, -1) / 127.5 - 1
        return pixels, torch.from_numpy(np.stack(classes)).flatten(1), torch.from_numpy(np.stack(owners)).flatten(1)

    def _picture(self, rng: np.random.Generator) -> tuple[NDArray[np.float32], ...]:
        ground = self.grounds[rng.integers(GROUNDS)]
        picture = np.roll(ground, rng.integers(0, len(ground), 2), axis=(0, 1))
        grid = len(picture) // self.patch_size
        classes = np.full((grid, grid), NOTHING, dtype=np.int64)
        owners = np.full((grid, grid), -1, dtype=np.int64)
        taken = np.zeros((grid, grid), dtype=bool)
        crowd = rng.integers(*CROWD)
        for n, (size, top, left, which, kind) in enumerate(rng.integers(0, 1 << 30, (crowd, 5)).tolist()):
            size = size % LARGEST_ITEM + 1
            top, left, which = top % (grid - size + 1), left % (grid - size + 1), which % len(self.digits)
            place = slice(top, top + size), slice(left, left + size)
            if taken[place].any():
                continue
            taken[place] = True
            real = kind % 4 > 0
            strokes = (self.drawings if real else self.fakes)[size][which]
            canvas.draw(picture, strokes, top * self.patch_size, left * self.patch_size, rng.uniform(*canvas.INK))
            if real:
                classes[place], owners[place] = self.digits[which], n
        return picture, classes, owners


def train_stem(
    spec: StemSpec, train: Scans, val: Scans, geometry: Geometry, seed: int
) -> tuple[CLIPVisionModel, float]:
    """Trains the tower on drawings of the training scans.

    Returns the tower and the share of the validation scans' digits that its patches name right.
    """
    rng = np.random.default_rng([seed, 1])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tower, head = _tower(spec, geometry), nn.Linear(spec.hidden_size, NOTHING + 1)
        if spec.steps:
            variants = min(1 + spec.steps // 100, MOST_VARIANTS)
            _fit(tower, head, spec, Painter.of(train, geometry, variants, rng), rng)
        share = named_right(tower, head, Painter.of(val, geometry, 0, rng), rng)
    log.info("Vision tower: %.1f %% of the digits of unseen scans named right.", 100 * share)
    return tower.eval(), share


def _tower(spec: StemSpec, geometry: Geometry) -> CLIPVisionModel:
    tower = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=spec.hidden_size,
            intermediate_size=4 * spec.hidden_size,
            num_hidden_layers=spec.layers,
            num_attention_heads=spec.heads,
            image_size=geometry.image_size,
            patch_size=geometry.patch_size,
            projection_dim=spec.hidden_size,
            hidden_act="gelu",
        )
    )
    positions = dict(tower.named_parameters())
    (table,) = [value for name, value in positions.items() if name.endswith("position_embedding.weight")]
    table.data[1:] = POSITION_SCALE * _waves(geometry.grid, spec.hidden_size)
    return tower


def _waves(grid: int, width: int) -> Tensor:
    """Sines and cosines of row and column: what a short training would spend half its steps to find."""
    frequencies = torch.pi / 2 ** torch.linspace(0, 3.5, width // 4)
    angles = torch.arange(grid)[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    both = [waves[:, None].expand(-1, grid, -1), waves[None].expand(grid, -1, -1)]
    table = torch.cat(both, dim=-1).flatten(0, 1)
    return nn.functional.pad(table, (0, width - table.shape[1]))


def _fit(tower: CLIPVisionModel, head: nn.Linear, spec: StemSpec, painter: Painter, rng: np.random.Generator) -> None:
    parameters = [*tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=spec.learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, spec.learning_rate, spec.steps, pct_start=0.15)
    tower.train()
    for _ in range(spec.steps):
        pixels, classes, _ = painter.batch(spec.batch_size, rng)
        logits = head(tower(pixels).last_hidden_state[:, 1:])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), classes.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()


@torch.no_grad()
def named_right(tower: CLIPVisionModel, head: nn.Linear, painter: Painter, rng: np.random.Generator) -> float:
    """The share of drawn digits whose patches, taken together, name them."""
    right = total = 0
    tower.eval()
    for _ in range(8):
        pixels, classes, owners = painter.batch(16, rng)
        logits = head(tower(pixels).last_hidden_state[:, 1:]).log_softmax(-1)
        for row in range(len(owners)):
            for owner in owners[row].unique().tolist():
                if owner >= 0:
                    of = owners[row] == owner
                    right += int(logits[row, of].mean(0).argmax() == classes[row, of][0])
                    total += 1
    return right / total
