"""The processor of the embedded task: a word-level tokenizer, and CLIP's image processing."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from datamodules.digits.scene import Geometry

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")


def build_processor(words: list[str], geometry: Geometry, chat_template: str) -> LlavaProcessor:
    """A processor whose ``<image>`` becomes one token per patch; the tower's CLS output is dropped."""
    size = geometry.image_size
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"height": size, "width": size},
            crop_size={"height": size, "width": size},
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        ),
        tokenizer=build_tokenizer(words),
        patch_size=geometry.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template,
    )


def build_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """One token per word; ``<s>`` in front, as LLaMA's does, and a line break is a word."""
    vocabulary = {word: n for n, word in enumerate([*SPECIAL, "\n", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    tokenizer.add_tokens([AddedToken("\n", normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        clean_up_tokenization_spaces=False,
    )
