"""Times and sizes of a config beside those of a reference."""

from __future__ import annotations

import pytest
import torch
import yaml

from lit_modules.batches import model_inputs
from lit_modules.configured import load, read
from lit_modules.speed import Rounds, Stopwatch
from routing import TokenKind
from routing.cost import count

MODEL = {"backbone": {"class_path": "TinyLlava", "init_args": {"layers": 6, "width": 16, "heads": 2, "hidden": 32}}}
P_MOD = {"depth": {"class_path": "ProgressiveDepths"}}
FREE = {"class_path": "MixtureOfDepths", "init_args": {"selector": {"class_path": "Threshold"}}}


@pytest.fixture
def config(tmp_path):
    def config(name, **model):
        file = tmp_path / f"{name}.yaml"
        data = {"class_path": "tests.stub_data.StubData", "init_args": {"batch_size": 3}}
        given = {"trainer": {"accelerator": "cpu"}, "data": data, "model": {"init_args": {**MODEL, **model}}}
        file.write_text(yaml.safe_dump(given))
        return file

    return config


def test_a_config_is_measured_in_turns_with_the_reference(config):
    watch = Stopwatch(config("dense"), Rounds(rounds=2, calls=1, warm_up=0))
    found = watch(config("p_mod", plugins=P_MOD))
    dense, p_mod = found["reference"], found["config"]
    assert [len(times) for one in (dense, p_mod) for times in (one.step_ms, one.prefill_ms)] == [2] * 4
    assert min(dense.step_ms + p_mod.prefill_ms) > 0 and dense.device == "CPU" and dense.peak_mib is None
    assert dense.retention == 1.0 and p_mod.gflops < dense.gflops and p_mod.kv_mib < dense.kv_mib
    batch = watch.batches.kept[1]
    module, _ = load(read(config("p_mod", plugins=P_MOD)))
    module.configure_model()
    cost = count(module.model, batch["tokens"])
    assert (p_mod.gflops, p_mod.kv_mib) == (cost.flops / 1e9, cost.kv_bytes / 2**20)
    with torch.no_grad(), module.tape.about(batch["tokens"]), module.tape.recording() as records:
        module.model.eval()(**model_inputs(batch, mask=True), use_cache=False)
    vision_BT = batch["tokens"].mask((TokenKind.VISION,))
    shares = [(record.decision.keep_BT() & vision_BT).sum().item() / vision_BT.sum().item() for record in records]
    shares += [1.0] * (6 - len(records))  # layers that are not routed
    assert p_mod.retention == pytest.approx(sum(shares) / 6) and 0 < p_mod.retention < 1


def test_what_depends_on_the_data_is_not_counted(config):
    watch = Stopwatch(config("dense"), Rounds(rounds=1, calls=1, warm_up=0))
    found = watch(config("free", plugins={"depth": FREE}))["config"]
    assert (found.gflops, found.kv_mib, found.retention) == (None, None, None) and len(found.step_ms) == 1


def test_the_weights_of_the_reference_are_trained_and_stay_finite(config):
    watch = Stopwatch(config("dense"), Rounds(rounds=1, calls=1, warm_up=0))
    before = {name: p.clone() for name, p in watch.reference.module.named_parameters() if p.requires_grad}
    watch(config("dense_again"))
    after = dict(watch.reference.module.named_parameters())
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert all(p.grad is None and p.isfinite().all() for p in after.values())


def test_without_rounds_it_only_counts(config):
    timed = Stopwatch(config("dense"), Rounds(rounds=0))(config("dense"))
    assert timed["config"].gflops == timed["reference"].gflops > 0
    assert timed["config"].step_ms == timed["config"].prefill_ms == []
