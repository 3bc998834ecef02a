"""Notes about filled slots, in whatever order they are written and read: always what a plain list of columns says."""

import random

import pytest
import torch

from routing.filled import SPARE, Filled

ROWS = 5


def columns(n, seed):
    return torch.rand(ROWS, n, generator=torch.Generator().manual_seed(seed)) > 0.4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(4))
def test_notes_are_what_was_written_whoever_reads_what_in_between(seed, dtype):
    dice, want = random.Random(seed), columns(3, seed)
    filled = Filled(want.clone())
    for step in range(3 * SPARE):
        more = dice.choice([1, 1, 1, 1, 1, 4])
        new = None if dice.random() < 0.3 else columns(more, 100 * seed + step)
        with torch.set_grad_enabled(dice.random() < 0.1), torch.inference_mode(dice.random() < 0.1):
            filled.add(new, more)
            want = torch.cat([want, torch.ones(ROWS, more, dtype=torch.bool) if new is None else new], 1)
            if dice.random() < 0.9:
                bias = filled.bias(dtype)
                assert bias.dtype is dtype and bias.stride(0) % 8 == 0
                assert torch.equal(bias[:, 0, 0] == 0, want) and bias.min() in (0, torch.finfo(dtype).min)
            if dice.random() < 0.2:
                assert torch.equal(filled.valid_BS, want)
            if dice.random() < 0.5:
                assert torch.equal(filled.count_B1(), want.sum(1, keepdim=True))
    assert filled.slots == want.shape[1] and torch.equal(filled.valid_BS, want)


def test_what_autograd_may_have_saved_is_not_written_to():
    filled = Filled(columns(3, 0))
    filled.add(columns(1, 1), 1)
    bias = filled.bias(torch.float32)
    version, before = bias._version, bias.clone()
    filled.add(columns(1, 2), 1)
    filled.bias(torch.float32)
    assert bias._version == version and torch.equal(bias, before)
