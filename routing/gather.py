"""Cutting a decoder layer's inputs down to the tokens that enter it: the one place that knows their layouts.

Shape suffixes: B batch, T tokens, K kept tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def take(x: Tensor, index_BK: Tensor) -> Tensor:
    """The kept tokens of (B or 1, T, ...): (B, K, ...)."""
    x = x.expand(index_BK.shape[0], *x.shape[1:])
    index = index_BK.reshape(*index_BK.shape, *[1] * (x.ndim - 2))
    return x.gather(1, index.expand(-1, -1, *x.shape[2:]))


def take_mask(mask: Tensor | None, index_BK: Tensor, valid_BK: Tensor) -> Tensor | None:
    """The model's attention mask at the kept queries and keys.

    None stays None: kept tokens stand in sequence order with invalid slots last, so plain causal attention is still
    right, and the fast kernels still apply. Masks are (B or 1, T) for flash attention, else (B or 1, 1, T, T), boolean
    (True attends) or additive.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise ValueError(
            f"Routed layers cannot read an attention mask of type {type(mask).__name__}; load the model with"
            f" attention 'sdpa', 'eager' or 'flash_attention_2'."
        )
    mask = mask.expand(index_BK.shape[0], *mask.shape[1:])
    if mask.ndim == 2:
        return mask.gather(1, index_BK) * valid_BK.to(mask.dtype)
    index_B1K1, index_B11K = index_BK[:, None, :, None], index_BK[:, None, None, :]
    rows = mask.gather(2, index_B1K1.expand(-1, mask.shape[1], -1, mask.shape[3]))
    cells = rows.gather(3, index_B11K.expand(-1, mask.shape[1], index_BK.shape[1], -1))
    # An invalid slot is nobody's key but its own, so that its softmax is finite.
    allowed = valid_BK[:, None, None, :] | (index_B1K1 == index_B11K)
    return cells & allowed if mask.dtype is torch.bool else cells.masked_fill(~allowed, torch.finfo(mask.dtype).min)


def like_model(mask_B1KS: Tensor, attention: str, dtype: torch.dtype) -> Tensor:
    """A boolean mask in the form that an attention implementation reads.

    Raises:
        ValueError: an implementation that reads neither masks of queries and keys nor masks of keys.
    """
    if attention == "eager":
        return torch.zeros(mask_B1KS.shape, dtype=dtype, device=mask_B1KS.device).masked_fill(
            ~mask_B1KS, torch.finfo(dtype).min
        )
    if attention == "sdpa":
        return mask_B1KS
    if attention.startswith("flash") and mask_B1KS.shape[2] == 1:
        return mask_B1KS[:, 0, 0]
    raise ValueError(
        f"Routed layers cannot read several tokens behind a cache under attention {attention!r}: use 'sdpa' or 'eager',"
        " or pass use_cache=False."
    )
