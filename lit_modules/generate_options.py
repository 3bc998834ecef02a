"""What ``lit generate`` is asked on the command line, and what is wrong with it before anything is loaded."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

MARKER = "<image>"
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One question to one model.

    Args:
        model: Folder that ``lit export`` or save_pretrained wrote.
        images: Pictures, in order.
        prompt: What the user says; ``<image>`` marks may say where the pictures stand.
        system: What the system says; None leaves it to the model's chat template.
        max_new_tokens: Longest answer, in tokens, at least 1; None leaves it to the model's generation_config.json.
        temperature: 0 is greedy; above, tokens are drawn.
        seed: Of the drawing.
        overlay: PNG of what each layer kept; None draws nothing.
        device: Where it runs.
        dtype: One of ``DTYPES``.
        attention: Attention implementation.
        quiet: Whether the answer stands alone.
    """

    model: Path
    images: tuple[Path, ...]
    prompt: str
    system: str | None
    max_new_tokens: int | None
    temperature: float
    seed: int
    overlay: Path | None
    device: str
    dtype: str
    attention: str
    quiet: bool

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise ValueError("--prompt is empty.\nAllowed: words, or - for those on stdin.\nAsk something.")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"--max_new_tokens {self.max_new_tokens}.\nAllowed: at least 1.\nGive more.")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"--temperature {self.temperature:g}.\nAllowed: 0 (greedy) or more.\nTry 0.7.")
        marks, pictures = self.prompt.count(MARKER), len(self.images)
        if marks not in (0, pictures):
            raise ValueError(
                f"--prompt holds {marks} {MARKER} marks, and {pictures} --image are given.\nAllowed: a mark for each"
                " picture, or none, which puts the pictures before the words.\nGive as many of either."
            )
        self._check_overlay()

    def _check_overlay(self) -> None:
        if self.overlay is None:
            return
        if not self.images:
            raise ValueError(f"--overlay {self.overlay} without a picture.\nAllowed: with --image.\nGive one.")
        if self.overlay.suffix.lower() != ".png" or self.overlay.is_dir():
            raise ValueError(f"--overlay {self.overlay}.\nAllowed: the path of a .png file.\nGive one.")
        folder = self.overlay.parent
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            given = f"the folder {folder} " + ("cannot be written" if folder.is_dir() else "is not there")
            raise ValueError(
                f"--overlay {self.overlay}: {given}.\nAllowed: a file in a folder that can be written.\nMake the"
                " folder, or give another."
            )
        taken = {image.resolve() for image in self.images}
        if clash := [path for path in self.overlays() if path.resolve() in taken]:
            raise ValueError(f"--overlay would overwrite the picture {clash[0]}.\nAllowed: another file.\nGive one.")

    def overlays(self) -> list[Path]:
        """A file for each picture: out.png, out_1.png, …"""
        if self.overlay is None:
            return []
        more = (self.overlay.with_stem(f"{self.overlay.stem}_{n}") for n in range(1, len(self.images)))
        return [self.overlay, *more]

    @property
    def place(self) -> torch.device:
        """The device.

        Raises:
            ValueError: there is none of that name here.
        """
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            found = torch.device(self.device)
            torch.empty(0, device=found)
        except (RuntimeError, AssertionError) as error:
            said = str(error).partition("\n")[0]
            raise ValueError(
                f"--device {self.device}: {said}\nAllowed: auto, cpu, or an accelerator of this machine, such as"
                " cuda:0.\nGive one."
            ) from error
        return found
