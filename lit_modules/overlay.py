"""What each routed layer kept of the pictures of one prompt, drawn as one sheet a picture."""

from __future__ import annotations

import sys
from math import ceil, sqrt

from PIL import Image
from transformers import BaseImageProcessor

from lit_modules.answering import Answer
from lit_modules.generate_options import Asked
from lit_modules.kept_patches import places, tiles
from lit_modules.pictures import natural, sheet
from lit_modules.prompt import Prompt
from routing import KeptTokens

SIDE = 192  # pixels of a drawn picture's side, at least


def draw(given: Asked, prompt: Prompt, said: Answer, image_processor: BaseImageProcessor) -> None:
    """Writes the PNGs, each under the question and the answer."""
    records = [r for r in said.records if r.tokens.phase == "prefill" and isinstance(r.decision, KeptTokens)]
    pixels = prompt.inputs["pixel_values"]
    title = f"{' '.join(given.prompt.split())}\n{' '.join(said.text.split()) or '(no words)'}"
    for path, (row, image) in zip(given.overlays(), places(prompt.tokens), strict=True):
        scale = max(1, ceil(SIDE / pixels.shape[-1]))
        shown = natural(pixels[image], image_processor.image_mean, image_processor.image_std, scale)
        drawn = tiles(shown, records, row, image)
        Image.fromarray(sheet(title, drawn, ceil(sqrt(len(drawn))))).save(path)
        if not given.quiet:
            print(f"Patches kept by each routed layer: {path}", file=sys.stderr)
