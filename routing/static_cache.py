"""A routed layer's part of a static cache.

Shape suffixes: B batch, S slots; 1 is a broadcast axis.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from routing.cache import RoutedKV
from routing.gather import like_model


@dataclass(frozen=True, eq=False)
class OnDevice:
    """What a compiled step reads and writes, always in the same place.

    Args:
        at_1: The slot of the next token.
        read: Tokens that the model has read; no axis.
        open_B11S: True at slots that hold a token.
    """

    at_1: Tensor
    read: Tensor
    open_B11S: Tensor


class RoutedStaticKV(RoutedKV):  # type: ignore[no-untyped-call]
    """The same in memory that is taken once: as many slots as the rule's bound on the prompt and each later token need.

    What runs eagerly is shown the filled part, whose length is known on the host. A compiled step, of one token of each
    row that enters unasked, works on all slots, and finds on the device which of them is next and which hold a token,
    so that all steps run one graph; whoever calls it says so before (``ready``) and after (``stepped``).

    Attributes:
        stepping: Whether such a step runs now.
    """

    is_compileable = True

    def __init__(self, room: int, length: int) -> None:
        super().__init__()
        self.room, self.max_cache_len, self.stepping = room, length, False

    @property
    def slots(self) -> int:
        return self.used

    @property
    def keys(self) -> Tensor | None:
        """Those of slots that were taken, (B, heads, S, width); None before any was."""
        return None if self.stored is None else self.stored[0].narrow(2, 0, self.used)

    @keys.setter
    def keys(self, none: Tensor | None) -> None:
        self._empty(none)

    @property
    def values(self) -> Tensor | None:
        """The values of the same slots."""
        return None if self.stored is None else self.stored[1].narrow(2, 0, self.used)

    @values.setter
    def values(self, none: Tensor | None) -> None:
        self._empty(none)

    def _empty(self, none: Tensor | None) -> None:
        assert none is None, "what is stored has its own memory"
        self.stored: tuple[Tensor, Tensor] | None = None
        self._device: OnDevice | None = None
        self.used, self._told = 0, False  # told: whether the device knows what the host does

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if self.stepping:
            return self._update_all(key_states, value_states)
        held, more = self.used, key_states.shape[-2]
        self._check_room(more)
        if self.stored is None:
            self.lazy_initialization(key_states, value_states)
        keys, values = self._buffers()
        keys[:, :, held : held + more], values[:, :, held : held + more] = key_states, value_states
        self.used = held + more
        return keys[:, :, : self.used], values[:, :, : self.used]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        keys, values = (
            states.new_zeros(*states.shape[:2], self.room, states.shape[-1]) for states in (key_states, value_states)
        )
        self.stored, self.is_initialized = (keys, values), True
        at_1, read = (torch.zeros(shape, dtype=torch.long, device=keys.device) for shape in (1, ()))
        open_B11S = torch.zeros(len(keys), 1, 1, self.room, dtype=torch.bool, device=keys.device)
        self._device = OnDevice(at_1, read, open_B11S)

    def _buffers(self) -> tuple[Tensor, Tensor]:
        assert self.stored is not None
        return self.stored

    def _check_room(self, more: int) -> None:
        if self.used + more > self.room:
            raise ValueError(
                f"A static cache for {self.max_cache_len} tokens has no room for {more} more in a routed layer of"
                f" {self.room} slots.\nAllowed: as many tokens as it was made for.\nMake a longer one (max_cache_len)."
            )

    def _read(self, tokens: int) -> None:
        super()._read(tokens)
        self._told = False

    def ready(self) -> bool:
        """Tells the device what the host knows; False where the next step cannot be a compiled one."""
        if self._device is None:
            return False
        self._check_room(1)
        if not self._told:
            self._tell(self._device)
        self._told = False  # until the step is done: one that breaks off leaves the device nobody knows where
        return True

    def _tell(self, device: OnDevice) -> None:
        for tensor in (*self._buffers(), device.at_1, device.read, device.open_B11S):
            torch._dynamo.mark_static_address(tensor)  # CUDA graphs read and write it where it lies
        device.at_1.fill_(self.used)
        device.read.fill_(self.seen)
        valid_BS = self.valid_BS
        device.open_B11S.fill_(False)[..., : self.used] = True if valid_BS is None else valid_BS[:, None, None]

    def stepped(self) -> None:
        """Takes note of what a compiled step did."""
        self._read(1)
        self.used, self._told = self.used + 1, True
        if self._filled is not None:
            self._filled.add(None, 1)

    def step(self, attention: Callable[[], str], dtype: torch.dtype) -> Tensor | None:
        if not self.stepping:
            return super().step(attention, dtype)
        assert self._device is not None
        self._device.open_B11S.index_fill_(3, self._device.at_1, True)
        self._device.read.add_(1)
        return like_model(self._device.open_B11S, attention(), dtype)

    def _update_all(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        (keys, values), device = self._buffers(), self._device
        assert device is not None
        keys.index_copy_(2, device.at_1, key_states)
        values.index_copy_(2, device.at_1, value_states)
        device.at_1.add_(1)
        return keys, values

    def get_seq_length(self) -> int:
        if not self.stepping:
            return self.seen
        assert self._device is not None
        return self._device.read  # type: ignore[return-value]  # as transformers' own static layers do

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.max_cache_len, 0

    def get_max_length(self) -> int:
        return self.max_cache_len

    def _keep(self, slots: int) -> None:
        self.used, self._told = min(slots, self.used), False
        if self.valid_BS is not None:
            self.valid_BS = self.valid_BS[:, :slots]

    def _stored_rows(self, pick: Callable[[Tensor], Tensor]) -> None:
        self._told = False
        if self.stored is None:
            return
        picked = tuple(map(pick, self.stored))
        if picked[0].shape != self.stored[0].shape:
            self.lazy_initialization(*picked)
            assert self.stored is not None
        for buffer, rows in zip(self.stored, picked, strict=True):
            buffer.copy_(rows)
