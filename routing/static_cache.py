"""A routed layer's part of a static cache."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from routing.cache import RoutedKV


class RoutedStaticKV(RoutedKV):  # type: ignore[no-untyped-call]
    """The same in memory that is taken once: as many slots as the rule's bound on the prompt and each later token need.

    It runs eagerly: what it shows to attention is the filled part, whose length is known on the host.

    Args:
        room: Slots of each row.
        length: Tokens that the whole cache is for.
    """

    is_compileable = True  # the dense layers beside it get the masks of static ones

    def __init__(self, room: int, length: int) -> None:
        super().__init__()
        self.room, self.max_cache_len = room, length
        self.stored: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        held, more = self.slots, key_states.shape[-2]
        if held + more > self.room:
            raise ValueError(
                f"A static cache for {self.max_cache_len} tokens has no room for {more} more in a routed layer of"
                f" {self.room} slots.\nAllowed: as many tokens as it was made for.\nMake a longer one (max_cache_len)."
            )
        if self.stored is None:
            self.lazy_initialization(key_states, value_states)
            self.stored = tuple(  # type: ignore[assignment]
                states.new_zeros(*states.shape[:2], self.room, states.shape[-1])
                for states in (key_states, value_states)
            )
        assert self.stored is not None
        for buffer, states in zip(self.stored, (key_states, value_states), strict=True):
            buffer[:, :, held : held + more] = states
        self.keys, self.values = (buffer[:, :, : held + more] for buffer in self.stored)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.max_cache_len, 0

    def get_max_length(self) -> int:
        return self.max_cache_len

    def reset(self) -> None:
        super().reset()
        self.stored = None

    def _rows(self, pick: Callable[[Tensor], Tensor]) -> None:
        held = self.slots
        super()._rows(pick)
        if self.stored is not None:
            keys, values = map(pick, self.stored)
            self.stored, self.keys, self.values = (keys, values), keys[:, :, :held], values[:, :, :held]
