"""A small LLaVA with random weights, and batches for it."""

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from routing import TokenKind, Tokens

IMAGE, PATCHES = 5, 16


def tiny_llava(
    layers: int = 8, attention: str = "sdpa", seed: int = 0, width: int = 32
) -> LlavaForConditionalGeneration:
    """16 vision tokens an image; every call with the same arguments gives the same weights."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=7
    )
    text = LlamaConfig(
        vocab_size=128,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        eos_token_id=2,
        initializer_range=0.2,  # deep enough to tell wrong routing from right
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE,
        vision_feature_layer=-2,
        image_seq_length=PATCHES,
        attn_implementation=attention,
    )
    return LlavaForConditionalGeneration(config)


def row(images: int, text: int, seed: int = 0, first_text: int = 1) -> list[int]:
    """Token ids: ``first_text`` tokens, the images, ``text`` tokens."""
    g = torch.Generator().manual_seed(seed)
    words = torch.randint(6, 128, (first_text + text,), generator=g).tolist()
    return words[:first_text] + [IMAGE] * (PATCHES * images) + words[first_text:]


def padded(rows: list[list[int]], side: str = "right", answers: int = 3, seed: int = 0) -> dict[str, Tensor]:
    """Inputs for a forward, labels on the last ``answers`` tokens of each row; images for the rows that have them."""
    length = max(map(len, rows))
    ids, mask, labels = [], [], []
    for tokens in rows:
        gap = length - len(tokens)
        before, after = (0, gap) if side == "right" else (gap, 0)
        ids.append([0] * before + tokens + [0] * after)
        mask.append([0] * before + [1] * len(tokens) + [0] * after)
        labels.append([-100] * (before + len(tokens) - answers) + tokens[-answers:] + [-100] * after)
    images = sum(tokens.count(IMAGE) for tokens in rows) // PATCHES
    batch = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask), "labels": torch.tensor(labels)}
    if images:
        batch["pixel_values"] = torch.randn(images, 3, 28, 28, generator=torch.Generator().manual_seed(seed))
    return batch


def facts(batch: dict[str, Tensor]) -> Tokens:
    """What a collator would say about a batch of ``padded``."""
    kind = torch.where(batch["input_ids"] == IMAGE, TokenKind.VISION, TokenKind.QUESTION)
    kind = kind.masked_fill(batch["labels"] != -100, TokenKind.ANSWER)
    return Tokens.of(kind.masked_fill(batch["attention_mask"] == 0, TokenKind.PAD))
