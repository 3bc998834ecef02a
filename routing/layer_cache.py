"""A layer's part of what transformers passes as the cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, StaticLayer

from routing.cache import RoutedKV
from routing.static_cache import RoutedStaticKV


def routed_kv(cache: object, layer: int, room: Callable[[int], int]) -> RoutedKV | None:
    """This layer's part of a cache, made ready to hold fewer tokens than the model reads; None without a cache.

    Args:
        cache: What the decoder passes to its layers.
        layer: Number of the decoder layer.
        room: Slots that the layer needs in a static cache for that many tokens; may refuse.

    Raises:
        ValueError: the cache stores tokens in a way that a routed layer cannot, such as quantized ones.
    """
    if cache is None:
        return None
    assert isinstance(cache, Cache)
    while len(cache.layers) <= layer and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    found = cache.layers[layer]
    if isinstance(found, RoutedKV):
        return found
    plain = type(found) in (DynamicLayer, StaticLayer)
    if not plain or cast(CacheLayerMixin, found).get_seq_length():
        raise ValueError(
            f"{type(cache).__name__} keeps layer {layer}, which is routed, in a {type(found).__name__}, empty or not."
            " Routed layers need a DynamicCache or StaticCache that they have filled themselves: pass"
            " past_key_values=None, cache_implementation='dynamic', or use_cache=False."
        )
    length = found.max_cache_len if isinstance(found, StaticLayer) else None
    cache.layers[layer] = made = RoutedKV() if length is None else RoutedStaticKV(room(length), length)
    return made


def read_by(cache: object) -> int:
    """How many tokens a cache has read; known on the host where a layer is routed, of which the first one is asked."""
    if not isinstance(cache, Cache):
        return 0
    for layer in cache.layers:
        if isinstance(layer, RoutedKV):
            return layer.seen
    return int(cache.get_seq_length())
