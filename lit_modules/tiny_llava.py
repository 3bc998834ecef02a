"""A LLaVA small enough for two CPU cores."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from lit_modules.backbones import Backbone

if TYPE_CHECKING:
    from transformers import CLIPVisionConfig, LlavaConfig, PreTrainedModel


@dataclass(frozen=True)
class TinyLlava(Backbone):
    """LLaVA (CLIP vision tower, two-layer projector, Llama decoder) with random weights.

    Args:
        layers: Decoder layers.
        width: Width of the decoder; a multiple of ``heads``.
        heads: Attention heads of the decoder.
        hidden: Width of the feed-forward layers.
        folder: Root of a dataset that holds ``processor`` (its vocabulary, image token and feature selection are used)
            and ``vision_tower`` (its shape and weights are used). Without it: 256 words, 16 patches of a 32 x 32 image.
        vision_layer: Which hidden state of the vision tower the projector reads; -1 is the last.
        attention: Attention implementation: ``sdpa``, ``eager`` or any registered name.
    """

    layers: int = 8
    width: int = 128
    heads: int = 4
    hidden: int = 256
    folder: str | None = None
    vision_layer: int = -1
    attention: str = "sdpa"

    def __post_init__(self) -> None:
        if min(self.layers, self.width, self.heads, self.hidden) < 1 or self.width % self.heads:
            raise ValueError(
                f"{self}: layers, width, heads and hidden must be at least 1, and width a multiple of heads. Try width"
                f" {max(1, self.width // max(1, self.heads)) * max(1, self.heads)}."
            )

    def build(self) -> PreTrainedModel:
        from transformers import LlavaForConditionalGeneration

        config, device = self._config(), torch.get_default_device()
        config._attn_implementation = self.attention
        # Random numbers are drawn on the CPU: a seed gives the same model on every device, under every strategy.
        with torch.device("meta" if device.type == "meta" else "cpu"):
            model = LlavaForConditionalGeneration(config)
            _initialise(model)
        if device.type not in ("cpu", "meta"):
            model.to(device)
        if self.folder is not None and not model.get_input_embeddings().weight.is_meta:
            self._load_vision(model)
        return model

    def _config(self) -> LlavaConfig:
        from transformers import LlamaConfig, LlavaConfig

        words = {"vocab_size": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        image = {"image_token_id": 255, "vision_feature_select_strategy": "default"}
        if self.folder is not None:
            words, image = self._vocabulary(self.folder)
        text = LlamaConfig(
            hidden_size=self.width,
            intermediate_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            max_position_embeddings=4096,
            **words,
        )
        return LlavaConfig(
            text_config=text,
            vision_config=self._vision_config(),
            vision_feature_layer=self.vision_layer,
            pad_token_id=words["pad_token_id"],
            **image,
        )

    @staticmethod
    def _vocabulary(folder: str) -> tuple[dict[str, int], dict[str, int | str]]:
        from transformers import AutoProcessor

        processor = AutoProcessor.from_pretrained(_written(folder, "processor"))
        tokens = processor.tokenizer
        return (
            {
                "vocab_size": len(tokens),
                "bos_token_id": tokens.bos_token_id,
                "eos_token_id": tokens.eos_token_id,
                "pad_token_id": tokens.pad_token_id,
            },
            {
                "image_token_id": tokens.convert_tokens_to_ids(processor.image_token),
                "vision_feature_select_strategy": processor.vision_feature_select_strategy,
            },
        )

    def _vision_config(self) -> CLIPVisionConfig:
        from transformers import CLIPVisionConfig

        if self.folder is not None:
            return CLIPVisionConfig.from_pretrained(_written(self.folder, "vision_tower"))
        return CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=32,
            patch_size=8,
        )

    def _load_vision(self, model: PreTrainedModel) -> None:
        from transformers import CLIPVisionModel

        assert self.folder is not None
        tower = CLIPVisionModel.from_pretrained(_written(self.folder, "vision_tower"))
        model.get_encoder(modality="image").load_state_dict(tower.state_dict())


def _initialise(model: PreTrainedModel) -> None:
    """Weights of unit gain, and half of that where a branch joins the residual stream.

    Llama's standard deviation of 0.02 suits a width of 4096; at 128 a short training learns little from there.
    """
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and "vision_tower" not in name:
            joins = name.endswith(("o_proj.weight", "down_proj.weight"))
            nn.init.normal_(weight, std=(0.5 if joins else 1.0) * weight.shape[1] ** -0.5)


def _written(folder: str, part: str) -> Path:
    path = Path(folder) / part
    if not path.is_dir():
        raise ValueError(
            f"TinyLlava: folder={folder!r} has no {part!r}.\nAllowed: the root of an embedded dataset"
            " (`data.init_args.root`), after its prepare_data has run.\nRun `python -m lit fit` with that"
            " data first, or leave folder out."
        )
    return path
