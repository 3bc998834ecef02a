"""A routed model on disk: its configuration says how it is routed."""

from __future__ import annotations

from torch import nn


class Saving(nn.Module):
    """Mixin over a model's class."""
