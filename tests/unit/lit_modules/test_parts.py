"""Which parameters train, how fast, and in which type."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from lightning import Trainer

from lit_modules import Optimization, RoutedVLM, TinyLlava
from lit_modules.backbones import Pretrained
from lit_modules.parts import check_precision, part_of_each
from plugins.progressive_depths import ProgressiveDepths
from stub_data import StubData

TINY = TinyLlava(layers=3, width=16, heads=2, hidden=32)


def built(parts: dict[str, float] | None = None, **plugins: ProgressiveDepths) -> RoutedVLM:
    module = RoutedVLM(TINY, plugins, parts)
    module.configure_model()
    return module


def test_every_parameter_belongs_to_one_part():
    module = built(depth=ProgressiveDepths())
    counts = Counter(part_of_each(module.model).values())
    assert set(counts) == {"vision", "projector", "language_model", "routers"}
    assert counts["projector"] == 4 and counts["routers"] == 4  # two linear maps; two routed layers


def test_by_default_all_but_vision_trains():
    module = built()
    frozen = {n for n, p in module.model.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, part in part_of_each(module.model).items() if part == "vision"}


def test_each_part_has_its_rate_and_the_last_match_decides():
    module = built(
        {"language_model": 1e-4, "routers": 1e-2, r"language_model\.layers\.1\.mlp": 5e-4, "lm_head": 0},
        depth=ProgressiveDepths(),
    )
    optimizer = Optimization(weight_decay=0.1).optimizer(module.model, module.rates)
    name_of = {id(p): n for n, p in module.model.named_parameters()}
    rate = {name_of[id(p)]: g["lr"] for g in optimizer.param_groups for p in g["params"]}
    decay = {name_of[id(p)]: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert rate["model.language_model.layers.0.mlp.up_proj.weight"] == 1e-4
    assert rate["model.language_model.layers.1.mlp.up_proj.weight"] == 5e-4
    assert {rate[n] for n in rate if n.startswith("routers")} == {1e-2}
    assert not [n for n in rate if "lm_head" in n or "projector" in n or "vision" in n]
    assert {decay[n] for n in rate} == {0.0, 0.1} and decay["model.language_model.norm.weight"] == 0.0


def test_a_pattern_that_trains_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"matches no parameter.*\n.*vision, projector"):
        built({"layers.99": 1e-3})
    with pytest.raises(ValueError, match="no regular expression"):
        built({"layers[": 1e-3})
    with pytest.raises(ValueError, match="finite"):
        built({"routers": float("nan")})
    assert built({"language_model": 1e-3, "routers": 1e-3}).rates  # no plugin, no routers: the dense baseline


def test_trained_parts_are_float32_and_frozen_ones_keep_their_type(tmp_path):
    TINY.build().save_pretrained(tmp_path)
    module = RoutedVLM(Pretrained(str(tmp_path), dtype="bfloat16"), parts={"language_model": 1e-3})
    module.configure_model()
    types = {part_of_each(module.model)[n]: p.dtype for n, p in module.model.named_parameters()}
    expected = {"vision": torch.bfloat16, "projector": torch.bfloat16, "language_model": torch.float32}
    assert types == expected
    check_precision(module.model, mixed=True)
    with pytest.raises(ValueError, match="bf16-mixed"):
        check_precision(module.model, mixed=False)
    with pytest.raises(ValueError, match="not float32"):
        check_precision(module.model.bfloat16(), mixed=True)


def test_the_schedule_moves_every_step():
    module = RoutedVLM(TINY, parts={"language_model": 1.0}, optimization=Optimization(warmup=0.5))
    rates = []
    module.on_train_batch_start = lambda batch, index: rates.append(module.lr_schedulers().get_last_lr()[0])
    trainer = Trainer(accelerator="cpu", max_steps=4, logger=False, limit_val_batches=0, enable_checkpointing=False)
    trainer.fit(module, StubData())
    assert rates == pytest.approx([0, 0.5, 1, 0.5])


def test_endless_training_has_no_schedule():
    with pytest.raises(ValueError, match="max_steps"):
        Optimization().schedule(torch.optim.SGD([torch.zeros(1)]), float("inf"))
