"""The key-value cache of a routed layer: it holds the tokens that entered, and reports all that the model has read.

Shape suffixes: B batch, T new tokens, K of them kept, S slots held before them; 1 is a broadcast axis.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from routing.decision import KeptTokens
from routing.filled import Filled
from routing.gather import like_model


@dataclass(eq=False, slots=True)
class Admission:
    """Tokens that came to a layer together and of which not all got a slot; all others have one slot each.

    Args:
        start: Tokens that the model had read before.
        end: Tokens that it had read then.
        before: Slots of the layer before.
        after: Slots of the layer then.
        index_BK: Places of those with a slot among the new tokens, invalid ones last; None if nobody has one.
        ranked_BT: True at the tokens that were ranked among each other, where the rule does that.
    """

    start: int
    end: int
    before: int
    after: int
    index_BK: Tensor | None
    ranked_BT: Tensor | None = None


class RoutedKV(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values of the tokens that entered a layer, with a hole where a row filled no slot.

    Hugging Face reads the length of the sequence, and from it positions and masks, off one layer of the cache: whatever
    this layer holds, it reports the logical length, so that any layer may be routed, the first one included.
    """

    is_croppable = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = 0
        self._filled: Filled | None = None  # None while there is no hole
        self._admissions: list[Admission] = []
        self.densely: bool | None = None  # whether the whole model is, in each step after this cache; if that is known

    @property
    def valid_BS(self) -> Tensor | None:
        """False at holes, bool (B, S), what was admitted last included; None while there is no hole."""
        return None if self._filled is None else self._filled.valid_BS

    @valid_BS.setter
    def valid_BS(self, valid_BS: Tensor | None) -> None:
        self._filled = None if valid_BS is None else Filled(valid_BS)

    @property
    def slots(self) -> int:
        """How many each row has."""
        return 0 if self.keys is None or self.keys.ndim < 4 else self.keys.shape[-2]

    def admit(
        self, new: KeptTokens | None, tokens: int, *, holes: bool = False, ranked_BT: Tensor | None = None
    ) -> None:
        """Takes note of ``tokens`` more tokens, of which ``new`` enter (None: all), before their keys are stored.

        Args:
            new: Those that enter.
            tokens: How many come.
            holes: Whether a slot of ``new`` may be empty, known on the host.
            ranked_BT: True at those that were ranked among each other, if any were.
        """
        self._read(tokens)
        slots, more = self.slots, tokens if new is None else new.index_BK.shape[1]
        if self._filled is None and holes:
            assert new is not None
            self._filled = Filled(new.valid_BK.new_ones(len(new.valid_BK), slots))
        if self._filled is not None:
            self._filled.add(None if new is None else new.valid_BK, more)
        if new is not None and tokens > 1:
            after = slots + more
            start = self.seen - tokens
            self._admissions.append(Admission(start, self.seen, slots, after, new.index_BK, ranked_BT))

    def _read(self, tokens: int) -> None:
        self.seen += tokens

    def pass_by(self, tokens: int) -> None:
        """Takes note of tokens none of which enters, nor could have if fewer of them had come."""
        start = self.seen
        self._read(tokens)
        last = self._admissions[-1] if self._admissions else None
        if last is not None and last.end == start and last.index_BK is None:
            start = self._admissions.pop().start
        self._admissions.append(Admission(start, self.seen, self.slots, self.slots, None))

    def mask(self, new: KeptTokens | None, x_BTD: Tensor, attention: Callable[[], str]) -> Tensor | None:
        """Whom the tokens that were just admitted attend to, of ``x_BTD``: valid ones before them, and themselves.

        As that attention implementation reads it; None where every query attends to every key, which is so for a single
        token while there is no hole, or where plain causal attention says the same.
        """
        if (x_BTD.shape[1] if new is None else new.index_BK.shape[1]) == 1:
            return self._of_a_token(attention, x_BTD.dtype)
        held, name, device = self.slots, attention(), x_BTD.device
        if not held and self._filled is None and name != "eager":  # which takes no mask for every query to every key
            return None
        index_BK = torch.arange(x_BTD.shape[1], device=device)[None] if new is None else new.index_BK
        order_BKK = index_BK[:, None, :] <= index_BK[:, :, None]
        valid_BS = self.valid_BS
        if valid_BS is None:
            slots = held + index_BK.shape[1]
            valid_BS = torch.ones(len(index_BK), slots, dtype=torch.bool, device=device)
        past_BKS = valid_BS[:, None, :held].expand(-1, order_BKK.shape[1], -1)
        own_KK = torch.eye(order_BKK.shape[1], dtype=torch.bool, device=device)
        new_BKK = order_BKK & valid_BS[:, None, held:] | own_KK
        mask_B1KS = torch.cat([past_BKS, new_BKK.expand(len(past_BKS), -1, -1)], dim=2)[:, None]
        return like_model(mask_B1KS, name, x_BTD.dtype)

    def step(self, attention: Callable[[], str], dtype: torch.dtype) -> Tensor | None:
        """Takes note of a token of each row that enters unasked: ``admit`` and ``mask`` at once."""
        self._read(1)
        if self._filled is None:
            return None
        self._filled.add(None, 1)
        return self._of_a_token(attention, dtype)

    def _of_a_token(self, named: Callable[[], str], dtype: torch.dtype) -> Tensor | None:
        if self._filled is None:
            return None
        if not self._filled.biased and (attention := named()) not in ("eager", "sdpa"):
            return like_model(self._filled.valid_BS[:, None, None], attention, dtype)
        return self._filled.bias(dtype)

    def filled_B(self) -> Tensor | int:
        """How many tokens each row holds, (B,); one number where there is no hole."""
        filled = self.filled_B1()
        return filled[:, 0] if isinstance(filled, Tensor) else filled

    def filled_B1(self) -> Tensor | int:
        """The same, (B, 1)."""
        return self.slots if self._filled is None else self._filled.count_B1()

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def reset(self) -> None:
        super().reset()
        self.keys = self.values = None
        self.is_initialized = False
        self.seen, self.valid_BS, self._admissions = 0, None, []

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raises ValueError for a crop of tokens that others were ranked with, and perhaps passed by for."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop({tokens_to_remove}) of a cache with routed layers.\nAllowed: minus the number of tokens that are"
                f" to be forgotten.\nGive crop({tokens_to_remove - self.seen}) to keep {tokens_to_remove}."
            )
        seen = max(self.seen + tokens_to_remove, 0)
        last = next((each for each in reversed(self._admissions) if each.start < seen < each.end), None)
        if last is None or last.ranked_BT is None or not bool(last.ranked_BT[:, seen - last.start :].any()):
            return
        ranked = last.ranked_BT.any(0).nonzero().max().item() + 1
        raise ValueError(
            f"crop to {seen} tokens takes away some that were ranked with others, which might have entered in their"
            f" place.\nAllowed: to {last.start + ranked} tokens at least, or to {last.start} at most.\nRead what is"
            " left anew."
        )

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last tokens, a negative number of them, whether they got a slot here or not.

        Where a part of the tokens that came together goes, the device is asked how many slots that leaves.
        """
        seen = max(self.seen + int(tokens_to_remove), 0)  # of transformers 5.17 it is a tensor
        left = [each for each in self._admissions if each.start < seen]
        if left and seen < left[-1].end:
            left[-1] = self._cut(left[-1], seen)
        self.seen, self._admissions = seen, left
        self._keep(left[-1].after + seen - left[-1].end if left else seen)

    def _cut(self, last: Admission, seen: int) -> Admission:
        """An admission less its tokens that are no longer seen; slots behind those of the fullest row are given up."""
        if last.index_BK is None:
            return replace(last, end=seen)
        stays = seen - last.start
        stay_BK = last.index_BK < stays
        if self.valid_BS is not None:
            stay_BK &= self.valid_BS[:, last.before : last.after]
        counts = stay_BK.sum(1).tolist()
        K = max(counts)
        if self.valid_BS is not None or min(counts) < K:
            before = stay_BK.new_ones(len(stay_BK), last.before)
            before = before if self.valid_BS is None else self.valid_BS[:, : last.before]
            self.valid_BS = torch.cat([before, stay_BK[:, :K]], dim=1)
        return replace(last, end=seen, after=last.before + K, index_BK=last.index_BK[:, :K])

    def _keep(self, slots: int) -> None:
        """Gives up all slots but the first ones."""
        if self.slots:
            self.keys, self.values = self.keys[..., :slots, :], self.values[..., :slots, :]  # type: ignore[index]
        if self.valid_BS is not None:
            self.valid_BS = self.valid_BS[:, :slots]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rows(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._rows(lambda rows: rows[indices])

    def _rows(self, pick: Callable[[Tensor], Tensor]) -> None:
        self._stored_rows(pick)
        if self.valid_BS is not None:
            self.valid_BS = pick(self.valid_BS)
        self._admissions = [
            each if each.index_BK is None else replace(each, index_BK=pick(each.index_BK)) for each in self._admissions
        ]

    def _stored_rows(self, pick: Callable[[Tensor], Tensor]) -> None:
        if self.keys is not None and self.keys.ndim == 4:  # tokens were seen, and none of them may have entered
            self.keys, self.values = pick(self.keys), pick(self.values)  # type: ignore[arg-type]
