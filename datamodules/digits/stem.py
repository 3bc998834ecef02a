"""A small vision tower that has learned to name handwritten digits: a stand-in for CLIP on the embedded task."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import CLIPVisionConfig, CLIPVisionModel

from datamodules.digits.painter import NOBODY, NOTHING, Painter
from datamodules.digits.scans import Scans
from datamodules.digits.scene import Geometry

log = logging.getLogger(__name__)

MOST_VARIANTS = 8  # drawings of each scan and size that training chooses from
EXAMINED = 128  # pictures of unseen scans that the tower is examined on
NEIGHBOURS = ((0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (-1, -1), (1, -1), (-1, 1))
POSITION_SCALE = 0.3  # of the position embeddings at first; the patches' are about half as large
PLACE = 0.1  # weight of naming a patch's row and column, beside naming its digit
FOCUS = 2.5  # how sharply a head looks at one neighbour at first


@dataclass(frozen=True)
class StemSpec:
    """How the vision tower is built and trained.

    Every patch learns which digit it is part of, or that it is of none, and in which row and column it stands: without
    the latter its place fades layer by layer, and questions that name a cell take longer to learn.

    Args:
        hidden_size: Width of the tower; a multiple of four times ``heads``.
        layers: Its number of layers.
        heads: Attention heads of a layer.
        steps: Training steps; 0 leaves the tower untrained.
        batch_size: Pictures of a step.
        learning_rate: Peak of the one-cycle schedule.
        device: Where it is trained: ``cpu``, or ``cuda`` for long trainings. The weights differ a little between them.
    """

    hidden_size: int = 96
    layers: int = 2
    heads: int = 6
    steps: int = 600
    batch_size: int = 8
    learning_rate: float = 4e-3
    device: Literal["cpu", "cuda"] = "cpu"

    def __post_init__(self) -> None:
        if self.hidden_size % (4 * self.heads) or min(self.layers, self.batch_size) < 1 or self.steps < 0:
            raise ValueError(
                f"{self}: hidden_size must be a multiple of 4 * heads, layers and batch_size at least 1, steps at least"
                " 0. Choose e.g. hidden_size 96 with 6 heads."
            )


def train_stem(
    spec: StemSpec, train: Scans, val: Scans, geometry: Geometry, seed: int, workers: int = 0
) -> tuple[CLIPVisionModel, float]:
    """The tower, trained on drawings of the training scans, and the share of unseen digits that it names right."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tower, head = build_tower(spec, geometry), nn.Linear(spec.hidden_size, NOTHING + 1 + 2 * geometry.grid)
        if spec.steps:
            variants = min(1 + spec.steps // 100, MOST_VARIANTS)
            painter = Painter(train, geometry, variants, spec.steps * spec.batch_size, [seed, 1])
            batches = DataLoader(painter, spec.batch_size, num_workers=workers)
            _fit(tower.to(spec.device), head.to(spec.device), spec, geometry, batches)
        share = named_right(tower.cpu(), head.cpu(), Painter(val, geometry, 0, EXAMINED, [seed, 2]))
    log.info("Vision tower: %.1f %% of the digits of unseen scans named right.", 100 * share)
    return tower.eval(), share


def _fit(
    tower: CLIPVisionModel,
    head: nn.Linear,
    spec: StemSpec,
    geometry: Geometry,
    batches: DataLoader[tuple[Tensor, Tensor, Tensor]],
) -> None:
    parameters = [*tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=spec.learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, spec.learning_rate, spec.steps, pct_start=0.15)
    tower.train()
    for pixels, classes, _ in batches:
        logits = head(tower(pixels.to(spec.device)).last_hidden_state[:, 1:])
        digit, row, column = logits.flatten(0, 1).split([NOTHING + 1, geometry.grid, geometry.grid], dim=1)
        place = torch.arange(geometry.grid**2, device=spec.device).repeat(len(logits))
        loss = cross_entropy(digit, classes.flatten().to(spec.device))
        loss += PLACE * (cross_entropy(row, place // geometry.grid) + cross_entropy(column, place % geometry.grid))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()


@torch.no_grad()
def named_right(tower: CLIPVisionModel, head: nn.Linear, painter: Painter) -> float:
    """The share of drawn digits whose patches, taken together, name them."""
    right = []
    tower.eval()
    for pixels, classes, drawings in DataLoader(painter, batch_size=16):
        scores = head(tower(pixels).last_hidden_state[:, 1:])[..., : NOTHING + 1].log_softmax(-1)
        for row, drawn in enumerate(drawings):
            for drawing in set(drawn.tolist()) - {NOBODY}:
                patches = drawn == drawing
                right.append(bool(scores[row, patches].mean(0).argmax() == classes[row, patches][0]))
    return sum(right) / len(right)


def build_tower(spec: StemSpec, geometry: Geometry) -> CLIPVisionModel:
    """A CLIP tower whose heads look at neighbouring patches from the start.

    Finding the neighbours takes most of a short training otherwise.
    """
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
    for name, weight in tower.named_parameters():
        if name.endswith("position_embedding.weight"):
            weight.data[1:] = POSITION_SCALE * _waves(geometry.grid, spec.hidden_size)
        if name.endswith("k_proj.weight"):
            weight.data += FOCUS * torch.cat([_shift(spec, 0, 0)] * spec.heads)
        if name.endswith("q_proj.weight"):
            shifts = [_shift(spec, *NEIGHBOURS[head % len(NEIGHBOURS)]) for head in range(spec.heads)]
            weight.data += FOCUS * torch.cat(shifts)
    return tower


def _frequencies(width: int) -> Tensor:
    return torch.pi / 2 ** torch.linspace(0, 3.5, width // 4)


def _waves(grid: int, width: int) -> Tensor:
    """Sines and cosines of the row, then of the column (grid², width)."""
    angles = torch.arange(grid)[:, None] * _frequencies(width)
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.cat([waves[:, None].expand(-1, grid, -1), waves[None].expand(grid, -1, -1)], dim=-1).flatten(0, 1)


def _shift(spec: StemSpec, down: int, right: int) -> Tensor:
    """Turns some waves of a patch into those of the patch so many steps away (head size, width)."""
    width, quarter, size = spec.hidden_size, spec.hidden_size // 4, spec.hidden_size // spec.heads
    matrix = torch.zeros(size, width)
    chosen = torch.linspace(0.2, 0.8, size // 4) * quarter
    for n, wave in enumerate(chosen.long().tolist()):
        for axis, steps in enumerate((down, right)):
            turn = steps * _frequencies(width)[wave]
            sine, cosine = 2 * axis * quarter + wave, (2 * axis + 1) * quarter + wave
            rows = matrix[4 * n + 2 * axis : 4 * n + 2 * axis + 2]
            rows[0, sine], rows[0, cosine] = turn.cos(), turn.sin()
            rows[1, sine], rows[1, cosine] = -turn.sin(), turn.cos()
    return matrix
