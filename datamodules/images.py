"""Pictures, opened by what they contain and never from outside their folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from datamodules.records import brief, refusal

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # others (EPS) run programs
SLIMMEST = 100  # longer side over shorter; a 1 x 60000 picture whose short side is scaled to 336 takes 20 GB


def open_image(folder: Path, path: str, where: str) -> Image.Image:
    """The picture as RGB, upright; BadSampleError if it is missing, unreadable or outside ``folder``."""
    place = _inside(folder, path, where)
    try:
        with Image.open(place, formats=FORMATS) as image:
            picture = ImageOps.exif_transpose(_eight_bits(image)).convert("RGB")
    except Exception as error:  # Pillow's readers raise whatever they stumble over
        given = f"image {brief(path)} cannot be read ({type(error).__name__}: {str(error)[:200]})"
        allowed = f"whole files of {', '.join(FORMATS)}, of at most {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels"
        raise refusal(where, given, allowed, "image unreadable", "Replace it") from error
    if max(picture.size) > SLIMMEST * min(picture.size):
        given = f"image {brief(path)} has {picture.width} x {picture.height} pixels"
        raise refusal(where, given, f"sides that differ at most {SLIMMEST} times", "image too slim", "Crop it")
    return picture


def _inside(folder: Path, path: str, where: str) -> Path:
    root = folder.resolve()
    try:
        place = (root / path).resolve()
        there = place.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # no permission, a loop of links, a name that cannot be
        given = f"image {brief(path)} cannot be opened ({error})"
        raise refusal(where, given, "a file's path, relative to image_folder", "image path") from error
    if not place.is_relative_to(root):
        given = f"image {brief(path)} lies outside the image folder {folder}"
        remedy = "Move it, or give an image_folder that holds it"
        raise refusal(where, given, "paths and links that stay inside", "image outside", remedy)
    if not there:
        given = f"there is no image {brief(path)} in {folder}" + ", but a folder" * place.is_dir()
        allowed = "a file's path, relative to image_folder"
        raise refusal(where, given, allowed, "image missing", "Check image_folder")
    return place


def _eight_bits(image: Image.Image) -> Image.Image:
    """Pillow would turn the greater part of a 16-bit picture into pure white."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    wide = image.mode != "I" or values.max() > 255  # "I" has 32 bits, of which 16 or 8 may be used
    return Image.fromarray((values >> 8 if wide else values).clip(0, 255).astype(np.uint8))
