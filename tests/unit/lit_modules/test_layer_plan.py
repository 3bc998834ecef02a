"""Which layers are routed: by rules on their rank, and by scores under a budget of FLOPs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
import yaml

from lit_modules.attention_rank import LayerRank
from lit_modules.batches import model_inputs
from lit_modules.dense_subject import DenseSubject, Sample
from lit_modules.estimate import Estimate
from lit_modules.layer_commands import PlanOptions, layer_scores
from lit_modules.layer_files import LayerFiles
from lit_modules.layer_plan import RankRule, placeable, planner, refusals, upward
from lit_modules.layer_scores import layer_effects, twin
from lit_modules.measured_rows import Rows
from plugins.late_withdrawal import LateWithdrawal
from plugins.mixture_of_depths import MixtureOfDepths
from plugins.progressive_depths import ProgressiveDepths
from plugins.short_v import ShortV
from routing import All, Constant, Layers, Threshold, attach
from routing.cost import count
from stub_data import prompt_batch, training_batch
from tiny import facts, padded, row, tiny_llava

LAYERS = 4
RANKS = [LayerRank(n, Estimate(100 * r, 1.0, 9), Estimate(r, 0.01, 9)) for n, r in enumerate((0.3, 0.05, 0.2, 0.08))]


def dense(**plugins):
    return DenseSubject(tiny_llava(layers=LAYERS).eval(), plugins, None, torch.device("cpu"), "32-true")


def sample(which=(0, 2)):
    batch = padded([row(1, 9), row(1, 4, seed=1), row(2, 6, seed=2)])
    labels = batch["labels"]
    batch["tokens"] = facts(batch)
    batch["positions_N"] = (labels[:, 1:] != -100).nonzero() @ torch.tensor([labels.shape[1], 1])
    batch["targets_N"] = labels.flatten()[batch["positions_N"] + 1]
    return Sample(batch, which)


def flops(model, tokens):
    return sum(layer.flops for layer in count(model, tokens).layers)


@pytest.mark.parametrize(
    ("rule", "layers", "said"),
    [
        ({}, (1, 3), "relative 0.1"),
        ({"relative": 0.25}, (1, 2, 3), "relative 0.25"),
        ({"absolute": 6.0}, (1,), "absolute 6"),
        ({"count": 3}, (1, 2, 3), "count 3"),
        ({"highest": 2}, (0, 2), "highest 2"),
    ],
)
def test_rules_on_ranks(rule, layers, said):
    assert RankRule(**rule)(RANKS) == layers and str(RankRule(**rule)) == said


@pytest.mark.parametrize(
    ("rule", "layers"),
    [({"relative": 0.25}, (2, 3)), ({"count": 2}, (2, 3)), ({"highest": 2}, (0, 2)), ({"highest": 3}, (0, 2, 3))],
)
def test_rules_choose_among_layers_that_can_be_routed(rule, layers):
    assert RankRule(**rule)(RANKS, {1: "dense"}) == layers


def test_rules_that_choose_nothing_say_what_would():
    for rule, said in (({"relative": 0.06}, "lowest is 0.08, of layer 3"), ({"count": 4}, "Allowed: 1 to 3")):
        with pytest.raises(ValueError, match=said):
            RankRule(**rule)(RANKS, {1: "dense"})
    for rule in ({"relative": 0.1, "count": 2}, {"count": 0}, {"relative": 1.5}, {"absolute": -1.0}):
        with pytest.raises(ValueError, match=r"The rule is --[\s\S]*Allowed: one of"):
            RankRule(**rule)


@pytest.mark.parametrize("effect", ["sensitivity", "contribution"])
def test_effects_are_those_of_a_model_built_for_the_layer(effect):
    """The oracle builds and routes a fresh model for each layer and goes through rows and positions one by one."""
    asked = sample()
    batch = asked.batch
    subject = dense()
    with torch.no_grad():
        before = subject.model(**model_inputs(batch)).logits
    found = layer_effects(subject, [asked], effect)
    for layer, mine in enumerate(found):
        changed = tiny_llava(layers=LAYERS).eval()
        plugin = {"sensitivity": LateWithdrawal, "contribution": ShortV}[effect]
        with attach(changed, {"it": plugin(placement=Layers((layer,)))}).about(batch["tokens"]), torch.no_grad():
            after = changed(**model_inputs(batch)).logits
        rows = []
        for number in asked.rows:
            values = []
            for place in range(batch["labels"].shape[1] - 1):
                target = batch["labels"][number, place + 1]
                if target == -100:
                    continue
                p, q = before[number, place].softmax(-1), after[number, place].softmax(-1)
                kl = (p * (p / q).log()).sum()
                values.append(float(kl if effect == "contribution" else (p[target] / q[target]).log()))
            rows.append(sum(values) / len(values))
        expected = Estimate.of(rows)
        assert mine.mean == pytest.approx(expected.mean, abs=1e-5)
        assert mine.error == pytest.approx(expected.error, abs=1e-4)
    assert max(abs(each.mean) for each in found) > 1e-3
    assert torch.equal(subject.model(**model_inputs(batch)).logits, before)  # the dense model is as it was


def test_frozen_in_the_last_layer_vision_tokens_are_missed_by_nobody():
    found = layer_effects(dense(), [sample()], "contribution")
    assert found[-1].mean == pytest.approx(0, abs=1e-6) and found[0].mean > 1e-4


def test_a_twin_has_the_very_weights_and_nothing_is_left_on_the_model():
    model = tiny_llava(layers=LAYERS)
    other, _ = twin(model, {"alone": ShortV(placement=Layers((1,)))})
    mine, theirs = dict(model.named_parameters()), dict(other.named_parameters())
    assert mine.keys() == theirs.keys() and all(mine[name] is theirs[name] for name in mine)
    assert not hasattr(model, "routers") and not model._forward_pre_hooks
    assert all(type(layer).__mro__[1].__name__ != "AttendedLayer" for layer in model.get_decoder().layers)
    twin(model, {"alone": LateWithdrawal(placement=Layers((2,)))})


def test_rows_without_answers_are_left_out_and_no_row_at_all_is_an_error():
    asked = sample(which=(0, 1))
    kept = asked.batch["positions_N"] // asked.batch["tokens"].shape[1] != 0
    batch = {**asked.batch, **{name: asked.batch[name][kept] for name in ("positions_N", "targets_N")}}
    assert layer_effects(dense(), [Sample(batch, (0, 1))], "sensitivity")[0].error is None
    with pytest.raises(ValueError, match="No row has a supervised token"):
        layer_effects(dense(), [Sample(batch, (0,))], "sensitivity")


@pytest.mark.parametrize("budget", [0.95, 0.7])
def test_the_fewest_layers_in_order_reach_the_budget(budget):
    plugin, tokens, order = MixtureOfDepths(capacity=Constant(0.25)), sample().batch["tokens"], [2, 0, 3, 1]
    found = planner(dense(depth=plugin), "depth", budget, tokens)(order)
    for n in range(1, LAYERS + 1):
        model = tiny_llava(layers=LAYERS)
        attach(model, {"depth": MixtureOfDepths(capacity=Constant(0.25), placement=Layers(tuple(order[:n])))})
        share = flops(model, tokens) / flops(tiny_llava(layers=LAYERS), tokens)
        assert found.shares[n - 1] == share
        assert (share <= budget) == (n >= found.routed)
    assert found.layers == tuple(sorted(order[: found.routed])) and found.share <= budget and not found.refused


def test_layers_that_a_plugin_leaves_dense_are_no_use():
    subject = dense(depth=ProgressiveDepths())
    found = planner(subject, "depth", 0.9, sample().batch["tokens"])([0, 3, 2, 1])
    assert found.refused == refusals(subject, "depth")
    assert 0 in found.refused and "routes nothing" in found.refused[0] and found.order[0] == 3


def test_a_disabled_plugin_is_planned_for_and_other_plugins_stay():
    tokens = sample().batch["tokens"]
    off = MixtureOfDepths(enabled=False)
    alone = planner(dense(depth=off), "depth", 0.9, tokens)([0, 1, 2, 3])
    beside = planner(dense(depth=off, other=ShortV(placement=Layers((3,)))), "depth", 0.9, tokens)([0, 1, 2, 3])
    assert beside.shares[0] < alone.shares[0] and "both route" in beside.refused[3]


def test_what_cannot_be_planned_says_why():
    tokens = sample().batch["tokens"]
    with pytest.raises(ValueError, match=r"not reached: with all 4 layers [\s\S]* 0\.\d+ of the dense"):
        planner(dense(depth=MixtureOfDepths()), "depth", 0.2, tokens)
    free = MixtureOfDepths(selector=Threshold())
    with pytest.raises(ValueError, match=r"can route no layer: [\s\S]*Allowed: a plugin that can"):
        refusals(dense(depth=MixtureOfDepths(), other=ShortV(placement=All())), "depth")
    with pytest.raises(ValueError, match=r"cannot be planned: [\s\S]*depends on the data[\s\S]*Allowed: a rule"):
        planner(dense(depth=free), "depth", 0.5, tokens)


def test_the_smallest_budget_that_is_offered_is_enough():
    tokens, order = sample().batch["tokens"], [0, 1, 2, 3]
    for share in (0.3, 0.4, 0.5, 0.6):
        subject = dense(depth=MixtureOfDepths(capacity=Constant(share)))
        with pytest.raises(ValueError) as raised:
            planner(subject, "depth", 0.1, tokens)
        offered = str(raised.value).partition(" of the dense FLOPs")[0].rpartition(" ")[2]
        assert len(offered) == 6 and planner(subject, "depth", float(offered), tokens)(order).routed == 4
    assert [upward(share) for share in (0.5, 0.54321, 0.5432)] == ["0.5000", "0.5433", "0.5432"]


@dataclass(frozen=True)
class _Unplaced(MixtureOfDepths):
    placement: None = None


def test_a_plugin_that_is_not_there_is_told_from_those_that_are():
    plugins = {"deep": MixtureOfDepths(), "other": ShortV(), "odd": _Unplaced()}
    assert placeable(plugins, "deep") is plugins["deep"]
    for given, name, said in (
        (plugins, "depth", "there is no 'depth'.\nAllowed: deep, other.\nGive --plugin deep."),
        (plugins, "odd", "'odd' (_Unplaced) has no placement.\nAllowed: deep, other."),
        ({}, "depth", "there is none.\nAdd a --config"),
    ):
        with pytest.raises(ValueError) as raised:
            placeable(given, name)
        assert said in str(raised.value)


def test_a_random_order_is_the_seeds():
    def order(seed):
        options = PlanOptions(out="out", budget=0.5, by="random", seed=seed)
        return [score.mean for score in layer_scores(dense(), [], options)]

    assert order(0) == order(0) != order(1) and len(order(0)) == LAYERS


def test_samples_are_rows_with_a_picture_as_many_as_are_asked_for():
    batches = [training_batch(0, 3, text_only=(1,)), training_batch(1, 3), training_batch(2, 3)]
    data = SimpleNamespace(train_dataloader=lambda: batches)
    subject = replace(dense(), data=data)
    assert [each.rows for each in subject.samples(4)] == [(0, 2), (0, 1)]
    assert sum(len(each.rows) for each in subject.samples(100)) == 8


def test_rows_are_counted_while_they_are_measured(capsys):
    asked = sample(which=(0, 1, 2))
    kept = asked.batch["positions_N"] // asked.batch["tokens"].shape[1] != 1
    batch = {**asked.batch, **{name: asked.batch[name][kept] for name in ("positions_N", "targets_N")}}
    rows = Rows([Sample(batch, asked.rows)], 100, "train")
    used = layer_effects(dense(), rows, "sensitivity")[0].samples
    assert rows.numbers(used) == {"samples": 2, "samples_asked": 100, "samples_unsupervised": 1}
    assert rows.told(used) == "2 rows of train (100 asked); 1 more left out, in which nothing is supervised."
    assert capsys.readouterr().err == "Measuring up to 100 rows of train …\n"
    full = Rows([asked], 3, "val")
    assert layer_effects(dense(), full, "sensitivity")[0].samples == 3 and full.told(3) == "3 rows of val (3 asked)."


def test_the_prefill_whose_cost_is_counted_has_a_picture():
    text, pictured = training_batch(0, 2, text_only=(0, 1)), prompt_batch(0, 3)
    data = SimpleNamespace(val_dataloader=lambda: [text, pictured], train_dataloader=lambda: [training_batch(1, 5)])
    assert replace(dense(), data=data).prompts().shape == pictured["tokens"].shape
    data.val_dataloader = lambda: [text]
    assert replace(dense(), data=data).prompts().shape[0] == 5
    data.train_dataloader = data.val_dataloader
    with pytest.raises(ValueError, match=r"No row of the val and train splits[\s\S]*Allowed: [\s\S]*Give other data"):
        replace(dense(), data=data).prompts()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")

    def said(folder):
        with pytest.raises(ValueError) as raised:
            LayerFiles(folder, "plan").open()
        return str(raised.value).removeprefix(f"--out {folder}: ")

    assert said(tmp_path / "file").startswith("File exists.\nAllowed: a folder that can be written")
    assert said(tmp_path / "file" / "sub").startswith("Not a directory.\nAllowed: ")
    LayerFiles(tmp_path / "new" / "sub", "plan").open()
    assert not any((tmp_path / "new" / "sub").iterdir())

    def denied(dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", denied)
    assert said(tmp_path).startswith("Permission denied.\nAllowed: ")


def test_a_fragment_with_several_lines_typed_is_yaml(tmp_path):
    typed = "plan --x 'one\ntwo: 2\n\nthree'"
    path = LayerFiles(tmp_path, "plan").chosen("depth", (1, 2), typed, {"enabled": True})
    depth = yaml.safe_load(path.read_text())["model"]["init_args"]["plugins"]["depth"]["init_args"]
    assert depth == {"placement": {"class_path": "Layers", "init_args": {"layers": [1, 2]}}, "enabled": True}


def test_options_out_of_range_are_refused():
    for options, said in (
        ({"budget": 1.2}, "--budget 1.2.\nAllowed: a share"),
        ({"budget": 0.5, "samples": 0}, "--samples 0.\nAllowed: at least 1."),
        ({"budget": 0.5, "out": " "}, "--out is empty.\nAllowed: a folder"),
    ):
        with pytest.raises(ValueError) as raised:
            PlanOptions(**{"out": "out", "by": "random", **options})
        assert said in str(raised.value)
