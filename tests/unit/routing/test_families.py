"""Depth routing on decoders of other families, untouched: their masks, positions and layer calls are gathered right."""

from dataclasses import dataclass

import pytest
import torch
import transformers as hf

from plugins.progressive_depths import ProgressiveDepths
from routing import (
    All,
    Constant,
    ExpertChoice,
    LinearRouter,
    RoutedLayer,
    RoutingPlugin,
    ScaledPassing,
    TanhNorm,
    attach,
)

TEXT = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 8} | {
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4} | {
    "image_size": 28, "patch_size": 7,
}  # fmt: skip
CLIP, SIGLIP = {"model_type": "clip_vision_model", **VISION}, {"model_type": "siglip_vision_model", **VISION}
QWEN_VISION = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 7, "spatial_merge_size": 2}
MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
QWEN_TOKENS = {"vision_start_token_id": 6, "vision_end_token_id": 7, "video_token_id": 8}
FAMILIES = {  # prefix of the class names: what its configuration needs beyond a tiny shape
    "LlavaNext": {"vision_config": CLIP, "text_config": {"model_type": "llama", **TEXT}},
    "LlavaOnevision": {"vision_config": SIGLIP, "text_config": {"model_type": "qwen2", **TEXT}},
    "SmolVLM": {"vision_config": VISION, "text_config": {"model_type": "llama", **TEXT}, "scale_factor": 2},
    "Qwen2VL": {"vision_config": QWEN_VISION, "text_config": {**TEXT, "rope_parameters": MROPE}, **QWEN_TOKENS},
    "Gemma3": {"vision_config": SIGLIP, "text_config": {**TEXT, "head_dim": 8, "sliding_window": 16}},
}


@dataclass(frozen=True)
class Forced(RoutingPlugin):
    """Every layer through gather and merge at capacity 1 and weight 1."""

    def apply(self, decoder):
        for site in decoder.sites(All()):
            gate = decoder.gate(site, LinearRouter(std=0.0), TanhNorm(), ExpertChoice(), Constant(1.0))
            decoder.route_layer(site, gate, ScaledPassing())


def build(family: str) -> hf.PreTrainedModel:
    image = {"image_token_index" if family == "Gemma3" else "image_token_id": 5}
    torch.manual_seed(0)
    config = getattr(hf, f"{family}Config")(**FAMILIES[family], **image)
    return getattr(hf, f"{family}ForConditionalGeneration")(config).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_routed_without_a_line_of_its_own(family):
    # Image tokens as plain embeddings: what makes them needs no vision tower here.
    ids = torch.tensor([[1] + [5] * 16 + [9, 10, 11, 12], [1] + [9] * 20])
    dense, forced, routed = build(family), build(family), build(family)
    attach(forced, {"forced": Forced()})
    attach(routed, {"depth": ProgressiveDepths(router=LinearRouter(std=0.5))})
    want = dense(input_ids=ids, use_cache=False).logits
    assert torch.equal(forced(input_ids=ids, use_cache=False).logits, want)
    got = routed(input_ids=ids, use_cache=False).logits
    assert sum(isinstance(layer, RoutedLayer) for layer in routed.get_decoder().layers) == 6
    assert torch.equal(got[1], want[1]) and not torch.allclose(got[0], want[0])
