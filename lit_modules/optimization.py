"""AdamW with a learning rate per parameter and a cosine schedule that moves every step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, inf

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


@dataclass(frozen=True)
class Optimization:
    """AdamW; the learning rates stand in ``parts``.

    Args:
        weight_decay: Decoupled weight decay of matrices; vectors (norms, biases) have none. At least 0.
        betas: AdamW's decay rates of the two moments, each in [0, 1).
        warmup: Share of all steps over which learning rates rise linearly from 0, in [0, 1]; then a cosine to 0.
    """

    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    warmup: float = 0.03

    def __post_init__(self) -> None:
        if self.weight_decay < 0 or not 0 <= self.warmup <= 1 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(
                f"{self} cannot be.\nAllowed: weight_decay >= 0, warmup in [0, 1], both betas in [0, 1).\nOutside that,"
                " give e.g. 0.03 for warmup."
            )

    def optimizer(self, model: nn.Module, rates: Mapping[str, float]) -> Optimizer:
        """One group per learning rate and decay; the groups' names are what learning-rate monitors show."""
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if name in rates:
                decay = self.weight_decay if parameter.ndim > 1 else 0.0
                groups.setdefault((rates[name], decay), []).append(parameter)
        if not groups:
            raise ValueError(
                f"parts: no parameter trains; its rates name {sorted(set(rates.values())) or 'nothing'}. Give a part"
                " that this model has (vision, projector, language_model; routers where a plugin is enabled) a rate."
            )
        return torch.optim.AdamW(
            [
                {"params": parameters, "lr": rate, "weight_decay": decay, "name": f"lr_{rate:g}_decay_{decay:g}"}
                for (rate, decay), parameters in groups.items()
            ],
            betas=self.betas,
        )

    def schedule(self, optimizer: Optimizer, steps: float) -> LRScheduler:
        """The cosine over ``steps`` optimizer steps."""
        from transformers import get_cosine_schedule_with_warmup

        if steps == inf:
            raise ValueError(
                "The schedule needs to know how long the training is, and `trainer.max_steps` and"
                " `trainer.max_epochs` are both unlimited.\nSet one of them."
            )
        return get_cosine_schedule_with_warmup(optimizer, ceil(self.warmup * steps), int(steps))
