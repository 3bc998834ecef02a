"""Experts as a RoutedVLM trains them: whose tokens a loss counts, biases that follow loads, what they start from."""

from dataclasses import replace

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_modules import RoutedVLM, TinyLlava
from lit_modules.auxiliary import Auxiliary
from lit_modules.backbones import Pretrained
from plugins.capped_choice import CappedChoice
from plugins.expert_choice_experts import ExpertChoiceExperts
from plugins.mixture_of_experts import MixtureOfExperts
from plugins.progressive_depths import ProgressiveDepths
from routing import (
    Balanced,
    Copies,
    Cuts,
    Exceeding,
    ExpertsChoose,
    LinearRouter,
    LoadBalance,
    ModalityRouter,
    SelectBy,
    TokenChoice,
    TokenKind,
    Unbounded,
    ZLoss,
    attach,
    load_E,
)
from routing.follow import BalancedRouter
from tests.stub_data import StubData
from tests.tiny import facts, padded, row, tiny_llava

TINY = TinyLlava(layers=4, width=16, heads=2, hidden=32)
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
SPREAD = LinearRouter(bias=False, std=0.5)


def records_of(plugin, rows):
    model = tiny_llava(layers=4)
    tape = attach(model, {"moe": plugin})
    batch = padded(rows)
    with tape.about(facts(batch)), tape.recording() as records:
        model.train()(**batch, use_cache=False)
    return records


@pytest.mark.parametrize("loss", [LoadBalance(0.5), LoadBalance(0.5, "sum", choices="first"), ZLoss(0.5)])
def test_two_ranks_mean_is_the_loss_of_all_tokens(loss):
    rows = [row(1, 9), row(0, 6, seed=1), row(0, 4, seed=2)]
    torch.manual_seed(0)
    plugin = MixtureOfExperts(router=SPREAD, losses=(loss,))
    parts = []
    for own in (rows[:1], rows[1:], rows):
        torch.manual_seed(0)
        parts.append(records_of(plugin, own))
    first, second, whole = parts
    sums = [torch.cat([loss.sums(record) for record in part]) for part in (first, second)]
    mean = (sums[0] + sums[1]) / 2
    plugins = {"moe": plugin}
    got = [Auxiliary()(plugins, part, 0, lambda _: mean) for part in (first, second)]
    want = Auxiliary()(plugins, whole, 0, lambda own: own)
    (name,) = want
    assert torch.allclose((got[0][name] + got[1][name]) / 2, want[name], atol=1e-6)
    alone = {"moe": replace(plugin, losses=(replace(loss, over="rank"),))}
    own = [Auxiliary()(alone, part, 0, lambda _: pytest.fail("ranks were asked"))[name] for part in (first, second)]
    assert not torch.allclose((own[0] + own[1]) / 2, want[name], atol=1e-6)


def test_batches_that_are_accumulated_share_their_loads():
    loss = LoadBalance(1.0)
    plugin = MixtureOfExperts(router=SPREAD, losses=(loss,))
    torch.manual_seed(0)
    first, second = (records_of(plugin, [own]) for own in (row(1, 9), row(0, 6, seed=1)))
    auxiliary, plugins = Auxiliary(), {"moe": plugin}
    auxiliary(plugins, first, 3, lambda own: own)
    (got,) = auxiliary(plugins, second, 3, lambda own: own).values()
    each = []
    for before, record in zip(first, second, strict=True):
        load_E_ = load_E(before) + load_E(record)
        real = record.tokens.valid_BT[..., None]
        probability_E = (record.scores_BTE.softmax(-1) * real).sum((0, 1)) / real.sum()
        each.append(4 * (load_E_ / load_E_.sum() * probability_E).sum())
    assert torch.allclose(got, torch.stack(each).mean())
    (alone,) = auxiliary(plugins, second, 4, lambda own: own).values()  # another step begins anew
    assert torch.allclose(alone, torch.stack([loss(record) for record in second]).mean())


def trained(plugins, **options):
    torch.manual_seed(0)
    module = RoutedVLM(TINY, plugins, parts={"language_model": 1e-3, "routers": 1e-3})
    trainer = Trainer(max_steps=4, limit_val_batches=0, enable_checkpointing=False, **QUIET, **options)
    trainer.fit(module, StubData())
    return module, trainer


def test_a_bias_falls_for_experts_with_more_than_the_mean_once_a_step():
    module, _ = trained({"moe": MixtureOfExperts(router=Balanced(SPREAD, rate=0.1))}, accumulate_grad_batches=2)
    router = module.model.routers["moe"]["0_mlp"]
    assert isinstance(router, BalancedRouter)
    bias_E = router.level_LE[0]
    assert bias_E.abs().max() <= 4 * 0.1 + 1e-6 and bias_E.any() and not router.level_LE[1].any()
    assert torch.allclose((bias_E / 0.1).round(), bias_E / 0.1, atol=1e-4)
    before_E = bias_E.clone()
    router.follow(0, torch.tensor([4.0, 0.0, 2.0, 2.0]))
    assert torch.allclose(router.level_LE[0] - before_E, torch.tensor([-0.1, 0.1, 0.0, 0.0]))


def test_a_checkpoint_holds_the_bias_after_its_step_and_a_resumed_run_ends_with_the_same(tmp_path):
    def fit(start=None):
        torch.manual_seed(0)
        plugins = {"moe": MixtureOfExperts(router=Balanced(SPREAD, rate=0.1))}
        module = RoutedVLM(TINY, plugins, parts={"language_model": 1e-3, "routers": 1e-3})
        saving = ModelCheckpoint(tmp_path / str(start is None), "{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = Trainer(max_steps=3, limit_val_batches=0, callbacks=[saving], **QUIET)
        trainer.fit(module, StubData(batches=1), ckpt_path=start)
        return module.model.routers["moe"]["0_mlp"].level_LE

    whole_LE, place = fit(), "model.routers.moe.0_mlp.level_LE"
    after = [torch.load(tmp_path / f"True/step={n}.ckpt")["state_dict"][place] for n in (1, 2, 3)]
    assert after[0].any() and not torch.equal(after[0], after[1]) and not torch.equal(after[1], after[2])
    assert torch.equal(after[2], whole_LE)
    assert torch.equal(fit(tmp_path / "True/step=2.ckpt"), whole_LE)


def test_a_fit_forgets_what_one_that_broke_off_had_counted():
    class Broken(StubData):
        def train_dataloader(self):
            yield from list(super().train_dataloader())[:2]  # the second is fetched ahead
            raise KeyError("no more")

    def fit(module, data):
        Trainer(max_steps=2, limit_val_batches=0, accumulate_grad_batches=2, enable_checkpointing=False, **QUIET).fit(
            module, data
        )

    levels = []
    for broken in (False, True):
        torch.manual_seed(0)
        module = RoutedVLM(
            TINY,
            {"moe": MixtureOfExperts(router=Balanced(SPREAD, rate=0.1))},
            parts={"routers": 0.0, "experts": 0.0, "projector": 1e-3},
        )
        if broken:
            with pytest.raises(KeyError, match="no more"):
                fit(module, Broken(accumulate=2))
            assert module.following._sums and module.auxiliary._window
        fit(module, StubData(accumulate=2))
        levels.append(module.model.routers["moe"]["0_mlp"].level_LE)
    assert torch.equal(*levels) and levels[0].any()


def test_a_bias_moves_choices_and_no_weight():
    records = []
    for bias in (0.0, 10.0):
        torch.manual_seed(0)
        model = tiny_llava(layers=4)
        tape = attach(model, {"moe": MixtureOfExperts(router=Balanced(SPREAD))})
        model.routers["moe"]["0_mlp"].level_LE[0, 3] = bias
        batch = padded([row(1, 9)])
        with tape.recording() as own:
            model.train()(**batch, use_cache=False)
        records.append(own[0])
    plain, moved = records
    assert torch.equal(plain.scores_BTE, moved.scores_BTE)
    assert (moved.decision.expert_BTK[..., 0] == 3).all() and not (plain.decision.expert_BTK[..., 0] == 3).all()
    probability_BTE, chosen = moved.scores_BTE.softmax(-1), moved.decision
    picked_BTK = probability_BTE.gather(-1, chosen.expert_BTK)
    assert torch.allclose(chosen.weight_BTK, picked_BTK / picked_BTK.sum(-1, keepdim=True), atol=1e-6)


@pytest.mark.parametrize(
    ("plugin", "said"),
    [
        (ExpertChoiceExperts(router=Balanced()), "ExpertsChoose does not read that"),
        (ProgressiveDepths(router=Balanced()), "one score a token"),
        (MixtureOfExperts(router=Balanced(Balanced())), "Balanced and Cuts outermost"),
        (MixtureOfExperts(router=ModalityRouter(Balanced(), Balanced())), "Balanced and Cuts outermost"),
        (ExpertChoiceExperts(selector=ExpertsChoose(others=TokenChoice(9))), "only 4 experts"),
        (MixtureOfExperts(losses=LoadBalance(float("nan"))), "Allowed: finite numbers"),
        (MixtureOfExperts(weighting=Unbounded()), "weights of any sign, and TokenChoice divides"),
        (ExpertChoiceExperts(weighting=Unbounded()), "weights of any sign, and ExpertsChoose divides"),
        (MixtureOfExperts(weighting=Unbounded(), selector=CappedChoice()), "and CappedChoice divides"),
    ],
)
def test_what_nothing_would_read_or_no_objective_bear_is_refused(plugin, said):
    with pytest.raises(ValueError, match=said):
        attach(tiny_llava(), {"own": plugin})


def test_parts_that_say_nothing_of_the_experts_are_refused():
    plugins = {"moe": MixtureOfExperts()}
    for asked in ({"routers": 1e-3}, {"mlp.gate_proj": 1e-3, "routers": 1e-3}):
        with pytest.raises(ValueError, match=r"match none of the 4 weights of experts(.|\n)*experts: 2e-5"):
            RoutedVLM(TINY, plugins, parts=asked).configure_model()
    for asked in ({"experts": 1e-3}, {"experts": 0, "routers": 1e-3}, {"language_model": 1e-3}):
        module = RoutedVLM(TINY, plugins, parts=asked)
        module.configure_model()
        trains = {n for n, p in module.model.named_parameters() if p.requires_grad}
        assert any(".experts." in name for name in trains) == (asked.get("experts") != 0)


def test_experts_start_where_a_run_of_experts_ended_and_are_refused_elsewhere(tmp_path):
    plugins = {"moe": MixtureOfExperts(upcycling=Copies(noise=0.1))}
    module, trainer = trained(plugins)
    trainer.save_checkpoint(tmp_path / "moe.ckpt")
    module.model.save_pretrained(tmp_path / "folder")
    stored = module.model.state_dict()
    for place in ("moe.ckpt", "folder"):
        child = RoutedVLM(TINY, plugins, start_from=str(tmp_path / place))
        child.configure_model()
        assert all(torch.equal(tensor, stored[name]) for name, tensor in child.model.state_dict().items()), place
        for others in ({}, {"moe": MixtureOfExperts(experts=2)}):
            other = RoutedVLM(TINY, others, start_from=str(tmp_path / place))
            with pytest.raises(ValueError, match=r"became experts there, layers\.0\.mlp"):
                other.configure_model()
    again = RoutedVLM(Pretrained(str(tmp_path / "folder")))
    again.configure_model()
    assert again.plugins == plugins
    assert all(torch.equal(tensor, stored[name]) for name, tensor in again.model.state_dict().items())
    with pytest.raises(ValueError, match="became experts there"):
        RoutedVLM(Pretrained(str(tmp_path / "folder")), {}).configure_model()


EVERY = tuple(kind for kind in TokenKind if kind is not TokenKind.PAD)
ALONE = SelectBy(ExpertsChoose(EVERY), Exceeding(), Exceeding())


def test_cuts_follow_the_least_weight_that_an_expert_took():
    rows = [row(1, 9), row(0, 6, seed=1)]
    torch.manual_seed(0)
    model = tiny_llava(layers=4)
    tape = attach(model, {"moe": ExpertChoiceExperts(router=Cuts(SPREAD, rate=0.25), selector=ALONE)})
    batch = padded(rows)
    with tape.about(facts(batch)), tape.recording() as records:
        model.train()(**batch, use_cache=False)
    router, record = model.routers["moe"]["0_mlp"], records[0]
    probability_BTE = record.scores_BTE.softmax(-1)
    least = torch.zeros(2, 4)
    for b, ids in enumerate(rows):
        for e in range(4):
            best = sorted(probability_BTE[b, : len(ids), e].tolist(), reverse=True)
            least[b, e] = best[int(len(ids) * 2 / 4) - 1]
    router.follow(0, router.sums(record))
    assert torch.allclose(router.level_LE[0], least.mean(0), atol=1e-6)  # the first time as it is
    router.follow(0, torch.tensor([2.0, 4.0, 6.0, 8.0, 2.0]))
    assert torch.allclose(router.level_LE[0], least.mean(0) * 0.75 + torch.arange(1, 5) * 0.25, atol=1e-6)
    before = router.level_LE[0].clone()
    router.follow(0, torch.zeros(5))  # nothing was chosen among
    assert torch.equal(router.level_LE[0], before) and router.measured_L.nonzero().tolist() == [[0]]


def test_a_token_takes_the_experts_whose_cuts_its_weights_exceed_and_steps_are_one_forward():
    torch.manual_seed(0)
    model = tiny_llava(layers=4).eval()
    tape = attach(model, {"moe": ExpertChoiceExperts(router=Cuts(SPREAD), selector=ALONE)})
    for router in model.routers["moe"].values():
        router.level_LE[:] = torch.tensor([0.1, 0.3, 2.0, -1.0])
    batch = {k: v for k, v in padded([row(1, 9), row(0, 6, seed=1)], "left").items() if k != "labels"}
    how = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad(), tape.recording() as records:
        stepped = model.generate(**batch, **how)
    assert torch.equal(stepped, model.generate(**batch, **how, use_cache=False))
    for record in records:
        weight_BTE, real_BT1 = record.scores_BTE.softmax(-1), record.tokens.valid_BT[..., None]
        want = (weight_BTE > torch.tensor([0.1, 0.3, 2.0, -1.0])) & real_BT1
        assert torch.equal(record.decision.routed_BTE(weight_BTE.shape[1], 4), want)
        assert torch.equal(load_E(record), want.sum((0, 1)).float())
        assert torch.allclose(record.decision.weight_BTK, weight_BTE * want)


@pytest.mark.parametrize(
    "plugin",
    [
        ExpertChoiceExperts(selector=ALONE),
        ExpertChoiceExperts(router=Cuts()),
        MixtureOfExperts(router=Cuts()),
        MixtureOfExperts(router=Cuts(), selector=Exceeding()),
    ],
)
def test_cuts_that_nothing_reads_or_sets_are_refused(plugin):
    with pytest.raises(ValueError, match="holds weights against cuts"):
        attach(tiny_llava(), {"moe": plugin})


def test_cuts_train_with_the_model():
    module, _ = trained({"moe": ExpertChoiceExperts(router=Cuts(SPREAD), selector=ALONE)})
    router = module.model.routers["moe"]["2_mlp"]
    assert router.measured_L.nonzero().tolist() == [[2]] and (router.level_LE[2] > 0).all()
