"""The drawings: a record that keeps a known patch lights exactly that patch."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lit_modules.collapse import CollapseWatch
from lit_modules.kept_patches import KeptPatches, grid, kept_patches, places
from lit_modules.monitor import RoutingMonitor, scalars
from lit_modules.pictures import DIMMED, Tile, lit, picture, sheet
from lit_modules.retention_map import UNKNOWN, History, colours, columns, panel, retention_map
from lit_modules.score_histograms import Scores
from lit_modules.tally import KINDS, Counts, Tally, bits
from routing import (
    ExpertChoice,
    KeptTokens,
    MaskedThreshold,
    RoutingRecord,
    RoutingTape,
    SelectBy,
    Site,
    Threshold,
    TokenKind,
    Tokens,
)

V, Q, A, PAD = TokenKind.VISION, TokenKind.QUESTION, TokenKind.ANSWER, TokenKind.PAD
SITE = Site(1, 4, "layer", "depth")


def two_images() -> Tokens:
    """A row with two pictures of 2 x 3 patches and a row with none."""
    kind = torch.tensor([[Q] + [V] * 12 + [Q], [Q] * 14])
    number = torch.arange(12)
    image, rows, columns = (torch.full((2, 14), -1) for _ in range(3))
    image[0, 1:13], rows[0, 1:13], columns[0, 1:13] = number // 6, number % 6 // 3, number % 3
    return Tokens.of(kind, image_BT=image, row_BT=rows, column_BT=columns)


def test_a_kept_patch_lights_exactly_its_place():
    tokens = two_images()
    keep = tokens.kind_BT == Q
    keep[0, 1 + 6 + 4] = True  # second picture, row 1, column 1
    decision = KeptTokens.of(keep, torch.ones(2, 14), 14)
    record = RoutingRecord(Site(0, 2, "layer", "depth"), torch.zeros(2, 14, 1), decision, 0.1, tokens, tokens.mask([V]))
    assert places(tokens) == [(0, 0), (0, 1)] and grid(tokens, 0, 1) == (2, 3)
    assert not kept_patches(record, 0, 0, (2, 3)).any()
    kept = kept_patches(record, 0, 1, (2, 3))
    assert kept.nonzero().tolist() == [[1, 1]]
    white = np.full((8, 12, 3), 200, dtype=np.uint8)
    drawn = lit(white, kept)
    expected = np.full((8, 12, 3), int(200 * DIMMED), dtype=np.uint8)
    expected[4:8, 4:8] = 200
    assert (drawn == expected).all()


def test_a_sheet_holds_its_tiles_and_pictures_keep_their_contrast():
    pixels = picture(torch.linspace(-2, 2, 3 * 4 * 5).view(3, 4, 5), scale=3)
    assert pixels.shape == (12, 15, 3) and pixels.min() == 0 and pixels.max() == 255
    drawn = sheet("title", [Tile("a", pixels)] * 5, columns=2)
    windows = [drawn[y : y + 12, x : x + 15] for y in range(drawn.shape[0] - 11) for x in (6, 27)]
    assert sum((window == pixels).all() for window in windows) == 5


def test_places_unknown_to_the_collator_are_not_drawn():
    assert places(Tokens.of(torch.tensor([[V] * 4]))) == []


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match="images is at least 0"):
        KeptPatches(images=-1)
    with pytest.raises(ValueError, match="'nothing', 'brief' or 'detailed'"):
        RoutingMonitor(detail="off")


def record(layer: int, capacity: float | None, seed: int) -> RoutingRecord:
    """A rule over vision and question tokens that kept some of them at random; the second row is padded."""
    torch.manual_seed(seed)
    tokens = Tokens.of(torch.tensor([[Q, V, V, V, Q, A], [V, V, Q, A, PAD, PAD]]))
    candidate_BT = tokens.mask([V, Q])
    keep_BT = (torch.rand(2, 6) < 0.5) & candidate_BT | tokens.mask([A])
    decision = KeptTokens.of(keep_BT, torch.ones(2, 6), 6)
    return RoutingRecord(
        Site(layer, 4, "layer", "depth"), torch.randn(2, 6, 2), decision, capacity, tokens, candidate_BT
    )


def test_a_tally_counts_candidates_by_kind_and_never_padding():
    records = [record(1, 0.5, seed=0), record(3, None, seed=1), record(1, 0.25, seed=2)]
    tally = Tally()
    for each in records:
        tally.add([each])
    counts = tally.counts(lambda values, _: 2 * values)  # as if a second rank had seen the same
    assert [site.layer for site in counts] == [1, 3]
    for site, got in counts.items():
        seen = kept = asked = entropy = 0.0
        for each in (r for r in records if r.site == site):
            for b, t in [(b, t) for b in range(2) for t in range(6) if each.tokens.kind_BT[b, t] in (V, Q)]:
                seen, kept = seen + 1, kept + bool(each.decision.keep_BT()[b, t])
                asked += float("nan") if each.capacity is None else each.capacity
                entropy -= sum(p * np.log2(p) for p in each.scores_BTE[b, t].softmax(-1).tolist())
        assert got.candidates[V] == seen // 8 * 10 and got.candidates[Q] == seen // 8 * 6 and got.candidates[A] == 0
        assert got.total == 2 * seen and got.retention == pytest.approx(kept / seen)
        assert bits([got]) == pytest.approx(entropy / seen, rel=1e-6)
        assert got.target == pytest.approx(asked / seen, nan_ok=True)
    everything = Counts.sum(counts.values())
    assert everything.total == sum(each.total for each in counts.values()) and np.isnan(everything.target)


def test_ranks_without_scores_leave_no_histogram():
    tally, said = Tally(), Scores()
    only_answers = Tokens.of(torch.tensor([[A, A]]))
    decision = KeptTokens.of(only_answers.valid_BT, torch.ones(1, 2), 2)
    site = Site(0, 1, "layer", "depth")
    one = RoutingRecord(site, torch.zeros(1, 2, 1), decision, 0.5, only_answers, only_answers.mask([V]))
    tally.add([one])
    said.add([one])
    assert said.histograms([[site]], lambda values, _: values) == [None]
    assert np.isnan(tally.counts(lambda values, _: values)[site].retention)


def test_the_map_averages_what_it_has_no_room_for_and_greys_the_unknown():
    share_LS = np.array([[0.0, 1.0, 0.5, 0.5], [np.nan, np.nan, 1.0, 1.0]])
    assert np.array_equal(columns(share_LS, most=2), [[0.5, 0.5], [np.nan, 1.0]], equal_nan=True)
    band = panel(share_LS, row=3)
    assert band.shape == (6, 300, 3)
    for column, share in enumerate(share_LS[0]):
        assert (band[:3, column * 75 : (column + 1) * 75] == colours(np.array(share))).all()
    assert (band[3:, :150] == UNKNOWN).all()
    names, nothing = ["layer_00", "layer_01"], np.full((2, 4), np.nan)
    assert retention_map(names, range(4), nothing, share_LS).dtype == np.uint8


def test_a_map_continues_from_a_checkpoint_and_starts_again_for_other_layers():
    counts = {Site(n, 4, "layer", "depth"): Counts({V: 4}, {V: n}, 2.0, 0.0) for n in (1, 2)}
    history = History()
    history.add(9, counts)
    again = History.of(history.state())
    again.add(19, counts)
    assert again.steps == [9, 19] and again.kept_SL == [[0.25, 0.5]] * 2 and again.target_SL == [[0.5, 0.5]] * 2
    again.add(29, dict([*counts.items()][:1]))
    assert again.steps == [29] and again.names == ["layer_01"]


class Ops(TorchDispatchMode):
    """Counts what torch is asked."""

    asked = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.asked += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("detail", "step"), [("nothing", 9), ("detailed", 3)])
def test_steps_that_are_not_logged_cost_nothing(detail, step):
    module, trainer = SimpleNamespace(tape=RoutingTape()), SimpleNamespace(global_step=step, log_every_n_steps=10)
    monitor = RoutingMonitor(detail)
    with Ops() as ops:
        monitor.on_train_batch_start(trainer, module, {}, 0)
        module.tape.write(record(1, 0.5, seed=0))
        before = ops.asked
        trainer.global_step += 1
        monitor.on_train_batch_end(trainer, module, None, {}, 0)
    assert ops.asked == before and not monitor.history.steps


@pytest.mark.parametrize("rule", [Threshold((V, Q)), MaskedThreshold((V, Q))])
def test_a_threshold_is_counted_by_who_enters_whatever_its_slots(rule):
    tokens = Tokens.of(torch.tensor([[Q, V, V, V, Q, A], [V, V, Q, A, PAD, PAD]]))
    scores = torch.tensor([[2.0, -1, 3, -2, -3, -9], [1, -1, -2, 9, 9, 9]])[..., None]
    decision = rule(scores, scores.sigmoid(), tokens, 0.0)
    tally = Tally()
    tally.add([RoutingRecord(SITE, scores, decision, None, tokens, rule.candidate_BT(tokens))])
    counts = tally.counts(lambda values, _: values)[SITE]
    assert counts.by_kind() == {V: 2 / 5, Q: 1 / 3} and counts.retention == 3 / 8 and np.isnan(counts.target)


def test_agreement_is_counted_where_decoding_has_another_rule():
    tokens = Tokens.of(torch.tensor([[Q, V, V, V, Q, A], [V, V, Q, A, PAD, PAD]]))
    torch.manual_seed(0)
    tally, agreed, seen = Tally(), 0, 0
    rules = SelectBy(train=ExpertChoice((V, Q)), prefill=Threshold((V, Q)), decode=Threshold((V, Q)))
    for phase, selector in (("train", rules), ("train", rules), ("prefill", rules), ("train", Threshold((V, Q)))):
        now, scores = tokens.during(phase, 1.0), torch.randn(2, 6, 1)
        decision, candidate_BT = selector(scores, scores.sigmoid(), now, 0.5), selector.candidate_BT(now)
        weights = scores.sigmoid()
        one = RoutingRecord(SITE, scores, decision, 0.5, now, candidate_BT, weights, None, selector)
        tally.add([one])
        if phase == "train" and selector is rules:
            for b, t in candidate_BT.nonzero().tolist():
                seen += 1
                agreed += bool(decision.keep_BT()[b, t]) == bool(scores[b, t, 0] > 0)
    counts = tally.counts(lambda values, _: 2 * values)[SITE]  # as if a second rank had seen the same
    assert (counts.foreseen, counts.agreed) == (2 * seen, 2 * agreed) and 0 < agreed < seen == 2 * 8
    assert counts.agreement == agreed / seen and counts.total == 2 * 2 * seen
    alone = Counts({V: 4}, {V: 1}, 2.0, 0.0)
    filled = Counts(dict.fromkeys(KINDS, 1), dict.fromkeys(KINDS, 1), 2.0, 0.0, foreseen=4, agreed=3)
    assert np.isnan(alone.agreement) and Counts.sum([filled, filled]).agreement == 0.75
    assert scalars("/layer_01", {SITE: filled}, {})["depth/agreement/layer_01"] == 0.75


def counted(*kept: int, asked: float = float("nan"), of: int = 1000) -> dict[Site, Counts]:
    """Layers 1, 3, … that let so many of ``of`` candidates in."""
    return {Site(2 * n + 1, 8, "layer", "depth"): Counts({V: of}, {V: k}, asked, 0.0) for n, k in enumerate(kept)}


def test_a_layer_that_stays_dense_or_empty_is_told_once_and_what_to_do():
    watch = CollapseWatch()
    assert not any([*watch.see(counted(1000, 0), progress)] for progress in (0.0, 0.05, 0.09))  # still settling
    assert not [*watch.see(counted(1000, 0), 0.10)]
    assert not [*watch.see(counted(0, 0, of=0), 0.15)]  # a batch without candidates says nothing
    assert not [*watch.see(counted(990, 10), 0.20)]
    dense, empty = watch.see(counted(998, 2), 0.30)
    assert "'depth'" in dense and "everything" in dense and "layer 1 (99.8%)" in dense and "Raise the weight" in dense
    assert "nothing" in empty and "layer 3 (0.2%)" in empty and "target above 0" in empty
    assert not any([*watch.see(counted(1000, 0), 0.4)] for _ in range(5))


@pytest.mark.parametrize("asked", [float("nan"), 500.0])
def test_neither_a_moment_nor_a_rule_that_holds_a_capacity_is_warned_of(asked):
    watch = CollapseWatch()
    steps = [1000, 1000, 500, 1000, 1000, 0, 0] if np.isnan(asked) else [1000] * 5
    assert not any([*watch.see(counted(kept, asked=asked), 0.5)] for kept in steps)
    assert bool([*watch.see(counted(0, asked=asked), 0.5)]) == np.isnan(asked)


def test_the_monitor_warns_and_logs_the_agreement(recwarn):
    logged, tape = [], RoutingTape()
    module = SimpleNamespace(tape=tape, log_dict=logged.append, plugins={})
    trainer = SimpleNamespace(global_step=0, log_every_n_steps=1, world_size=1, loggers=[], is_global_zero=True)
    monitor, tokens, scores = RoutingMonitor("detailed"), Tokens.of(torch.tensor([[Q, V, V]])), torch.ones(1, 3, 1)
    rules = SelectBy(train=Threshold(p=0.7), prefill=Threshold(p=0.8), decode=Threshold(p=0.8))
    for _ in range(4):
        monitor.on_train_batch_start(trainer, module, {}, 0)
        decision = rules(scores, scores.sigmoid(), tokens, 0.5)
        args = (SITE, scores, decision, None, tokens, tokens.mask([V]), scores.sigmoid(), None, rules)
        tape.write(RoutingRecord(*args))
        trainer.global_step += 1
        monitor.on_train_batch_end(trainer, module, None, {}, 0)
    assert (
        [values["depth/agreement"] for values in logged]
        == [0.0] * 4
        == [values["depth/agreement/layer_01"] for values in logged]
    )
    assert [values["depth/retention"] for values in logged] == [1.0] * 4
    assert len([w for w in recwarn if "lets everything in" in str(w.message)]) == 1
