"""Which parameters train, and how fast."""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from math import isfinite
from typing import TYPE_CHECKING

import torch
from torch import nn

from routing.added import ROUTERS, added

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PARTS = ("vision", "projector", "language_model", "routers")


def part_of_each(model: PreTrainedModel) -> dict[str, str]:
    """The part that each parameter belongs to, by parameter name."""
    part = {id(p): "language_model" for p in _language_model(model)}
    part |= {id(p): "vision" for p in _parameters(model.get_encoder(modality="image"), but=model)}
    part |= {id(p): "routers" for p in _parameters(getattr(model, "routers", None), but=model)}
    return {name: part.get(id(p), "projector") for name, p in model.named_parameters()}


def reached_by_pictures(model: PreTrainedModel, names: Mapping[str, float]) -> list[str]:
    """Those of the trained parameters that only pictures reach."""
    return [name for name, part in part_of_each(model).items() if part in ("vision", "projector") and name in names]


def choose(model: PreTrainedModel, rates: Mapping[str, float]) -> dict[str, float]:
    """The learning rate of every parameter that trains, by name; the last entry of ``rates`` that matches decides."""
    for key, rate in rates.items():
        if not (isfinite(rate) and rate >= 0):
            raise ValueError(f"parts: {key} has learning rate {rate}; give a finite number >= 0 (0 freezes the part).")
    parts = part_of_each(model)
    chosen: dict[str, float] = {}
    for key, rate in rates.items():
        chosen |= dict.fromkeys(_matching(key, parts), rate)
    return {name: rate for name, rate in chosen.items() if rate > 0}


def check_experts_asked(model: PreTrainedModel, rates: Mapping[str, float]) -> None:
    """Refuses parts that say nothing of the experts: they would stay copies of one network, without a word.

    Raises:
        ValueError: there are experts, and no entry of ``rates`` matches a weight of theirs, not even to freeze it.
    """
    parts = part_of_each(model)
    experts = {n: parts[n] for n in sorted(added(model) & parts.keys()) if not n.startswith(ROUTERS)}
    if experts and not any(_found(key, experts) for key in rates):
        raise ValueError(
            f"parts: {', '.join(rates)} match none of the {len(experts)} weights of experts ({next(iter(experts))}, …),"
            " so that these would stay copies of the networks that they came from.\nAllowed: an entry that matches"
            " them, such as 'experts' or 'language_model'; rate 0 freezes them knowingly.\nAdd e.g. experts: 2e-5."
        )


def freeze_all_but(model: nn.Module, names: Mapping[str, float]) -> None:
    """Trained parameters become float32: bf16 AdamW at small rates leaves most weights where they were."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
        if name in names and parameter.is_floating_point():
            parameter.data = parameter.data.float()


def refuse_true_half(precision: str) -> None:
    """Refuses precisions that turn the whole model, routers included, into another one than float32."""
    if precision.endswith("-true") and not precision.startswith("32"):
        meant = {"64": "double-precise, and they are float32"}
        said = meant.get(precision[:2], "half-precise: scores tie, small steps are lost")
        raise ValueError(
            f"`trainer.precision: {precision}` would make routers and trained weights {said}.\nAllowed: 32-true,"
            " bf16-mixed, 16-mixed.\nUse bf16-mixed, which keeps float32 weights; frozen parts may have"
            " `dtype: bfloat16` in the backbone."
        )


def check_precision(model: nn.Module, *, mixed: bool) -> None:
    """Refuses what trains badly without a word, and what would fail deep inside a matrix product."""
    trained = {n: p.dtype for n, p in model.named_parameters() if p.requires_grad}
    if wrong := [f"{n} is {d}" for n, d in trained.items() if d != torch.float32]:
        raise ValueError(
            f"{len(wrong)} of {len(trained)} trained parameters are not float32 ({wrong[0]}): AdamW would round most of"
            " its steps away.\nAllowed: float32 weights, computing in bf16.\nSet `trainer.precision: bf16-mixed`."
        )
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad and p.is_floating_point()}
    if trained and not mixed and (other := frozen - {torch.float32}):
        raise ValueError(
            f"Frozen parts are {', '.join(map(str, other))}, trained parts float32, and `trainer.precision` does not"
            " mix them.\nAllowed: `trainer.precision: bf16-mixed`, or `dtype: float32` in the backbone."
        )


def _matching(key: str, parts: Mapping[str, str]) -> list[str]:
    names = _found(key, parts)
    # Without an enabled plugin there are no routers; the same config then trains the dense model.
    if names or key == "routers":
        return names
    near = get_close_matches(key, [*PARTS, *parts], n=3, cutoff=0.3) or list(parts)[:3]
    raise ValueError(
        f"parts: {key!r} matches no parameter, so nothing would train under it.\nAllowed: {', '.join(PARTS)}, or a"
        f" regular expression found in a parameter's name.\nNearest: {', '.join(near)}."
    )


def _found(key: str, parts: Mapping[str, str]) -> list[str]:
    if key in PARTS:
        return [name for name, part in parts.items() if part == key]
    return [name for name in parts if _pattern(key).search(name)]


def _pattern(key: str) -> re.Pattern[str]:
    try:
        return re.compile(key)
    except re.error as error:
        raise ValueError(
            f"parts: {key!r} is no part and no regular expression ({error}).\nAllowed: {', '.join(PARTS)}, or a"
            r" pattern such as 'layers\.3\.'."
        ) from error


def _language_model(model: PreTrainedModel) -> list[nn.Parameter]:
    modules = (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
    return [p for module in modules for p in _parameters(module, but=model)]


def _parameters(module: nn.Module | None, *, but: nn.Module) -> list[nn.Parameter]:
    # Hugging Face answers with the model itself where it has no such module.
    return [] if module is None or module is but else list(module.parameters())
