"""A layer's part of what transformers passes as the cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, StaticLayer

from routing.cache import RoutedKV
from routing.static_cache import RoutedStaticKV


class CheckedCrop:
    """Mixin over a cache's class: a crop that a routed layer refuses leaves every layer as it was."""

    layers: list[object]

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last tokens, a negative number of them.

        Raises:
            ValueError: tokens would go that others were ranked with, and perhaps passed by for.
        """
        tokens_to_remove = int(tokens_to_remove)  # of transformers 5.17 it is a tensor
        for layer in self.layers:
            if isinstance(layer, RoutedKV):
                layer.check_crop(tokens_to_remove)
        super().crop(tokens_to_remove)  # type: ignore[misc]


_CHECKING: dict[type[Cache], type[Cache]] = {}


def checking(cls: type[Cache]) -> type[Cache]:
    """A cache's class with that check, under the same name."""
    if issubclass(cls, CheckedCrop):
        return cls
    if cls not in _CHECKING:
        names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
        _CHECKING[cls] = type(cls.__name__, (CheckedCrop, cls), names)
    return _CHECKING[cls]


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
        if isinstance(found, RoutedStaticKV) and not found.seen:
            found.room = room(found.max_cache_len)  # another prompt after reset()
        return found
    plain = type(found) in (DynamicLayer, StaticLayer)
    if not plain or cast(CacheLayerMixin, found).get_seq_length():
        raise ValueError(
            f"{type(cache).__name__} keeps layer {layer}, which is routed, in a {type(found).__name__}, empty or not."
            " Routed layers need a DynamicCache or StaticCache that they have filled themselves: pass"
            " past_key_values=None, cache_implementation='dynamic', or use_cache=False."
        )
    length = found.max_cache_len if isinstance(found, StaticLayer) else None
    if length is not None and cache.offloading:
        raise ValueError(
            f"{type(cache).__name__} with offloading: layer {layer}, which is routed, keeps its slots where it"
            " computes.\nAllowed: a static cache on the device, or a dynamic one that is offloaded.\nGive"
            " cache_implementation 'static' or 'offloaded'."
        )
    cache.__class__ = checking(type(cache))
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
