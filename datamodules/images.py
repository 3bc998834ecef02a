"""Pictures, opened by what they contain and never from outside their folder."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageOps

from datamodules.records import BadSampleError


def open_image(folder: Path, path: str, record: str) -> Image.Image:
    """The picture as RGB, upright; BadSampleError if it is missing, unreadable or outside ``folder``."""
    root = folder.resolve()
    place = (root / path).resolve()
    if not place.is_relative_to(root):
        raise BadSampleError(
            f"Record {record!r}: image {path!r} lies outside the image folder {folder}.", "image outside"
        )
    if not place.is_file():
        raise BadSampleError(
            f"Record {record!r}: there is no image {path!r} in {folder}. Check image_folder, or set"
            " on_bad_sample: skip.",
            "image missing",
        )
    try:
        with Image.open(place) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadSampleError(
            f"Record {record!r}: image {path!r} cannot be read ({error}).", "image unreadable"
        ) from error
