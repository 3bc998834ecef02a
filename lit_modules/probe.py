"""Which tokens every routed layer kept of an evaluation's first questions, to be compared with another time or run.

Shape suffixes: L routed layers, R questions, T vision tokens of a question.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch

from lit_modules.retention_map import label
from lit_modules.truth_measures import Choices
from routing import Site


@dataclass(frozen=True)
class Overlap:
    """How alike two choices are, as the size of their intersection over that of their union, in [0, 1].

    Args:
        shared: What it is, all questions together; NaN where neither kept anything.
        by_chance: What it would be if both had drawn as many tokens at random.
    """

    shared: float
    by_chance: float


@dataclass(frozen=True)
class Probe:
    """Kept vision tokens of some questions about pictures.

    Args:
        layers: Names of the routed layers.
        ids: Names of the questions.
        vision_R: Vision tokens of each question.
        kept_LRT: True at those that were kept; False behind the last of a question.
    """

    layers: tuple[str, ...]
    ids: tuple[str, ...]
    vision_R: np.ndarray
    kept_LRT: np.ndarray

    @classmethod
    def empty(cls, sites: Sequence[Site]) -> Probe:
        """Of no question."""
        layers = tuple(label(site) for site in sites)
        return cls(layers, (), np.zeros(0, dtype=np.int64), np.zeros((len(layers), 0, 0), dtype=bool))

    def with_batch(self, choices: Choices, ids: Sequence[str], most: int) -> Probe:
        """With the batch's questions about pictures, up to ``most`` in all."""
        vision_BT = choices.vision_BT
        rows = [row for row, seen in enumerate(vision_BT.any(1).tolist()) if seen][: max(0, most - len(self.ids))]
        vision_RT = vision_BT[rows]
        vision_R = vision_RT.sum(1)
        longest = int(vision_R.max()) if rows else 0
        order_RT = (~vision_RT).to(torch.int8).argsort(dim=1, stable=True)[:, :longest]
        kept_LRT = choices.entered_LBT[:, rows].gather(2, order_RT.expand(len(self.layers), -1, -1))
        new = replace(
            self, ids=tuple(ids[r] for r in rows), vision_R=vision_R.cpu().numpy(), kept_LRT=kept_LRT.cpu().numpy()
        )
        return self.joined(new)

    def joined(self, other: Probe) -> Probe:
        """With another's questions behind one's own; those that both have stand once."""
        new = [row for row, id in enumerate(other.ids) if id not in set(self.ids)]
        longest = max(self.kept_LRT.shape[2], other.kept_LRT.shape[2])
        mine, theirs = (np.pad(k, ((0, 0), (0, 0), (0, longest - k.shape[2]))) for k in (self.kept_LRT, other.kept_LRT))
        return Probe(
            self.layers,
            (*self.ids, *(other.ids[row] for row in new)),
            np.concatenate([self.vision_R, other.vision_R[new]]),
            np.concatenate([mine, theirs[:, new]], axis=1),
        )

    def chosen(self, layers: Sequence[str], ids: Sequence[str]) -> np.ndarray:
        """Kept tokens of these layers and questions; bool (L, R, T)."""
        rows = {id: row for row, id in enumerate(self.ids)}
        return self.kept_LRT[[self.layers.index(layer) for layer in layers]][:, [rows[id] for id in ids]]

    def save(self, path: Path) -> None:
        """All of it or nothing."""
        partial = path.with_name(f"{path.name}.partial")
        with partial.open("wb") as file:
            np.savez_compressed(
                file, layers=self.layers, ids=np.array(self.ids, dtype=str), vision=self.vision_R, kept=self.kept_LRT
            )
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> Probe:
        """What ``save`` wrote."""
        try:
            with np.load(path) as file:
                return cls(tuple(file["layers"].tolist()), tuple(file["ids"].tolist()), file["vision"], file["kept"])
        except (OSError, ValueError, KeyError, BadZipFile) as error:
            raise ValueError(
                f"{path} cannot be read as kept tokens: {error}\nAllowed: a probe.npz that RoutingTruth wrote.\n"
                "Evaluate the run with --trainer.callbacks+=RoutingTruth."
            ) from error


def common(first: Probe, second: Probe) -> tuple[list[str], list[str]]:
    """Layers that both route, and questions about as many tokens that both were asked; in the order of the first."""
    theirs = dict(zip(second.ids, second.vision_R.tolist(), strict=True))
    mine = zip(first.ids, first.vision_R.tolist(), strict=True)
    return [layer for layer in first.layers if layer in second.layers], [id for id, n in mine if theirs.get(id) == n]


def overlap(first: Path | str, second: Path | str) -> dict[str, Overlap]:
    """How alike the tokens are that two runs kept, by layer: of two seeds, say, asked the same questions.

    Args:
        first: A ``probe.npz``.
        second: Another.

    Raises:
        ValueError: they have no layer or no question in common.
    """
    one, other = Probe.load(Path(first)), Probe.load(Path(second))
    layers, ids = common(one, other)
    if not layers or not ids:
        raise ValueError(
            f"{first} and {second} have {len(layers)} routed layers and {len(ids)} questions in common.\nAllowed: runs"
            " that route some of the same layers and were asked some of the same questions.\nEvaluate both on the"
            " same data."
        )
    a_LRT, b_LRT = one.chosen(layers, ids), other.chosen(layers, ids)
    longest = min(a_LRT.shape[2], b_LRT.shape[2])  # behind it there is padding in one of them
    a_LRT, b_LRT = a_LRT[..., :longest], b_LRT[..., :longest]
    vision_R = np.array([one.vision_R[one.ids.index(id)] for id in ids])
    a_LR, b_LR = a_LRT.sum(2), b_LRT.sum(2)
    drawn_L = (a_LR * b_LR / vision_R).sum(1)
    either_L, either_drawn_L = (a_LRT | b_LRT).sum((1, 2)), (a_LR + b_LR).sum(1) - drawn_L
    with np.errstate(invalid="ignore"):
        shares = (a_LRT & b_LRT).sum((1, 2)) / either_L, drawn_L / either_drawn_L
    return {layer: Overlap(*map(float, pair)) for layer, *pair in zip(layers, *shares, strict=True)}


def churn(before: Probe, now: Probe) -> tuple[np.ndarray, np.ndarray]:
    """Tokens kept now and not before, and tokens kept now, of the questions of both; int64 (L,) each."""
    layers, ids = common(now, before)
    a_LRT, b_LRT = before.chosen(layers, ids), now.chosen(layers, ids)
    longest = min(a_LRT.shape[2], b_LRT.shape[2])
    new_LRT = b_LRT[..., :longest] & ~a_LRT[..., :longest]
    return new_LRT.sum((1, 2)), b_LRT.sum((1, 2))
