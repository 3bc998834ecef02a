"""Random numbers for tokens that depend on nothing but who the token is: neither on padding, batch mates nor device.

Shape suffixes: B batch, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from routing.tokens import Tokens

MASK = 0xFFFFFFFF
STEPS = 1 << 30  # points of the training that draw apart


def uniform_BT(tokens: Tokens, *layers_and_seeds: int) -> Tensor:
    """A number in [0, 1) for each token, float32 (B, T): the same for the same arguments, row and point of training.

    A hash of the token's place among the real tokens of its row, of ``tokens.id_B`` (so that rows differ), of
    ``tokens.progress`` (so that steps of a training differ) and of the given numbers. Padding gets numbers too.
    """
    hashed_BT = tokens.valid_BT.long().cumsum(1)
    if tokens.id_B is not None:
        # Mixed first: else a row would draw what the row with the next number draws one place earlier.
        hashed_BT = _mixed(hashed_BT + _mixed(tokens.id_B[:, None]))
    for number in (*layers_and_seeds, round(tokens.progress * STEPS)):
        hashed_BT = _mixed((hashed_BT + _mixed_int(number)) & MASK)
    return (hashed_BT >> 8).to(torch.float32) / (1 << 24)  # 24 bits are what float32 can tell apart


def _mixed(x: Tensor) -> Tensor:
    """A bijection of 32-bit numbers in which each bit depends on all (lowbias32, Wellons 2018)."""
    x = x & MASK
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & MASK
    return x ^ (x >> 16)


def _mixed_int(number: int) -> int:
    number = (number * 2654435761 + 0x9E3779B9) & MASK
    return number ^ (number >> 15)
