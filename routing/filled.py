"""Which slots of a routed layer's cache hold a token, in the forms that attention and positions read.

Shape suffixes: B batch, S slots, K new ones; 1 is a broadcast axis.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from routing.gather import like_model

SPARE = 64  # columns, so that most steps need no kernel to make room


class Filled:
    """Which slots of each row hold a token, and which are holes; in a step of decoding every row gets one more.

    It is kept once: as a mask, or as what is added to attention's scores once somebody has asked for that. A step then
    writes its column with one kernel, and with none where all of its tokens enter.

    Args:
        valid_BS: True at slots that hold a token.
    """

    def __init__(self, valid_BS: Tensor) -> None:
        self.slots = valid_BS.shape[1]
        self._mask_BS = valid_BS  # with columns to spare, which are True; out of date where a bias is kept
        self._bias_B11S: Tensor | None = None
        self._spare_are_holes = False  # of the bias
        self._count_B1: Tensor | None = None

    @property
    def valid_BS(self) -> Tensor:
        """False at holes."""
        if self._bias_B11S is not None:
            return self._bias_B11S[:, 0, 0, : self.slots] == 0
        return self._mask_BS[:, : self.slots]

    @property
    def biased(self) -> bool:
        """Whether somebody has asked for a bias, and nobody for a mask since."""
        return self._bias_B11S is not None

    def count_B1(self) -> Tensor:
        """How many tokens each row holds."""
        if self._count_B1 is None:
            self._count_B1 = self.valid_BS.sum(1, keepdim=True)
        return self._count_B1

    def add(self, valid_BK: Tensor | None, more: int) -> None:
        """Takes note of ``more`` slots in each row; all of them hold a token where nothing else is said."""
        self.slots += more
        if self._count_B1 is not None:
            self._count_B1 = None if more > 1 else self._count_B1 + (1 if valid_BK is None else valid_BK)
        bias = self._bias_B11S
        kept = valid_BK is not None and _is_kept(self._mask_BS if bias is None else bias)
        if bias is not None and more == 1 and not kept:
            self._add_to_bias(bias, valid_BK)
        else:
            self._add_to_mask(valid_BK, more, kept)

    def _add_to_bias(self, bias_B11S: Tensor, valid_B1: Tensor | None) -> None:
        last, holes = self.slots - 1, valid_B1 is not None
        if self.slots > bias_B11S.shape[3] or holes != self._spare_are_holes:
            value = torch.finfo(bias_B11S.dtype).min if holes else 0.0
            bias_B11S = self._bias_B11S = F.pad(bias_B11S[..., :last], (0, self._room() - last), value=value)
            self._spare_are_holes = holes
        if valid_B1 is not None:
            bias_B11S.narrow(3, last, 1).masked_fill_(valid_B1.view(-1, 1, 1, 1), 0.0)

    def _add_to_mask(self, valid_BK: Tensor | None, more: int, kept: bool) -> None:
        if self._bias_B11S is not None:
            self._mask_BS, self._bias_B11S = self._bias_B11S[:, 0, 0, : self.slots - more] == 0, None
        missing = self.slots - self._mask_BS.shape[1]
        if missing > 0:
            self._mask_BS = F.pad(self._mask_BS, (0, missing + self._room() - self.slots), value=True)
        elif kept:
            self._mask_BS = self._mask_BS.clone()
        if valid_BK is not None:
            self._mask_BS[:, self.slots - more : self.slots] = valid_BK

    def _room(self) -> int:
        """Columns to take; attention kernels read a mask as it lies where its rows begin at multiples of 8."""
        return self.slots + SPARE - (self.slots + SPARE) % 8

    def bias(self, dtype: torch.dtype) -> Tensor:
        """What is added to the scores of a row's keys, 0 or at a hole the least number; (B, 1, 1, S)."""
        if self._bias_B11S is None or self._bias_B11S.dtype is not dtype:
            mask_BS = self._mask_BS if self._bias_B11S is None else self.valid_BS
            self._bias_B11S, self._spare_are_holes = like_model(mask_BS[:, None, None], "eager", dtype), False
        return self._bias_B11S.narrow(3, 0, self.slots)


def _is_kept(made: Tensor) -> bool:
    """Whether nobody may write to it: autograd may have saved it, or inference mode made it and is over."""
    return torch.is_grad_enabled() or (made.is_inference() and not torch.is_inference_mode_enabled())
