"""Activation checkpointing, whatever transformers calls it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def recompute_layers(model: PreTrainedModel) -> None:
    """Recomputes each layer in the backward pass; never reentrant, which drops the gradient of auxiliary losses."""
    # transformers 5.17 has only the old name, newer ones deprecate it.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
