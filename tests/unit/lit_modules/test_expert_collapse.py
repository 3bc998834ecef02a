"""Experts that nobody takes are told of within a hundred steps, and balanced ones are not."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from lightning import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_modules import RoutedVLM, RoutingMonitor, RoutingTruth, TinyLlava
from lit_modules.collapse import IN_A_ROW
from lit_modules.expert_collapse import ExpertWatch, busiest, per_token
from lit_modules.expert_tally import ExpertCounts
from lit_modules.tally import KINDS
from plugins.mixture_of_experts import MixtureOfExperts
from plugins.progressive_depths import ProgressiveDepths
from routing import All, ExpertsChoose, LinearRouter, SelectBy, Site, TokenChoice
from stub_data import StubData

STEPS = 30  # three of them are logged
FIRST, SECOND = (Site(layer, 4, "mlp", "moe") for layer in (0, 2))


def loads(*load_E: int, k: int = 2, nulls: int = 0) -> ExpertCounts:
    """Of tokens that take ``k`` experts each."""
    chosen_KE = np.zeros((len(KINDS), len(load_E)), dtype=int)
    chosen_KE[0] = load_E
    return ExpertCounts({KINDS[0]: sum(load_E) // k}, chosen_KE, float("nan"), float("nan"), 0.0, nulls)


def said(*steps: ExpertCounts, watch: ExpertWatch | None = None) -> list[str]:
    """What is told of one site."""
    watch = watch or ExpertWatch()
    return [message for each in steps for message in watch.see({FIRST: each})]


def test_a_collapse_is_told_once_of_each_layer_and_says_what_to_do():
    watch = ExpertWatch()
    for _ in range(IN_A_ROW - 1):
        assert not [*watch.see({FIRST: loads(500, 500, 0, 0), SECOND: loads(250, 250, 250, 250)})]
    (message,) = watch.see({FIRST: loads(498, 0, 498, 4), SECOND: loads(250, 250, 250, 250)})
    for words in ("'moe' has collapsed", "layer 0's mlp (experts 0, 2 of 4 got 99.6%)", "weight", "Copies(noise=0.01)"):
        assert words in message
    assert "layer 2" not in message
    assert not said(*[loads(500, 500, 0, 0)] * 5, watch=watch)
    later = [m for _ in range(IN_A_ROW) for m in watch.see({FIRST: loads(0, 0, 9, 991), SECOND: loads(0, 0, 9, 991)})]
    assert len(later) == 1 and "layer 2's mlp (expert 3 of 4 got 99.1%)" in later[0] and "layer 0" not in later[0]


def test_a_collapse_that_wanders_is_one_and_a_moment_is_none():
    assert len(said(loads(500, 500, 0, 0), loads(0, 0, 500, 500), loads(500, 0, 500, 0))) == 1
    assert not said(loads(500, 500, 0, 0), loads(500, 500, 0, 0), loads(400, 400, 100, 100), loads(500, 500, 0, 0))


def test_an_expert_that_nobody_takes_is_named():
    (message,) = said(*[loads(400, 300, 0, 300)] * (IN_A_ROW + 3))
    assert "experts that nobody takes" in message and "layer 0's mlp (expert 2 of 4)" in message
    assert not said(loads(400, 300, 0, 300), loads(400, 0, 300, 300), loads(0, 400, 300, 300))
    assert len(said(*[loads(400, 300, 0, 300)] * 3, *[loads(990, 10, 0, 0, k=1)] * 3)) == 2  # it may collapse later


@pytest.mark.parametrize(
    "quiet",
    [
        loads(3, 3, 0, 0),  # too few tokens to tell
        loads(500, 500),  # there are no others
        loads(400, 300, 300, 0, nulls=1),  # a null expert learns nothing anyway
        loads(0, 0, 0, 0),
    ],
    ids=["few_tokens", "as_many_as_a_token_takes", "null", "nothing"],
)
def test_what_is_no_collapse_is_not_told(quiet):
    assert not said(*[quiet] * 5)


def test_tokens_that_all_pass_by_leave_all_experts_idle():
    (message,) = said(*[loads(0, 0, 500, 500, nulls=2)] * 3)
    assert "(experts 0, 1 of 2)" in message
    assert busiest(np.array([0, 5, 0, 995])) == [3] and per_token(loads(500, 500, 0, 0)) == 2


def trained(folder, *, detail: str = "brief", **plugins: object) -> list[str]:
    """The warnings of a training with the default callbacks, which is then validated and tested."""
    torch.manual_seed(0)
    module = RoutedVLM(TinyLlava(layers=4, width=16, heads=2, hidden=16), plugins)
    trainer = Trainer(
        logger=TensorBoardLogger(folder, name="", version="run", default_hp_metric=False),
        callbacks=[RoutingMonitor(detail), RoutingTruth()],
        max_steps=STEPS,
        max_epochs=-1,
        check_val_every_n_epoch=STEPS // 4,
        log_every_n_steps=10,
        num_sanity_val_steps=0,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, StubData())
        trainer.validate(module, StubData(), verbose=False)
    return [str(each.message) for each in caught if "Plugin" in str(each.message)]


def drawn(folder) -> tuple[dict[str, list[float]], list[str]]:
    """Scalars of the training, and pictures."""
    values, pictures = {}, []
    for file in sorted(folder.rglob("events.out.*")):
        events = EventAccumulator(str(file)).Reload()
        pictures += events.Tags()["images"]
        for tag in events.Tags()["scalars"]:
            values.setdefault(tag, []).extend(event.value for event in events.Scalars(tag))
    return values, pictures


def test_a_collapsed_router_is_told_of_within_a_hundred_steps(tmp_path):
    tied = MixtureOfExperts(router=LinearRouter(bias=False, std=0), losses=())  # equal scores fall to experts 0 and 1
    (message,) = trained(tmp_path, moe=tied)
    assert "layer 0's mlp (experts 0, 1 of 4 got 100.0%), layer 2's mlp (experts 0, 1 of 4 got 100.0%)" in message
    values, pictures = drawn(tmp_path)
    assert values["width/load_max"] == [2.0] * 3 and values["router/entropy"] == [2.0] * 3
    assert max(map(abs, values["width/information"])) < 1e-6
    assert pictures == ["width/map"] and np.asarray(Image.open(tmp_path / "run/expert_map.png")).any()
    assert not [tag for tag in values if tag.startswith("depth/") or "/layer_" in tag]
    assert not {"width/null", "width/dropped", "width/untaken"} & values.keys()


def test_balanced_routers_are_not_and_depth_and_width_are_drawn_together(tmp_path):
    moe = MixtureOfExperts(placement=All(), nulls=1)
    assert not trained(tmp_path, detail="detailed", depth=ProgressiveDepths(), moe=moe)
    values, pictures = drawn(tmp_path)
    assert {"depth/retention", "width/load_max", "width/null", "depth/retention/prefill"} <= values.keys()
    assert {"width/load_max/layer_03_mlp", "width/load/layer_03_mlp/expert_3"} <= values.keys()
    assert {"router/entropy/layer_03", "router/entropy/layer_03_mlp", "depth/retention/layer_03"} <= values.keys()
    assert not {"width/load/layer_03_mlp/expert_4", "width/load_max/layer_03", "depth/retention/layer_03_mlp"} & {
        *values
    }
    assert {"depth/map", "width/map"} == set(pictures)
    shares = [[values[f"width/load/layer_03_mlp/expert_{e}"][n] for e in range(4)] for n in range(3)]
    for share_E, null in zip(shares, values["width/null/layer_03_mlp"], strict=True):
        assert sum(share_E) + null == pytest.approx(1, abs=1e-6)


def test_experts_that_choose_share_the_load_of_pictures(tmp_path):
    rule = SelectBy(train=ExpertsChoose(), prefill=TokenChoice(), decode=TokenChoice())
    assert not trained(tmp_path, moe=MixtureOfExperts(selector=rule))
    values, _ = drawn(tmp_path)
    assert 0 <= values["width/untaken"][0] < 1 and "width/dropped" not in values and values["width/load_max"][0] < 1.5
