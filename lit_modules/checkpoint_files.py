"""Checkpoints on disk: whole or not at all."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.load import _load_distributed_checkpoint
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn


class WholeCheckpoints(TorchCheckpointIO):
    """Writes beside the place and renames, so that a killed process or a full disk never leaves half a checkpoint."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Writes one; ``path`` may also be a URL, which Lightning knows how to write.

        Raises:
            OSError: there is no room, or no permission; what was there before is untouched.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        partial = path.with_name(f"{path.name}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except (OSError, RuntimeError) as error:  # torch's writer wraps what the disk says
            raise OSError(
                f"The checkpoint {path} could not be written: {first_line(error)} ({free(path)} free).\nEarlier"
                " checkpoints are whole and stay.\nMake room, or give another `trainer.logger.init_args.save_dir`, and"
                " resume with `--ckpt_path`."
            ) from error
        finally:
            partial.unlink(missing_ok=True)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Reads one.

        Raises:
            ValueError: it is cut short, or no checkpoint, or holds objects, which could run code when they are loaded.
        """
        try:
            if Path(str(path)).is_dir():
                return unsharded(Path(path))
            loaded = super().load_checkpoint(path, *args, **kwargs)
        except (pickle.UnpicklingError, EOFError) as error:
            raise ValueError(
                f"{path} is no checkpoint of plain tensors and values.\nAllowed: checkpoints that `lit fit` wrote;"
                " objects are not loaded, because they can run code.\nGive another `ckpt_path`."
            ) from error
        except (RuntimeError, OSError) as error:
            if "PytorchStreamReader" not in str(error) and getattr(error, "errno", None) != errno.EINVAL:
                raise
            raise ValueError(
                f"{path} is cut short or damaged: {first_line(error)}\nAllowed: a whole checkpoint.\nGive an earlier"
                f" one of {Path(path).parent} as `ckpt_path`."
            ) from error
        if not isinstance(loaded, dict) or not {"state_dict", "pytorch-lightning_version"} <= loaded.keys():
            raise ValueError(
                f"{path} holds {type(loaded).__name__} without 'state_dict' and 'pytorch-lightning_version'.\nAllowed:"
                " checkpoints that `lit fit` wrote. Bare weights belong into a backbone's folder.\nGive another"
                " `ckpt_path`."
            )
        return loaded


def unsharded(folder: Path) -> dict[str, Any]:
    """A checkpoint that many processes wrote into a folder, as one process would have written it.

    Raises:
        ValueError: the folder is not whole: its writers were stopped, or it is none of theirs.
    """
    check_whole(folder)
    checkpoint = _load_distributed_checkpoint(folder)
    names = sorted(name for name in checkpoint if name.startswith("optimizer_") and name != "optimizer_states")
    return {**checkpoint, "optimizer_states": [by_place(checkpoint.pop(name)) for name in names]}


def check_whole(folder: Path) -> None:
    """Refuses a sharded checkpoint whose writers were stopped, and any other folder."""
    if missing := [name for name in (".metadata", "meta.pt") if not (folder / name).is_file()]:
        raise ValueError(
            f"{folder} is no whole checkpoint: {' and '.join(missing)}, written last, not there.\nAllowed: a folder"
            " that a sharded `lit fit` finished, or a checkpoint file.\nGive an earlier one as `ckpt_path`."
        )


def by_place(optimizer: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's state under the places of its parameters, which a sharded one has under their names."""
    place = {name: n for n, name in enumerate(name for group in optimizer["param_groups"] for name in group["params"])}
    groups = [{**group, "params": [place[name] for name in group["params"]]} for group in optimizer["param_groups"]]
    return {"state": {place[name]: state for name, state in optimizer["state"].items()}, "param_groups": groups}


def first_line(error: BaseException) -> str:
    """What an error says, without its traceback."""
    cause = error.__context__ if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError) else error
    return (str(cause).strip() or type(cause).__name__).splitlines()[0]


def free(path: Path) -> str:
    """Room left where a file would go."""
    folder = next(each for each in path.resolve().parents if each.is_dir())
    return f"{shutil.disk_usage(folder).free / 2**20:,.0f} MiB"


def found(path: str) -> str:
    """``path``, or the newest checkpoint beside it where ``last.ckpt`` lost what it pointed to when a run was killed.

    Raises:
        ValueError: there is nothing to load.
    """
    wanted = Path(path)
    if wanted.is_dir():
        check_whole(wanted)
    if wanted.exists() or "://" in path or not wanted.suffix:
        return path
    beside = [each for each in wanted.parent.glob("*.ckpt") if each.exists() and each.name != wanted.name]
    if wanted.stem.startswith("last") and beside:
        newest = max(beside, key=lambda each: each.stat().st_mtime)
        rank_zero_warn(f"{wanted} is not there; its run was stopped while it was renewed. Going on from {newest}.")
        return str(newest)
    raise ValueError(
        f"ckpt_path={path} does not exist.\nAllowed: a file that `lit fit` wrote under its run's `checkpoints`"
        + (f", such as {sorted(map(str, beside))[0]}" if beside else "")
        + ".\nGive one of them, or leave out `ckpt_path`."
    )
