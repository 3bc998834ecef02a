"""The same questions about other pictures: what does an answer owe to having seen the right one?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor


def with_other_images(batch: Mapping[str, object]) -> Mapping[str, object] | None:
    """The batch with each picture replaced by the next one in it that differs; None where all pictures are the same.

    Rows about one scene have equal pictures, so that no question is asked about its own scene; rows without a picture
    stay as they are.
    """
    pixels = batch.get("pixel_values")
    if not isinstance(pixels, Tensor):
        return batch
    pictures = [picture.numpy().tobytes() for picture in pixels.detach().float().cpu()]
    order = next_other(pictures)
    return None if order is None else {**batch, "pixel_values": pixels[order]}


def next_other(things: Sequence[object]) -> list[int] | None:
    """For each place the next one, round the end, that holds something else; None where all hold the same."""
    if len(set(things)) < 2:
        return None
    n = len(things)
    return [next(i % n for i in range(at + 1, at + n) if things[i % n] != things[at]) for at in range(n)]
