"""What choosing layers leaves in a folder: numbers, a picture, and a config that places a plugin there."""

from __future__ import annotations

import json
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FRAGMENT = "layers.yaml"


@dataclass(frozen=True)
class LayerFiles:
    """A folder, and the name of what is measured.

    Args:
        folder: Where the files go; made if it is not there.
        name: Stem of the numbers' and the picture's files.
    """

    folder: Path
    name: str

    def open(self) -> None:
        """Makes the folder and tries to write there, so that a long measurement does not end without one.

        Raises:
            ValueError: no file can be written there.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()
        except OSError as error:
            raise ValueError(
                f"--out {self.folder}: {error.strerror}.\nAllowed: a folder that can be written, or a path where one"
                " can be made.\nGive another."
            ) from error

    def write(self, numbers: Mapping[str, object]) -> None:
        """Writes the numbers as JSON; what an earlier call drew and chose from its own is removed."""
        for name in (FRAGMENT, f"{self.name}.png"):
            (self.folder / name).unlink(missing_ok=True)
        (self.folder / f"{self.name}.json").write_text(json.dumps(numbers, indent=2, ensure_ascii=False) + "\n")

    def measured(self, numbers: Mapping[str, object], figure: Figure) -> None:
        """Writes the numbers as JSON and the picture as PNG."""
        self.write(numbers)
        figure.savefig(self.folder / f"{self.name}.png", dpi=130, metadata={"Software": None})

    def chosen(self, plugin: str, layers: Sequence[int], why: str, more: Mapping[str, object]) -> Path:
        """Writes the config that, given after one with that plugin, changes its placement and ``more`` arguments."""
        placement = {"class_path": "Layers", "init_args": {"layers": list(layers)}}
        config = {"model": {"init_args": {"plugins": {plugin: {"init_args": {"placement": placement, **more}}}}}}
        path = self.folder / FRAGMENT
        head = f"{why}\nGive it after the config with the plugin: --config CONFIG --config {path}\n"
        path.write_text(
            textwrap.indent(head, "# ", lambda line: True)
            + yaml.safe_dump(config, sort_keys=False, default_flow_style=None)
        )
        return path


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns of equal width, numbers to the right."""
    cells = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in cells)
