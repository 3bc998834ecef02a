"""Intervals and tests for arms that answered the same questions under the same seeds.

S seeds, Q questions, C scenes (the questions with the same units are one scene), U units.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse, special

Array = NDArray[np.float64]
Units = Sequence[Collection[Hashable]]


@dataclass(frozen=True)
class Contrast:
    """A weighted mean, or a difference of two, and how far it may be from that of other seeds, scans and questions.

    Args:
        estimate: The mean over seeds of the weighted mean over questions; of a contrast, first minus second.
        standard_error: Its standard error, 0 or more; infinite if all questions share units with all others.
        df: Degrees of freedom of the t distribution that the standard error is read with, above 0.
    """

    estimate: float
    standard_error: float
    df: float

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """The t interval that holds the truth with probability ``level``; it is not cut at the ends of the scale."""
        reach = float(special.stdtrit(self.df, (1 + level) / 2)) * self.standard_error
        return self.estimate - reach, self.estimate + reach

    @property
    def p(self) -> float:
        """Two-sided p-value of the hypothesis that the truth is 0."""
        return 2 * _upper_tail(abs(self.estimate), self)


def contrast(first_SQ: ArrayLike, second_SQ: ArrayLike, units: Units, weights_Q: ArrayLike | None = None) -> Contrast:
    """The paired difference of two arms, first minus second; everything else is as in ``mean_of``."""
    first_SQ, second_SQ = np.asarray(first_SQ, dtype=float), np.asarray(second_SQ, dtype=float)
    if first_SQ.shape != second_SQ.shape:
        raise ValueError(
            f"The arms have shapes {first_SQ.shape} and {second_SQ.shape}; a paired contrast needs equal ones, (seeds, "
            "questions): give both arms the same seeds and questions in the same order."
        )
    return mean_of(first_SQ - second_SQ, units, weights_Q)


def mean_of(right_SQ: ArrayLike, units: Units, weights_Q: ArrayLike | None = None) -> Contrast:
    """The weighted mean of one arm, with the error of a hierarchical bootstrap over seeds x scans in its limit.

    Nothing is drawn: a bootstrap variance of a weighted mean is a sum of squares, which is computed. The two-way
    bootstrap (Owen 2007, "The pigeonhole bootstrap", Annals of Applied Statistics 1:386) adds the variances of
    resampled seeds, of resampled scans and of their interaction. The first misses a factor S / (S - 1), and the first
    two each hold the interaction once already, so it is subtracted twice (Cameron, Gelbach and Miller 2011, "Robust
    inference with multiway clustering"). What is left is

        variance of the seeds' means / S  +  covariance, between two different seeds, of what the questions add,

    the latter averaged over pairs of seeds: only what belongs to the questions recurs under another seed. A scene has
    several scans, so its scans' clusters overlap: resampling scans would count a scene's own noise once per scan.
    Inclusion and exclusion over the sets of scans that scenes share leaves each pair of scenes with a common scan, and
    each scene with itself, counted exactly once (Aronow, Samii and Assenova 2015, "Cluster-robust variance estimation
    for dyadic data"). Sums of squares about an estimated mean come out too small by 1 - p, with p the probability that
    two questions, drawn by weight, share a scan (with disjoint clusters of one size, 1 / their number): they are
    divided by it.

    Scenes with themselves and scenes with others are two components beside seeds, neither below 0. Each has its own
    degrees of freedom: S - 1 for seeds; for the others what they have if scenes, or scans, differ by independent
    effects of one size. One over the degrees of freedom of the whole is the mean of one over theirs, weighed by the
    components. Satterthwaite (1946) weighs by their squares, which is right for known components; with estimated ones
    the whole would look surest where the seeds happen to agree, and tables of twelve equal arms under five seeds would
    show a difference in up to 9 % instead of 5 %. With two or three seeds neither is safe: where seeds matter a little
    more than scans, 95 % intervals cover 91 % or 94 %.

    Args:
        right_SQ: 1 where a question was answered right under a seed, else 0 (any finite numbers will do).
        units: For each question, the scans in its picture, or whatever else it shares with other questions.
        weights_Q: Weights of the questions, 0 or more, of any sum; None weighs all alike.
    """
    right_SQ = np.asarray(right_SQ, dtype=float)
    weights_Q = np.ones(right_SQ.shape[-1:]) if weights_Q is None else np.asarray(weights_Q, dtype=float)
    _check(right_SQ, units, weights_Q)
    weights_Q = weights_Q / weights_Q.sum()
    scenes = _scenes(tuple(map(frozenset, units)), tuple(weights_Q.tolist()))
    mean_S = right_SQ @ weights_Q
    seeds, estimate = len(mean_S), float(mean_S.mean())
    if scenes.shared > 1 - 1e-9:
        return Contrast(estimate, math.inf, seeds - 1)
    added_CS = scenes.sums(weights_Q * (right_SQ - mean_S[:, None]))
    alone = _between_seeds(added_CS.T @ added_CS) / (1 - scenes.same)
    total = _between_seeds(added_CS.T @ (scenes.overlap_CC @ added_CS)) / (1 - scenes.shared)
    parts = np.array([mean_S.var(ddof=1) / seeds, max(alone, 0.0), max(total - alone, 0.0)])
    variance = float(parts.sum())
    rates = 1 / np.array([seeds - 1, scenes.df_alone, scenes.df_shared])
    return Contrast(estimate, math.sqrt(variance), variance / float(parts @ rates) if variance else seeds - 1)


def equivalence(contrast: Contrast, margin: float = 0.01) -> float:
    """p-value of two one-sided t tests (Schuirmann 1987): is the truth further from 0 than ``margin``?

    The larger of the two: the upper tail of t at (margin - size of the estimate) / standard error.
    """
    return _upper_tail(_positive(margin) - abs(contrast.estimate), contrast)


def is_equivalent(contrast: Contrast, margin: float = 0.01) -> bool:
    """Whether the 90 % interval lies inside plus or minus ``margin``: ``equivalence`` at 5 %."""
    low, high = contrast.interval(0.9)
    return -_positive(margin) < low and high < margin


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p-values adjusted for their number (Holm 1979): those up to 0.05 hold any false finding in 5 % of tables at most.

    The smallest of n is multiplied by n, the next by n - 1, and so on; none falls below one before it or exceeds 1.
    """
    wrong = {name: p for name, p in p_values.items() if not 0 <= p <= 1}
    if wrong:
        raise ValueError(f"These are no p-values: {wrong}; each must be from 0 to 1: leave out what was not tested.")
    ranked = sorted(p_values, key=p_values.__getitem__)
    scaled = (min(1.0, (len(ranked) - rank) * p_values[name]) for rank, name in enumerate(ranked))
    adjusted = dict(zip(ranked, accumulate(scaled, max), strict=True))
    return {name: adjusted[name] for name in p_values}


@dataclass(frozen=True)
class Scenes:
    """The questions by scene, and which scenes share a unit.

    Args:
        questions_CQ: 1 where a question belongs to a scene.
        overlap_CC: 1 where two scenes share a unit; a scene shares with itself.
        same: Probability that two questions, drawn by weight with replacement, are of one scene.
        shared: Probability that they share a unit.
        df_alone: Degrees of freedom of the scenes' own noise.
        df_shared: Degrees of freedom of what scenes share.
    """

    questions_CQ: sparse.csr_array
    overlap_CC: sparse.csr_array
    same: float
    shared: float
    df_alone: float
    df_shared: float

    def sums(self, values_SQ: Array) -> Array:
        """Sums over the questions of each scene, (C, S)."""
        return self.questions_CQ @ values_SQ.T


# The contrasts of a table share their questions; with 10,000 scenes the overlaps take half a second and 80 MB.
@lru_cache(maxsize=1)
def _scenes(units: tuple[frozenset[Hashable], ...], weights: tuple[float, ...]) -> Scenes:
    numbers = {scene: number for number, scene in enumerate(dict.fromkeys(units))}
    questions_CQ = _incidence([numbers[scene] for scene in units], range(len(units)), (len(numbers), len(units)))
    columns = {unit: number for number, unit in enumerate({unit: None for scene in numbers for unit in scene})}
    pairs = [(number, columns[unit]) for scene, number in numbers.items() for unit in scene]
    units_CU = _incidence(*zip(*pairs, strict=True), (len(numbers), len(columns)))
    overlap_CC = units_CU @ units_CU.T
    overlap_CC.data[:] = 1.0
    weight_C = questions_CQ @ np.array(weights)
    same, shared = float(weight_C @ weight_C), float(weight_C @ (overlap_CC @ weight_C))
    df_alone = same**2 / float((weight_C**4).sum()) - 1
    return Scenes(questions_CQ, overlap_CC, same, shared, df_alone, _df_shared(units_CU, overlap_CC, weight_C))


def _df_shared(units_CU: sparse.csr_array, overlap_CC: sparse.csr_array, weight_C: Array) -> float:
    """Squared trace over squared norm of what independent effects of the units add to sums over pairs of scenes."""
    others_CC = overlap_CC - sparse.eye_array(len(weight_C))
    effects_CU = sparse.diags_array(weight_C) @ units_CU
    mean_U = effects_CU.sum(0)
    across_U = effects_CU.T @ (others_CC @ weight_C)
    spread_UU = (effects_CU.T @ (others_CC @ effects_CU)).toarray()
    centre_UU = np.outer(across_U - weight_C @ (others_CC @ weight_C) / 2 * mean_U, mean_U)
    spread_UU -= centre_UU + centre_UU.T
    norm = float((spread_UU**2).sum())
    return max(1.0, float(np.trace(spread_UU)) ** 2 / norm) if norm else 1.0


def _incidence(rows: Sequence[int], columns: Sequence[int], shape: tuple[int, int]) -> sparse.csr_array:
    return sparse.csr_array((np.ones(len(rows)), (rows, columns)), shape=shape)


def _between_seeds(products_SS: Array) -> float:
    """The mean over ordered pairs of different seeds."""
    seeds = len(products_SS)
    return float((products_SS.sum() - np.trace(products_SS)) / (seeds * (seeds - 1)))


def _upper_tail(distance: float, contrast: Contrast) -> float:
    """P(t >= distance in standard errors); a standard error of 0, of arms that never differ, leaves no doubt."""
    if contrast.standard_error == 0:
        return 0.5 * (1 - float(np.sign(distance)))
    return float(special.stdtr(contrast.df, -distance / contrast.standard_error))


def _positive(margin: float) -> float:
    if not margin > 0:
        raise ValueError(
            f"The margin of equivalence is {margin}; it must be above 0: give the largest difference that does not "
            "matter, as a share (0.01 is one percentage point)."
        )
    return margin


def _check(right_SQ: Array, units: Units, weights_Q: Array) -> None:
    if right_SQ.ndim != 2 or len(right_SQ) < 2:
        raise ValueError(
            f"An arm has shape {right_SQ.shape}; it must be (seeds, questions) with at least 2 seeds, since their "
            "spread is part of the error: run the arm with more seeds."
        )
    questions = right_SQ.shape[1]
    if not 0 < questions == len(units) or weights_Q.shape != (questions,):
        raise ValueError(
            f"There are answers to {questions} questions, units of {len(units)} and weights of shape "
            f"{weights_Q.shape}; all must be for the same questions, one or more: give one entry per question to each."
        )
    if not (np.isfinite(right_SQ).all() and np.isfinite(weights_Q).all()):
        raise ValueError("An answer or a weight is not a finite number; all must be: score every question.")
    if not (weights_Q.min() >= 0 and weights_Q.sum() > 0):
        raise ValueError(
            f"The weights go from {weights_Q.min()} to {weights_Q.max()}; they must be 0 or more with a sum above 0: "
            "give positive weights to the questions that count."
        )
    wrong = next((number for number, named in enumerate(units) if isinstance(named, str) or not len(named)), None)
    if wrong is not None:
        raise ValueError(
            f"Question {wrong} has the units {units[wrong]!r}; each question needs a collection of at least one: name "
            "its scans, or its picture, or itself."
        )
