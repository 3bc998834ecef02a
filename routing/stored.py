"""What a key-value cache holds, layer by layer, as it lies in memory.

Shape suffixes: B batch.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers import Cache

from routing.cache import RoutedKV


@dataclass(frozen=True)
class StoredLayer:
    """Keys and values of one decoder layer.

    Args:
        layer: Decoder layer, from 0.
        slots: Places for tokens in each row, filled or not.
        filled: Places that hold a token, summed over the rows.
        bytes: Bytes of all places of all rows.
        used_bytes: Bytes of the places that hold a token.
    """

    layer: int
    slots: int
    filled: int
    bytes: int
    used_bytes: int


def stored(cache: Cache) -> tuple[StoredLayer, ...]:
    """Counts what a cache holds now, routed layers and others, first layer first; at most one host sync a layer.

    A layer that nothing has entered holds nothing. In a layer that is not routed, padding counts as tokens.
    """
    return tuple(_stored(number, layer) for number, layer in enumerate(cache.layers))


def _stored(number: int, layer: object) -> StoredLayer:
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if not isinstance(keys, Tensor) or not isinstance(values, Tensor) or not keys.numel():
        return StoredLayer(number, 0, 0, 0, 0)
    rows, shown = len(keys), keys.shape[-2]
    each = (keys.nbytes + values.nbytes) // (rows * shown)
    # Keys may be the filled part of a buffer that was taken once, which is what lies in memory.
    held = keys.untyped_storage().nbytes() + values.untyped_storage().nbytes()
    filled = _filled(layer, rows, shown)
    return StoredLayer(number, held // (rows * each), filled, held, filled * each)


def _filled(layer: object, rows: int, shown: int) -> int:
    if isinstance(layer, RoutedKV):
        filled_B = layer.filled_B()
        return int(filled_B.sum()) if isinstance(filled_B, Tensor) else rows * filled_B
    read = getattr(layer, "get_seq_length", lambda: shown)()
    return rows * min(int(read), shown)  # a window forgets what it has read
