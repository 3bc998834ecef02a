"""What ``generate`` may be asked of a routed model, and what it tells the gates."""

from __future__ import annotations

from torch import nn


class Generating(nn.Module):
    """Mixin over a model's class."""
