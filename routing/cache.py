"""The key-value cache of a routed layer: it holds the tokens that entered, and reports all that the model has read.

Shape suffixes: B batch, T new tokens, K of them kept, S slots held before them; 1 is a broadcast axis.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from routing.decision import KeptTokens


class RoutedKV(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values of the tokens that entered a layer, with a hole where a row filled no slot.

    Hugging Face reads the length of the sequence, and from it positions and masks, off one layer of the cache: whatever
    this layer holds, it reports the logical length, so that any layer may be routed, the first one included.
    """

    is_croppable = False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = 0
        self.valid_BS: Tensor | None = None  # None while there is no hole

    def admit(self, new: KeptTokens | None, tokens: int, *, holes: bool) -> Tensor | None:
        """Takes note of ``tokens`` more tokens, of which ``new`` enter (None: all), before their keys are stored.

        Returns the boolean mask (B, 1, K, S + K) of a step that finds keys of earlier tokens here; None where every
        query attends to every key, which is so for a single token while there is no hole. ``holes``: whether a slot of
        ``new`` may be empty, known on the host.
        """
        self.seen += tokens
        if new is None and tokens == 1 and self.valid_BS is None:  # what decoding does, in every layer at every step
            return None
        held = 0 if self.keys is None else self.keys.shape[-2]
        if new is None:
            if self.valid_BS is not None:
                self.valid_BS = torch.nn.functional.pad(self.valid_BS, (0, tokens), value=True)
        elif self.valid_BS is not None or holes:
            before = new.valid_BK.new_ones(len(new.valid_BK), held) if self.valid_BS is None else self.valid_BS
            self.valid_BS = torch.cat([before, new.valid_BK], dim=1)
        return self._mask(new, tokens, held)

    def _mask(self, new: KeptTokens | None, tokens: int, held: int) -> Tensor | None:
        single = tokens == 1 if new is None else new.index_BK.shape[1] == 1
        if single:
            return None if self.valid_BS is None else self.valid_BS[:, None, None, :]
        if new is None:
            assert self.values is not None
            place = torch.arange(tokens, device=self.values.device)
            order_BKK = (place[None, :] <= place[:, None])[None]
            valid_BS = torch.ones(1, held + tokens, dtype=torch.bool, device=place.device)
        else:
            order_BKK = new.index_BK[:, None, :] <= new.index_BK[:, :, None]
            valid_BS = torch.ones_like(new.valid_BK[:, :1]).expand(-1, held + new.index_BK.shape[1])
        valid_BS = valid_BS if self.valid_BS is None else self.valid_BS
        past_BKS = valid_BS[:, None, :held].expand(-1, order_BKK.shape[1], -1)
        own_KK = torch.eye(order_BKK.shape[1], dtype=torch.bool, device=order_BKK.device)
        new_BKK = order_BKK & valid_BS[:, None, held:] | own_KK
        return torch.cat([past_BKS, new_BKK.expand(len(past_BKS), -1, -1)], dim=2)[:, None]

    def filled_B(self) -> Tensor | int:
        """How many tokens each row holds, (B,); one number where there is no hole."""
        if self.valid_BS is not None:
            return self.valid_BS.sum(1)
        return 0 if self.keys is None else self.keys.shape[-2]

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def reset(self) -> None:
        super().reset()
        self.seen, self.valid_BS = 0, None

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError(
            "A cache with routed layers cannot be cropped: it does not know which of its slots the last tokens fill."
            " Generate without assisted decoding."
        )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.keys is not None:  # tokens were seen, and none of them may have entered
            super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._rows(lambda valid: valid.index_select(0, beam_idx.to(valid.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.keys is not None:
            super().batch_repeat_interleave(repeats)
        self._rows(lambda valid: valid.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.keys is not None:
            super().batch_select_indices(indices)
        self._rows(lambda valid: valid[indices])

    def _rows(self, pick: Callable[[Tensor], Tensor]) -> None:
        if self.valid_BS is not None:
            self.valid_BS = pick(self.valid_BS)


def routed_kv(cache: object, layer: int) -> RoutedKV | None:
    """This layer's part of a cache, made ready to hold fewer tokens than the model reads; None without a cache.

    Raises:
        ValueError: the cache stores tokens in a way that a routed layer cannot, such as in slots of fixed places.
    """
    if cache is None:
        return None
    assert isinstance(cache, Cache)
    while len(cache.layers) <= layer and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    found = cache.layers[layer]
    if isinstance(found, RoutedKV):
        return found
    if type(found) is not DynamicLayer or found.get_seq_length():
        raise ValueError(
            f"{type(cache).__name__} keeps layer {layer}, which is routed, in a {type(found).__name__}, empty or not."
            " Routed layers need a DynamicCache that they have filled themselves: pass past_key_values=None,"
            " cache_implementation='dynamic', or use_cache=False."
        )
    cache.layers[layer] = made = RoutedKV()
    return made
