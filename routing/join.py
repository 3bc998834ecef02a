"""Caches of groups of rows, read apart, put together to the cache of the batch.

Shape suffixes: B batch, R rows of a group, T tokens, K slots of a routed layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from routing.cache import RoutedKV
from routing.decision import KeptTokens


@dataclass(frozen=True, eq=False)
class Read:
    """A group of rows that has been read.

    Args:
        rows_R: Their numbers in the batch, on the device.
        length: Tokens of the longest.
        cache: What they left in each layer; emptied when groups are joined.
        kept: What layers that are routed in depth decided, by layer.
    """

    rows_R: Tensor
    length: int
    cache: DynamicCache
    kept: Mapping[int, KeptTokens]


def joined(groups: Sequence[Read], ranked: Mapping[int, Tensor | None], B: int, T: int) -> list[DynamicLayer]:
    """The layers of a cache of ``B`` rows that read ``T`` tokens each, padding on the left included.

    ``ranked``: for each routed layer, True at the tokens that it compares with each other, (B, T); None if it does not.
    """
    whole = []
    for layer in range(len(groups[0].cache.layers)):
        # A group's layer is given up once it is joined: one layer at a time is held twice.
        parts = [part for group in groups if isinstance(part := group.cache.layers.pop(0), DynamicLayer)]
        routed = isinstance(parts[0], RoutedKV)
        whole.append(_routed(layer, groups, parts, ranked.get(layer), B, T) if routed else _dense(groups, parts, B, T))
    return whole


def _dense(groups: Sequence[Read], parts: Sequence[DynamicLayer], B: int, T: int) -> DynamicLayer:
    """Each row at the end of its places; the mask of the model hides those before it."""
    whole = DynamicLayer()  # type: ignore[no-untyped-call]
    held = [(group, part) for group, part in zip(groups, parts, strict=True) if part.keys is not None]
    if held:
        places = [(T - group.length, T) for group, _ in held]
        whole.update(_spread(held, places, "keys", B, T), _spread(held, places, "values", B, T))
    return whole


def _routed(
    layer: int, groups: Sequence[Read], parts: Sequence[DynamicLayer], ranked_BT: Tensor | None, B: int, T: int
) -> RoutedKV:
    """Groups of whose tokens none entered have no slots."""
    routed = RoutedKV()
    held = [(g, part) for g, part in zip(groups, parts, strict=True) if isinstance(part, RoutedKV) and part.slots]
    if not held:
        routed.pass_by(T)
        return routed
    kept = [group.kept[layer] for group, _ in held]
    sizes = [each.index_BK.shape[1] for each in kept]
    K = max(sizes)
    known = len(held) == len(groups) and all(part.valid_BS is None for _, part in held)
    # Slots as where all rows are read together: in sequence order, those that a shorter group does not fill last.
    index_BK = groups[0].rows_R.new_full((B, K), T - 1)
    valid_BK = torch.zeros_like(index_BK, dtype=torch.bool)
    for (group, _), each, size in zip(held, kept, sizes, strict=True):
        index_BK[group.rows_R, :size] = each.index_BK + (T - group.length)
        valid_BK[group.rows_R, :size] = each.valid_BK
    weight_BT = valid_BK.new_ones(B, T, dtype=torch.float32)  # the cache reads no weights
    holes = not known or len(set(sizes)) > 1
    routed.admit(KeptTokens(index_BK, valid_BK, weight_BT), T, holes=holes, ranked_BT=ranked_BT)
    places = [(0, size) for size in sizes]
    routed.update(_spread(held, places, "keys", B, K), _spread(held, places, "values", B, K))
    return routed


def _spread(
    held: Sequence[tuple[Read, DynamicLayer]], places: Sequence[tuple[int, int]], name: str, B: int, slots: int
) -> Tensor:
    """Keys or values of all groups at their places, zeros elsewhere; (B, heads, slots, width)."""
    first: Tensor = getattr(held[0][1], name)
    whole = first.new_zeros(B, first.shape[1], slots, first.shape[3])
    for (group, part), (start, stop) in zip(held, places, strict=True):
        whole[group.rows_R, :, start:stop] = getattr(part, name)
    return whole
