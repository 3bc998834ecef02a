"""Thresholds that held-out scores set, how they come into checkpoints, and what they let in."""

from __future__ import annotations

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_modules import Generation, RoutedVLM, TinyLlava
from lit_modules.batches import model_inputs
from lit_modules.calibration import CalibrateThresholds, calibrate
from plugins.mixture_of_depths import MixtureOfDepths
from routing import Constant, ExpertChoice, Layers, LinearRouter, SelectBy, TokenKind, WarmUp
from routing.forecast import Calibrated, Forecast
from stub_data import StubData, prompt_batch, training_batch

ALL = (TokenKind.SYSTEM, TokenKind.QUESTION, TokenKind.ANSWER, TokenKind.VISION)
QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


def module(share: float = 0.4, router=None, routes=ALL, **settings) -> RoutedVLM:
    alone = Forecast(routes)
    plugin = MixtureOfDepths(
        placement=Layers((1, 2)),
        capacity=WarmUp(Constant(share), until=0.5),
        router=Calibrated(LinearRouter(std=0.5)) if router is None else router,
        selector=SelectBy(ExpertChoice(routes), alone, alone),
        **settings,
    )
    torch.manual_seed(0)
    tiny = TinyLlava(layers=3, width=16, heads=2, hidden=32)
    made = RoutedVLM(tiny, {"depth": plugin}, generation=Generation(max_new_tokens=2))
    made.configure_model()
    return made


def cuts_of(made: RoutedVLM) -> list[float]:
    routers = made.model.routers["depth"]
    return [float((routers["shared"] if "shared" in routers else routers[str(n)]).cut_L[n]) for n in (1, 2)]


@torch.no_grad()
def sorted_by_hand(made: RoutedVLM, batches, share: float) -> list[float]:
    """Row by row: how many there is room for, and the pooled scores in order."""
    pools, room = {1: [], 2: []}, {1: 0, 2: 0}
    made.model.train()
    for batch in batches:
        with made.tape.about(batch["tokens"]), made.tape.recording() as records:
            made.model(**model_inputs(batch, mask=True), use_cache=False)
        for record in records:
            for scores, kinds in zip(record.scores_BTE[..., 0].tolist(), record.tokens.kind_BT.tolist(), strict=True):
                row = [score for score, kind in zip(scores, kinds, strict=True) if kind in ALL]
                pools[record.site.layer] += row
                room[record.site.layer] += int(share * len(row))
    ordered = {layer: sorted(pool, reverse=True) for layer, pool in pools.items()}
    return [(ordered[n][room[n] - 1] + ordered[n][room[n]]) / 2 for n in (1, 2)]


@pytest.mark.parametrize("sharing", ["separate", "shared"])
@pytest.mark.parametrize("make", [prompt_batch, training_batch])
def test_a_cut_is_midway_between_the_last_there_is_room_for_and_the_next(sharing, make):
    made, batches = module(sharing=sharing), [make(seed, 3) for seed in range(5)]
    made.tape.progress = 0.1  # the capacity of the end counts, not that of now
    made.model.train()
    frozen = made.model.get_decoder().layers[0].eval()
    found = calibrate(made, batches, 4)
    assert made.tape.progress == 0.1 and made.model.training and made.model.lm_head.training and not frozen.training
    made.tape.progress = 1.0
    want = sorted_by_hand(made, batches[:4], 0.4)
    assert cuts_of(made) == pytest.approx(want, abs=1e-5)
    assert {site.layer: cut for site, cut in found.items()} == pytest.approx(
        dict(zip((1, 2), want, strict=True)), abs=1e-5
    )
    assert abs(want[0] - want[1]) > 0.01  # one router, two cuts


def retention(made: RoutedVLM, batches) -> list[float]:
    kept, asked = {1: 0, 2: 0}, {1: 0, 2: 0}
    made.model.eval()
    for batch in batches:
        with made.tape.about(batch["tokens"]), made.tape.recording() as records, torch.no_grad():
            made.model(**model_inputs(batch, mask=True), use_cache=True)
        for record in records:
            assert record.tokens.phase == "prefill"
            kept[record.site.layer] += int((record.decision.keep_BT() & record.candidate_BT).sum())
            asked[record.site.layer] += int(record.candidate_BT.sum())
    return [kept[n] / asked[n] for n in (1, 2)]


@pytest.mark.filterwarnings("ignore:.*nobody calibrated")
@pytest.mark.parametrize("share", [0.25, 0.6])
def test_questions_never_seen_enter_at_the_rate_that_the_capacity_asks_for(share):
    made, seen, unseen = module(share), *([prompt_batch(seed, 3) for seed in range(n, n + 12)] for n in (0, 100))
    before = retention(made, unseen)
    calibrate(made, seen, 12)
    assert retention(made, seen)[0] == pytest.approx(share, abs=0.03)  # rows round down
    assert retention(made, unseen) == pytest.approx([share] * 2, abs=0.06)
    assert max(abs(got - share) for got in before) > 0.06


@pytest.mark.parametrize(("share", "enters"), [(1.0, 1.0), (0.001, 0.0)])
def test_room_for_all_or_none_lets_in_all_or_none(share, enters):
    made = module(share)
    calibrate(made, [prompt_batch(0, 3)])
    assert retention(made, [prompt_batch(seed, 3) for seed in range(50, 54)]) == [enters, enters]


def test_without_candidates_a_cut_stays_and_is_told():
    made = module(routes=(TokenKind.SYSTEM,))
    with pytest.warns(
        UserWarning, match=r"'depth': the threshold of layer . is not calibrated.* routes SYSTEM"
    ) as heard:
        assert calibrate(made, [prompt_batch(0, 3)]) == {}
    assert len(heard) == 2
    assert not made.model.routers["depth"]["1"].measured_L.any()


@pytest.mark.parametrize(("every", "unvalidated"), [(1, None), (5, True)])
def test_checkpoints_hold_cuts_that_fit_their_weights(tmp_path, recwarn, every, unvalidated):
    checkpoints = ModelCheckpoint(tmp_path, save_last="link", save_on_train_epoch_end=unvalidated)
    callbacks = [checkpoints, CalibrateThresholds(batches=2)]
    made, data, last = module(), StubData(batches=2), tmp_path / "last.ckpt"
    trainer = Trainer(**QUIET, max_epochs=2, check_val_every_n_epoch=every, callbacks=callbacks)
    trainer.fit(made, data)
    loaded = RoutedVLM.load_from_checkpoint(last)
    kept = cuts_of(loaded)
    assert kept == cuts_of(made)
    calibrate(loaded, data.val_dataloader(), 2)
    assert cuts_of(loaded) == pytest.approx(kept, abs=1e-6)
    trainer.test(module(), data, ckpt_path=str(last), verbose=False)
    assert cuts_of(trainer.lightning_module) == kept
    assert not [one for one in recwarn if "nobody calibrated" in str(one.message)]


def test_a_callback_without_thresholds_or_batches_is_refused():
    with pytest.raises(ValueError, match=r"CalibrateThresholds\(batches=0\)"):
        CalibrateThresholds(0)
    made = RoutedVLM(TinyLlava(layers=3, width=16, heads=2, hidden=32), {"depth": MixtureOfDepths()})
    trainer = Trainer(**QUIET, max_steps=1, enable_checkpointing=False, callbacks=[CalibrateThresholds()])
    with pytest.raises(ValueError, match="no enabled plugin has a threshold to calibrate"):
        trainer.fit(made, StubData())
