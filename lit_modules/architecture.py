"""Whether a checkpoint belongs to a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

KEY = "architecture"
Shapes = Mapping[str, list[int]]


def shapes(state: Mapping[str, object]) -> dict[str, list[int]]:
    """Shape of every tensor; stored in checkpoints, because a sharded one holds no tensors where hooks can see them."""
    return {name: list(tensor.shape) for name, tensor in state.items() if isinstance(tensor, Tensor)}


def check_folder(path: object, model: Shapes) -> None:
    """The same for a sharded checkpoint, which is a folder; anything else is passed by."""
    metadata = Path(path) / "meta.pt" if isinstance(path, str | Path) else None
    if metadata is not None and metadata.is_file():
        check(torch.load(metadata, weights_only=True, map_location="cpu"), model)


# Arguments of a backbone that say where weights come from and how they compute, not what they mean.
ELSEWHERE = {"folder", "name", "path", "revision", "dtype", "attention"}


def check_backbone(checkpoint: Mapping[str, object], spec: Mapping[str, object]) -> None:
    """Refuses a checkpoint of the same shapes whose backbone means something else by them, such as other heads."""
    stored = cast(Mapping[str, object], checkpoint.get("hyper_parameters", {})).get("backbone")
    if not isinstance(stored, Mapping) or stored.get("class_path") != spec["class_path"]:
        return
    was, now = (cast(Mapping[str, object], s["init_args"]) for s in (stored, spec))
    _refuse_others(was, now, ELSEWHERE)


# Fields of a Hugging Face config that say how weights are stored, made or run, not what they mean.
NO_MATTER = {"dtype", "torch_dtype", "_name_or_path", "architectures", "transformers_version", "use_cache"}
NO_MATTER |= {"attn_implementation", "_attn_implementation", "pad_token_id", "bos_token_id", "eos_token_id"}
NO_MATTER |= {"initializer_range", "initializer_factor", "attention_dropout", "output_attentions"}
NO_MATTER |= {"output_hidden_states", "return_dict", "id2label", "label2id", "problem_type"}


def check_config(stored: Mapping[str, object], model: Mapping[str, object]) -> None:
    """The same for an exported folder, by its config.json and that of the model."""
    was, now = _flat(stored), _flat(model)
    _refuse_others(was, now, {name for name in was if name.rpartition(".")[2] in NO_MATTER})


def _flat(config: Mapping[str, object], above: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{above}{key}.") if isinstance(value, Mapping) else {f"{above}{key}": value}
    return flat


def _refuse_others(was: Mapping[str, object], now: Mapping[str, object], but: set[str]) -> None:
    differ = [k for k in sorted(was.keys() & now.keys()) if k not in but and was[k] != now[k]]
    if differ:
        raise ValueError(
            "The checkpoint was trained with another backbone: "
            + ", ".join(f"{key} {was[key]} (now {now[key]})" for key in differ)
            + ".\nAllowed: the same values; they would load, and mean something else.\nUse the config.yaml beside that"
            " run's checkpoints, or leave out `ckpt_path`."
        )


def check(checkpoint: Mapping[str, object], model: Shapes) -> None:
    """Refuses a checkpoint whose tensors have other names or shapes than the model's."""
    stored = cast(Shapes | None, checkpoint.get(KEY))
    if stored is None:
        stored = shapes(cast(Mapping[str, object], checkpoint.get("state_dict", {})))
    if not stored or not (lines := differences(stored, model)):
        return
    raise ValueError(
        "The checkpoint holds another architecture than the configured one. Tensors:\n  "
        + "\n  ".join(lines)
        + "\nAllowed: the backbone and plugins that it was trained with; other capacities and data are fine.\n"
        "Use the config.yaml beside that run's checkpoints, or leave out `ckpt_path`."
    )


def differences(stored: Shapes, model: Shapes) -> list[str]:
    """At most three lines that name the first few tensors on one side only, or of another shape."""
    named = {
        "only in the checkpoint": sorted(stored.keys() - model.keys()),
        "only in the model": sorted(model.keys() - stored.keys()),
        "of another shape": [
            f"{name} {stored[name]} against {model[name]}"
            for name in sorted(stored.keys() & model.keys())
            if stored[name] != model[name]
        ],
    }
    return [
        f"{len(names)} {what}: {', '.join(names[:2])}{', …' * (len(names) > 2)}"
        for what, names in named.items()
        if names
    ]
