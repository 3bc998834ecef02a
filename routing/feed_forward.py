"""A decoder's feed-forward network as matrices, whatever its model calls them: the one file with those names.

Shape suffixes: D width, F hidden width, 2F gate above up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from routing.tape import Site

GATED = (("gate_proj", "up_proj", "down_proj"),)
FUSED = (("gate_up_proj", "down_proj"),)
PLAIN = (("fc1", "fc2"), ("up_proj", "down_proj"), ("c_fc", "c_proj"), ("dense_h_to_4h", "dense_4h_to_h"))
Activation = Callable[[Tensor], Tensor]

ACTIVATIONS = ("act_fn", "activation_fn", "act")


@dataclass(frozen=True, eq=False)
class FeedForward:
    """down(act(gate x) * up x), or down(act(up x)) where there is no gate.

    Args:
        up: (2F, D), the gate's rows first, or (F, D) without a gate.
        down: (D, F).
        up_bias: (2F,) or (F,); None where the network has no biases.
        down_bias: (D,), likewise.
        gated: Whether there is a gate.
        act: The activation.
    """

    up: Tensor
    down: Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None
    gated: bool
    act: Activation

    @property
    def hidden(self) -> int:
        """F."""
        return self.down.shape[1]

    @classmethod
    def of(cls, module: nn.Module, site: Site) -> FeedForward:
        """Reads a live module, that of a site.

        Raises:
            ValueError: it is no network of two or three linear maps of these names.
        """
        for names in (*GATED, *FUSED, *PLAIN):
            linears = [getattr(module, name, None) for name in names]
            if not all(isinstance(linear, nn.Linear) for linear in linears):
                continue
            own = {name for name, child in module.named_children() if isinstance(child, nn.Linear)}
            act = next((getattr(module, name) for name in ACTIVATIONS if hasattr(module, name)), None)
            if own != set(names) or not callable(act):
                continue
            *ups, down = linears
            if not all(_is_plain(linear) for linear in linears if linear is not None):
                break
            biases = {linear.bias is not None for linear in linears if linear is not None}
            if len(biases) == 2:
                break
            up = torch.cat([linear.weight for linear in ups if linear is not None]).detach()
            assert down is not None
            if not biases.pop():
                return cls(up, down.weight.detach(), None, None, names not in PLAIN, act)
            up_bias = torch.cat([linear.bias for linear in ups if linear is not None]).detach()
            return cls(up, down.weight.detach(), up_bias, down.bias.detach(), names not in PLAIN, act)
        raise ValueError(cls._unknown(module, site, "is not known as"))

    def check_like(self, module: nn.Module, site: Site) -> None:
        """Raises ValueError where the live module, that of a site, makes something else of a few numbers than this.

        So are found norms, scales and sparse activations between the maps, which no name tells of.
        """
        if self.up.device.type == "meta":
            return
        training = module.training
        numbers_ND = torch.arange(4 * self.up.shape[1], device=self.up.device).view(4, -1)
        x_ND = (numbers_ND * numbers_ND).to(torch.float32).cos().to(self.up.dtype)
        with torch.no_grad():
            want_ND: Tensor = module.eval()(x_ND)  # no dropout
            got_ND = self(x_ND)
        module.train(training)
        apart = (got_ND.float() - want_ND.float()).norm()
        if apart > 0.05 * want_ND.float().norm():  # rounding in bf16 is a tenth of that
            raise ValueError(self._unknown(module, site, "answers otherwise than"))

    def __call__(self, x: Tensor) -> Tensor:
        """What it makes of rows of width D."""
        h = F.linear(x, self.up, self.up_bias)
        gate, up = h.chunk(2, dim=-1) if self.gated else (h, None)
        h = self.act(gate) if up is None else self.act(gate) * up
        return F.linear(h, self.down, self.down_bias)

    @staticmethod
    def _unknown(module: nn.Module, site: Site, what: str) -> str:
        children = ", ".join(f"{name}: {type(child).__name__}" for name, child in module.named_children())
        return (
            f"Plugin {site.by!r}: in layer {site.layer} stands a {type(module).__name__} of ({children}), which {what}"
            " a feed-forward network that experts could be copied from.\nAllowed: linear maps named"
            f" {', '.join('/'.join(names) for names in (*GATED, *FUSED, *PLAIN))}, all with biases or none, of numbers"
            " that are not quantised, and an activation alone between them.\nAdd its names to"
            " routing/feed_forward.py, or route other layers."
        )


def _is_plain(linear: nn.Linear) -> bool:
    """Whether its weight is the matrix that it multiplies by, and not a packed form of it."""
    weight = linear.weight
    return weight.is_floating_point() and weight.shape == (linear.out_features, linear.in_features)
