"""How many kernels a step of decoding takes: it waits for Python, so that each one costs the same.

``python -m pytest -s tests/unit/routing/test_kernels.py`` prints the numbers.
"""

import pytest
import torch
import transformers
from packaging.version import Version
from torch.utils._python_dispatch import TorchDispatchMode

from plugins.gamma_depths import GammaDepths
from plugins.progressive_depths import ProgressiveDepths
from plugins.threshold_depths import ThresholdDepths
from routing import Between, LinearRouter, TokenKind, attach
from tests.tiny import padded, row, tiny_llava

VIEWS = (
    *("view", "slice", "select", "expand", "transpose", "unsqueeze"),
    *("aten.t.", "as_strided", "narrow", "detach", "alias", "unbind"),
)
ALL = tuple(kind for kind in TokenKind if kind is not TokenKind.PAD)
LAYERS, ROUTED = 8, Between(1, -2)
STYLE = ThresholdDepths(placement=ROUTED, routes=ALL, router=LinearRouter(std=3.0))


class Kernels(TorchDispatchMode):
    """Counts the operations that are no view."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += not any(view in str(func) for view in VIEWS)
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def kernels(plugin, rows) -> int:
    """Of a step in bf16 after a prompt of ``rows`` rows of equal length."""
    model = tiny_llava(layers=LAYERS).eval()
    if plugin is not None:
        attach(model, {"depth": plugin})
        torch.manual_seed(0)
        for parameter in model.routers.parameters():
            torch.nn.init.normal_(parameter, std=1.0)
    batch = padded([row(1, 9, seed=seed) for seed in range(rows)])
    model.bfloat16()
    cache = model(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"].bfloat16()).past_key_values
    step = {"input_ids": torch.full((rows, 1), 9), "past_key_values": cache}
    for _ in range(2):  # what is made once is made now
        model(**step)
    with Kernels() as counted:
        model(**step)
    return counted.number


@pytest.mark.parametrize("rows", [1, 8])
def test_a_layer_that_is_not_asked_takes_no_kernel_more(rows):
    assert kernels(ProgressiveDepths(), rows) <= kernels(None, rows) + 2


@pytest.mark.parametrize(("plugin", "most"), [(STYLE, 9), (GammaDepths(placement=ROUTED), 11)], ids=["style", "gamma"])
def test_a_layer_that_is_asked_takes_a_quarter_more_and_one_that_is_passed_by_fewer(plugin, most):
    dense, asked, alone = kernels(None, 8), kernels(plugin, 8), kernels(plugin, 1)
    more = (asked - dense) / (LAYERS - 2)
    if Version(transformers.__version__) < Version("5.23"):
        more -= 2  # before, keys and values were repeated for this model's groups of queries wherever a mask is read
    print(f"\n{dense / LAYERS:.0f} a dense layer, {more:.1f} more in a routed one; alone {alone / dense:.2f} of dense")
    assert more <= most
    assert alone < asked
