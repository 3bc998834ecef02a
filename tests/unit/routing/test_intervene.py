"""Interventions against loops: who is kept by other scores, and that the weights stay the routers' own."""

import copy
import dataclasses

import pytest
import torch

from plugins.fast_v import FastV
from plugins.late_withdrawal import LateWithdrawal
from plugins.mixture_of_depths import MixtureOfDepths
from plugins.progressive_depths import ProgressiveDepths
from plugins.random_depths import RandomDepths
from plugins.shallow_decoder import ShallowDecoder
from plugins.short_v import ShortV
from routing import (
    Constant,
    ExpertChoice,
    Intervention,
    LinearRouter,
    Sigmoid,
    Site,
    Threshold,
    TokenChoice,
    TokenKind,
    Tokens,
    attach,
)
from routing.intervene import SALT, Dense, Oracle, Random, Shuffled, Swapped
from routing.layer import RoutedLayer
from tests.compare import (
    EVIDENCE,
    IDS,
    PHASES,
    ROWS,
    batch_of,
    check,
    check_cached,
    generated,
    positions_of,
    routed,
    told,
)
from tests.oracles import best, drawn, p_mod_count, p_mod_row, p_mod_share
from tests.tiny import IMAGE, PATCHES, padded, tiny_llava

TEXT = (TokenKind.SYSTEM, TokenKind.QUESTION, TokenKind.ANSWER, TokenKind.VISION)
WILD = ProgressiveDepths(router=LinearRouter(std=0.5))
DONORS = [2, 0, 3, 1]  # 32 tokens for 16, 16 for none, 16 for 32, none for 16


def vision(b):
    return [i for i, token in enumerate(ROWS[b]) if token == IMAGE]


def by_chance(b, layer, scores):
    return [drawn(i, IDS[b], layer, 7, SALT) for i in vision(b)]


def shuffled(b, layer, scores):
    after = []
    for start in range(0, len(scores), PATCHES):
        image = range(start, start + PATCHES)
        order = sorted(image, key=lambda n: drawn(vision(b)[n], IDS[b], layer, 7, SALT))
        after += [scores[n] for n in order]
    return after


def by_evidence(b, layer, scores):
    needed = EVIDENCE[b]
    return [-1.0 if needed is None else float(n in needed) for n in range(len(scores))]


INTERVENTIONS = {
    "random": (Random(seed=7), by_chance),
    "shuffled": (Shuffled(seed=7), shuffled),
    "oracle": (Oracle(), by_evidence),
}


@pytest.mark.parametrize("name", INTERVENTIONS)
@pytest.mark.parametrize("phase", PHASES)
def test_values_and_gradients_are_those_of_the_loop_with_other_ranks_and_the_same_weights(name, phase):
    intervention, ranked_by = INTERVENTIONS[name]
    model, dense, tape = routed(WILD)
    routers = {int(layer): copy.deepcopy(router.network) for layer, router in model.routers["depth"].items()}
    names = {f"routers.depth.{n}.network.{name}": p for n, net in routers.items() for name, p in net.named_parameters()}

    def logits_of(row):
        ranks = lambda layer, scores: ranked_by(row.number, layer, scores)  # noqa: E731
        return p_mod_row(dense, routers, row.x, row.ids, ranked_by=ranks)

    with tape.intervening(intervention):
        check((model, dense, tape), phase, logits_of, names)


def recorded(model, tape, intervention, phase="prefill"):
    batch = batch_of(phase)
    with tape.about(told(batch)), tape.intervening(intervention), tape.recording() as records, torch.no_grad():
        model.train(phase == "train")(**batch, position_ids=positions_of(batch), use_cache=False)
    return records, batch["attention_mask"].bool()


@pytest.mark.parametrize("phase", PHASES)
def test_a_swapped_row_keeps_what_was_chosen_for_its_donor(phase):
    model, _, tape = routed(WILD)
    records, real = recorded(model, tape, Swapped(torch.tensor(DONORS)), phase)
    for record in records:
        own = [scores[mask].tolist() for scores, mask in zip(record.scores_BTE[..., 0], real, strict=True)]
        for b, donor in enumerate(DONORS):
            theirs = [own[donor][i] for i in vision(donor)] or [0.0]
            ranks = [theirs[n % len(theirs)] for n in range(len(vision(b)))]
            count = p_mod_count(len(ranks), p_mod_share(record.site.layer, 8))
            want = {vision(b)[n] for n in best(ranks, vision(b), count)}
            kept = record.decision.keep_BT()[b][real[b]].nonzero().flatten().tolist()
            assert set(kept) == want | set(range(len(ROWS[b]))) - set(vision(b))
            weights = record.decision.weight_BT[b][real[b]]
            for i in vision(b):
                torch.testing.assert_close(weights[i], 1 + 0.2 * torch.tanh(torch.tensor(own[b][i])))


def test_a_shuffle_moves_scores_within_an_image_only():
    tokens = told(batch_of("prefill"))
    scores = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(0))
    after = [Shuffled(seed=7).scores_BT(scores, Site(layer, 8, "layer", "depth"), tokens) for layer in range(4)]
    for moved in after:
        assert torch.equal(moved[tokens.image_BT < 0], scores[tokens.image_BT < 0])
        for b in range(len(ROWS)):
            for image in range(int(tokens.image_BT[b].max()) + 1):
                there = tokens.image_BT[b] == image
                assert sorted(moved[b, there].tolist()) == sorted(scores[b, there].tolist())
                assert not torch.equal(moved[b, there], scores[b, there])
    assert len({str(moved.tolist()) for moved in after}) == 4


@torch.no_grad()
def test_a_row_that_routes_text_too_is_shuffled_as_it_is_alone():
    model, _, tape = routed(MixtureOfDepths(router=LinearRouter(std=0.5), selector=ExpertChoice(TEXT)))
    with tape.intervening(Shuffled()):
        batch = batch_of("prefill")
        with tape.about(told(batch)):
            together = model.eval()(**batch, position_ids=positions_of(batch), use_cache=False).logits
        alone = batch_of("prefill", ROWS[:1])
        alone["pixel_values"] = batch["pixel_values"][:1]
        with tape.about(told(alone)):
            want = model(**alone, use_cache=False).logits[0]
    torch.testing.assert_close(together[0][batch["attention_mask"][0].bool()], want, atol=1e-5, rtol=1e-5)


@dataclasses.dataclass(frozen=True)
class Same(Intervention):
    """Ranks by the routers' own scores."""

    own_scores = True

    def scores_BT(self, scores_BT, site, tokens):
        return scores_BT


@pytest.mark.parametrize(
    "plugin",
    [
        WILD,
        ProgressiveDepths(router=LinearRouter(std=5.0), rank_on="weight"),  # saturated weights tie in bfloat16
        MixtureOfDepths(router=LinearRouter(std=0.5), selector=Threshold(TEXT)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_that_are_the_routers_own_change_nothing(plugin, dtype):
    model, _, tape = routed(plugin)
    model.to(dtype).routers.float()
    batch = padded(ROWS)
    batch["pixel_values"] = batch["pixel_values"].to(dtype)
    with torch.no_grad():
        want = model(**batch, use_cache=False).logits
        with tape.intervening(Same()):
            assert torch.equal(model(**batch, use_cache=False).logits, want)


@pytest.mark.parametrize("phase", PHASES)
def test_dense_is_capacity_one_with_the_routers_own_weights(phase):
    (model, _, tape), (full, _, _) = routed(WILD), routed(WILD)
    for layer in full.get_decoder().layers:
        if isinstance(layer, RoutedLayer):
            layer.gate = dataclasses.replace(layer.gate, capacity=Constant(1.0))
    batch = batch_of(phase)
    got, want = (each.train(phase == "train") for each in (model, full))
    with tape.intervening(Dense()):
        dense = got(**batch, use_cache=False).logits
    assert torch.equal(dense, want(**batch, use_cache=False).logits)
    assert not torch.equal(dense, model(**batch, use_cache=False).logits)


@pytest.mark.parametrize("plugin", [ShallowDecoder(), LateWithdrawal(), ShortV(), FastV()])
def test_where_nothing_is_weighted_dense_is_the_dense_model_also_with_a_cache(plugin):
    model, dense, tape = routed(plugin)
    with tape.intervening(Dense()):
        answers, logits, cache = generated(model, tape)
        assert cache.get_seq_length() == max(map(len, ROWS)) + 3
    want, expected, _ = generated(dense, tape)
    assert torch.equal(answers, want)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("plugin", "intervention"),
    [
        (WILD, Dense()),
        (WILD, Random()),
        (WILD, Swapped(torch.tensor(DONORS))),
        (FastV(), Shuffled()),
        (FastV(), Oracle()),
    ],
)
def test_cached_answers_are_the_uncached_ones(plugin, intervention):
    model, _, tape = routed(plugin)
    with tape.intervening(intervention):
        check_cached(model, tape)


def test_a_random_intervention_is_another_draw_than_the_plugin_of_the_same_seed():
    model, _, tape = routed(RandomDepths(seed=7))
    (own, real), (other, _) = (recorded(model, tape, intervention) for intervention in (None, Random(seed=7)))
    for one, two in zip(own, other, strict=True):
        assert not torch.equal(one.decision.keep_BT()[real], two.decision.keep_BT()[real])


def test_layers_that_follow_repeat_the_intervention():
    model, _, tape = routed(FastV())
    records, _ = recorded(model, tape, Random())
    assert [record.site.layer for record in records] == list(range(2, 8))
    assert all(torch.equal(record.decision.keep_BT(), records[0].decision.keep_BT()) for record in records)
    own, _ = recorded(model, tape, None)
    assert not torch.equal(own[0].decision.keep_BT(), records[0].decision.keep_BT())


def test_an_intervention_ends_with_its_block_and_may_nest():
    tape = attach(tiny_llava(), {"depth": WILD})
    outer, inner = Random(), Dense()
    with pytest.raises(ZeroDivisionError), tape.intervening(outer):
        with tape.intervening(inner):
            assert tape.intervention is inner
        assert tape.intervention is outer
        raise ZeroDivisionError
    assert tape.intervention is None


def test_what_an_intervention_cannot_do_is_refused_by_name():
    model, _, tape = routed(WILD)
    batch = batch_of("prefill")
    with tape.intervening(Oracle()), tape.about(told(batch, evidence=False)):
        with pytest.raises(ValueError, match="oracle needs evidence"):
            model(**batch, use_cache=False)
    with tape.intervening(Swapped(torch.tensor([1, 0]))):
        with pytest.raises(ValueError, match="donors for 2 rows, and this batch has 4"):
            model(**batch, use_cache=False)
    tokens, scores = told(batch), torch.zeros(*told(batch).shape, 4)
    with pytest.raises(ValueError, match="layer 3 is routed in width by 'experts'"):
        Random()(
            scores, scores, Site(3, 8, "mlp", "experts"), Sigmoid(), TokenChoice(1, renormalise=False), tokens, 1.0
        )
    with tape.intervening(Oracle()), tape.about(told(batch)):  # nothing is left behind by what was refused
        assert model(**batch, use_cache=False).logits.isfinite().all()


def test_a_threshold_takes_scores_of_others_but_none_of_another_scale():
    model, _, tape = routed(MixtureOfDepths(router=LinearRouter(std=0.5), selector=Threshold()))
    own, _ = recorded(model, tape, None)
    shuffled, _ = recorded(model, tape, Shuffled())
    counts, again = ([record.decision.keep_BT().sum().item() for record in records] for records in (own, shuffled))
    assert counts[0] == again[0]  # deeper layers see other states
    for intervention in (Random(), Oracle()):
        with pytest.raises(ValueError, match="is routed by Threshold, which ranks no tokens"):
            recorded(model, tape, intervention)


def test_generated_tokens_are_decided_on_as_ever():
    tokens = Tokens.of(torch.full((2, 1), TokenKind.ANSWER), phase="decode")
    scores = torch.tensor([[[3.0]], [[-3.0]]])
    for intervention in (Random(), Shuffled(), Oracle(), Swapped(torch.tensor([1, 0]))):
        rule = Threshold(routes=(TokenKind.ANSWER,))
        decision = intervention(scores, scores.sigmoid(), Site(1, 4, "layer", "depth"), Sigmoid(), rule, tokens, 0.5)
        assert decision.keep_BT().tolist() == [[True], [False]]
