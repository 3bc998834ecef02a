"""What a batch holds for the model, and what for the trainer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

# Everything else that is a tensor (pixel_values, image_sizes, …) is the model's.
OURS = {"attention_mask", "labels", "positions_N", "targets_N"}


def model_inputs(batch: Mapping[str, object], *, mask: bool = False, blank: bool = False) -> dict[str, Tensor]:
    """Keyword arguments of the forward; ``mask`` only for left-padded prompts, ``blank`` for images without content."""
    left_out = OURS - {"attention_mask"} if mask else OURS
    inputs = {k: v for k, v in batch.items() if isinstance(v, Tensor) and k not in left_out}
    if blank and "pixel_values" in inputs:
        # Pixels are normalised: zero is the mean colour.
        inputs["pixel_values"] = torch.zeros_like(inputs["pixel_values"])
    return inputs


def number(batch: Mapping[str, object], name: str) -> int:
    """A count that the collator knows on the host."""
    value = batch.get(name)
    if not isinstance(value, int):
        raise ValueError(
            f"The training batch has no number {name!r} (got {value!r}); it has {', '.join(map(str, batch))}.\nUse a"
            " datamodule that counts the supervised tokens and batches of each optimizer step, as those"
            " in datamodules/ do."
        )
    return value
