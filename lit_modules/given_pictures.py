"""Pictures that somebody names on a command line, opened by what they contain."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # others (EPS) run programs
SLIMMEST = 100  # longer side over shorter; a 1 x 60000 picture whose short side is scaled to 336 takes 20 GB


def opened(path: Path) -> Image.Image:
    """The picture as RGB, upright, as the data modules read those of a dataset.

    Raises:
        ValueError: it is missing, cannot be read, or is too slim.
    """
    if not path.is_file():
        given = "is a folder" if path.is_dir() else "there is no such file"
        raise ValueError(f"--image {path}: {given}.\nAllowed: a file of {', '.join(FORMATS)}.\nCheck the path.")
    try:
        with Image.open(path, formats=FORMATS) as image:
            picture = ImageOps.exif_transpose(_eight_bits(image)).convert("RGB")
    except Exception as error:  # Pillow's readers raise whatever they stumble over
        raise ValueError(
            f"--image {path}: it cannot be read ({type(error).__name__}: {str(error)[:200]}).\nAllowed: whole files of"
            f" {', '.join(FORMATS)}, of at most {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels.\nGive another picture."
        ) from error
    if max(picture.size) > SLIMMEST * min(picture.size):
        raise ValueError(
            f"--image {path}: it has {picture.width} x {picture.height} pixels.\nAllowed: sides that differ at most"
            f" {SLIMMEST} times.\nCrop it."
        )
    return picture


def _eight_bits(image: Image.Image) -> Image.Image:
    """Pillow would turn the greater part of a 16-bit picture into pure white."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    wide = image.mode != "I" or values.max() > 255  # "I" has 32 bits, of which 16 or 8 may be used
    return Image.fromarray((values >> 8 if wide else values).clip(0, 255).astype(np.uint8))
