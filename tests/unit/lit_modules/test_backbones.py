"""Backbones: random, from a config, or with weights."""

from __future__ import annotations

import pytest
import torch

from lit_modules import FromConfig, Pretrained, RoutedVLM, TinyLlava
from lit_modules.batches import model_inputs
from plugins.progressive_depths import ProgressiveDepths
from stub_data import prompt_batch

TINY = TinyLlava(layers=3, width=16, heads=2, hidden=32)


def test_pretrained_gives_back_what_was_saved(tmp_path):
    model = TINY.build().eval()
    model.save_pretrained(tmp_path)
    inputs = model_inputs(prompt_batch(0, 2), mask=True)
    loaded = Pretrained(str(tmp_path)).build().eval()
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_missing_weights_are_reported(tmp_path):
    model = TINY.build()
    state = {k: v for k, v in model.state_dict().items() if "layers.1.mlp.up_proj" not in k}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.warns(UserWarning, match=r"1 weights keep random values \(missing_keys\).*up_proj"):
        Pretrained(str(tmp_path)).build()


def test_nothing_to_load_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="cannot be loaded"):
        Pretrained(str(tmp_path / "nothing")).build()
    with pytest.raises(ValueError, match=r"Shipped: configs/models/llava_1_5_7b\.json"):
        FromConfig("nothing.json").build()
    with pytest.raises(ValueError, match="multiple of heads"):
        TinyLlava(width=10, heads=4)
    with pytest.raises(ValueError, match="prepare_data"):
        TinyLlava(folder=str(tmp_path)).build()


def test_the_7b_shape_builds_on_the_meta_device_with_its_routers():
    module = RoutedVLM(FromConfig("configs/models/llava_1_5_7b.json"), {"depth": ProgressiveDepths()})
    with torch.device("meta"):
        module.configure_model()
    routers = sum(p.numel() for p in module.model.routers.parameters())
    assert routers == 98_328
    assert sum(p.numel() for p in module.model.parameters()) - routers == 7_063_427_072


def test_a_small_shape_lies_beside_it():
    assert (
        FromConfig("configs/models/llava_tiny.json").build()(**model_inputs(prompt_batch(0, 2), mask=True)).logits.ndim
        == 3
    )


def test_tiny_llava_takes_words_and_vision_from_a_dataset(digits):
    from transformers import AutoProcessor, CLIPVisionModel

    model = TinyLlava(layers=2, width=16, heads=2, folder=str(digits)).build()
    processor = AutoProcessor.from_pretrained(digits / "processor")
    tower = CLIPVisionModel.from_pretrained(digits / "vision_tower").state_dict()
    mine = model.get_encoder(modality="image").state_dict()
    assert tower.keys() == mine.keys() and all(torch.equal(tower[k], mine[k]) for k in tower)
    assert model.config.image_token_id == processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    assert len(processor.tokenizer) == model.get_input_embeddings().num_embeddings


@pytest.mark.parametrize("plugins", [{}, {"depth": ProgressiveDepths()}], ids=["dense", "routed"])
def test_recomputed_layers_have_the_same_gradients(plugins):
    from stub_data import training_batch

    batch = training_batch(0, 2)
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        module = RoutedVLM(TINY, plugins, checkpoint_activations=recompute)
        module.configure_model()
        assert any(getattr(m, "gradient_checkpointing", False) for m in module.model.modules()) == recompute
        module.model(**model_inputs(batch), use_cache=False).logits.square().mean().backward()
        gradients.append([p.grad for p in module.model.parameters() if p.requires_grad])
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(*gradients, strict=True))
