"""Logits only at the positions that somebody reads.

Shape suffixes: B batch, T tokens, N positions, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def logits_only_at(model: PreTrainedModel, positions_N: Tensor) -> Iterator[None]:
    """Inside, ``model(...).logits`` is (N, V), for the flat positions b * T + t; values and gradients stay the same.

    A hook on the output embeddings rather than a call of the inner model, so that the root's hooks (FSDP) and each
    model's own scaling of logits stay in play.
    """

    def gather(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        (x_BTD,) = inputs
        return (x_BTD.flatten(0, 1).index_select(0, positions_N),)

    handle = model.get_output_embeddings().register_forward_pre_hook(gather)
    try:
        yield
    finally:
        handle.remove()
