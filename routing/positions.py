"""Where kept tokens stand in a layer that numbers them anew.

Shape suffixes: B batch, K kept tokens, N numbers, A kinds of angles, D width.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from routing.cache import RoutedKV
from routing.decision import KeptTokens

AT_LEAST = 1024
# Rotary modules of other types take other angles for the same number once a sequence has grown long.
FIXED = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, eq=False)
class CompactPositions:
    """Kept tokens stand at 0, 1, 2, … in their layer, whoever passed it by (gamma-MoD's code).

    No ``nn.Module``: the rotary module belongs to the decoder, which all layers share.

    Args:
        rotary: The decoder's rotary module, which turns positions into angles.
    """

    rotary: nn.Module
    _angles: dict[tuple[torch.device, torch.dtype], Tensor] = field(default_factory=dict, repr=False)

    def __call__(self, x_BTD: Tensor, entering: KeptTokens | None, held: RoutedKV | None) -> tuple[Tensor, ...]:
        """Angles of the tokens that enter (None: all), behind those that the layer holds already; (B or 1, K, …)."""
        B, T, _ = x_BTD.shape
        before = 0 if held is None else held.filled_B1()
        if T == 1 and held is not None and getattr(self.rotary, "rope_type", None) in FIXED:
            return self._known(x_BTD, before, held.slots)
        if entering is None:
            place_BK = torch.arange(T, device=x_BTD.device).expand(B, -1)
        else:
            place_BK = (entering.valid_BK.long().cumsum(1) - 1).clamp_min(0)
        behind_BK = place_BK + before
        angles: tuple[Tensor, ...] = self.rotary(x_BTD, position_ids=behind_BK)
        return angles

    def _known(self, x_B1D: Tensor, before: Tensor | int, slots: int) -> tuple[Tensor, ...]:
        """Angles of single tokens, from a table that the rotary module filled: asking it takes ten kernels a layer."""
        key = (x_B1D.device, x_B1D.dtype)
        table_NAD = self._angles.get(key)
        if table_NAD is None or len(table_NAD) <= slots:
            with torch.inference_mode(False), torch.no_grad():  # steps after this one may need gradients
                numbers_1N = torch.arange(2 * max(slots, AT_LEAST), device=x_B1D.device)[None]
                angles: tuple[Tensor, ...] = self.rotary(x_B1D.new_empty(1), position_ids=numbers_1N)
                table_NAD = self._angles[key] = torch.stack(angles, dim=2)[0]
        found_BKAD = table_NAD[None, before : before + 1] if isinstance(before, int) else table_NAD[before]
        return found_BKAD.unbind(2)


def checked(model: PreTrainedModel, by: str) -> nn.Module:
    """The rotary module of a model's decoder, where it knows one position a token.

    Raises:
        ValueError: it does not; ``by`` names the plugin.
    """
    rotary = getattr(model.get_decoder(), "rotary_emb", None)  # type: ignore[no-untyped-call]
    config = model.config.get_text_config()
    said = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    several = "mrope_section" in said or hasattr(model.base_model, "get_rope_index")
    asks = inspect.signature(rotary.forward).parameters if isinstance(rotary, nn.Module) else {}
    if not isinstance(rotary, nn.Module) or list(asks) != ["x", "position_ids"] or several:
        raise ValueError(
            f"Plugin {by!r} numbers kept tokens anew (positions: compact), and {type(model).__name__} has no rotary"
            " embedding of one position a token (M-RoPE counts three).\nAllowed: positions original here; compact with"
            " decoders like LLaMA's and Qwen2's.\nGive positions: original."
        )
    return rotary
