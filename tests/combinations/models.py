"""Models to answer with, dense or routed, and the prompts that they answer: alone, or in batches of 1 to 8."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration, MistralConfig

from routing import attach
from tests.laws.blocks import plugins_of
from tests.tiny import IMAGE, PATCHES, padded, row, tiny_llava

DENSE = "dense"  # instead of a rule
WINDOW = 12  # tokens, fewer than any prompt has
AGAIN = [*row(1, 4, first_text=0), 40, 41, 42, 40, 41, 42]  # something to look up
ROWS = [
    AGAIN,
    row(0, 6, seed=1),
    row(2, 4, seed=2),
    row(1, 3, seed=3, first_text=5),
    row(0, 3, seed=4),
    row(1, 7, seed=5, first_text=3),
    row(2, 2, seed=6, first_text=4),
    row(0, 11, seed=7),
]
PIXELS = padded(ROWS)["pixel_values"]


@cache
def built(rule: str, attention: str, sliding: bool) -> LlavaForConditionalGeneration:
    """A model whose routers are drawn so that nothing ties; ``sliding``: its layers see ``WINDOW`` tokens back."""
    model = _sliding(attention) if sliding else tiny_llava(attention=attention)
    if rule != DENSE:
        attach(model, plugins_of(rule))
        torch.manual_seed(1)
        for parameter in model.routers.parameters() if hasattr(model, "routers") else ():
            torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


def _sliding(attention: str) -> LlavaForConditionalGeneration:
    plain = tiny_llava().config
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "pad_token_id", "eos_token_id", "initializer_range")
    text = MistralConfig(**{name: getattr(plain.text_config, name) for name in names}, sliding_window=WINDOW)
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=plain.vision_config,
            text_config=text,
            image_token_id=IMAGE,
            vision_feature_layer=plain.vision_feature_layer,
            image_seq_length=PATCHES,
            attn_implementation=attention,
        )
    )


def pictures(rows: list[list[int]]) -> int:
    return sum(ids.count(IMAGE) for ids in rows) // PATCHES


def prompt(first: int, rows: int, side: str = "left") -> dict[str, Tensor]:
    """``rows`` of the rows from ``first`` on, each with its own pictures whatever its batch mates."""
    batch, before = padded(ROWS[first : first + rows], side), pictures(ROWS[:first])
    del batch["labels"]
    if "pixel_values" in batch:
        batch["pixel_values"] = PIXELS[before : before + len(batch["pixel_values"])]
    return batch
