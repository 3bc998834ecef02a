"""Selectors, decisions, routers and losses against loops."""

import math

import pytest
import torch

from routing import (
    ExpertChoice,
    ExpertChoices,
    KeptTokens,
    LinearRouter,
    LoadBalance,
    MLPRouter,
    ModalityRouter,
    RouterCrossEntropy,
    RouterInputs,
    RoutingRecord,
    SelectBy,
    Sigmoid,
    Site,
    Softmax,
    Threshold,
    TokenChoice,
    TokenKind,
    Tokens,
    ZLoss,
)
from routing.capacity import kept_count
from tests.oracles import best

KINDS = torch.tensor([[1, 4, 4, 4, 4, 2, 3, 0], [0, 0, 1, 4, 4, 4, 2, 3], [1, 1, 2, 2, 2, 3, 3, 3]])


def random_tokens(seed: int) -> Tokens:
    g = torch.Generator().manual_seed(seed)
    kinds = torch.randint(1, 5, (4, 37), generator=g)
    for b, gap in enumerate((0, 3, 11, 20)):
        if gap:
            kinds[b, slice(None, gap) if seed % 2 else slice(-gap, None)] = 0
    return Tokens.of(kinds)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("routes", [(TokenKind.VISION,), (TokenKind.QUESTION, TokenKind.ANSWER), tuple(TokenKind)[1:]])
@pytest.mark.parametrize("ties", [False, True])
def test_expert_choice_keeps_the_best_of_each_row(seed, routes, ties):
    tokens = random_tokens(seed)
    scores = torch.randn(4, 37, 1, generator=torch.Generator().manual_seed(seed))
    if ties:
        scores = scores.round()  # many equal scores
    weights = Sigmoid()(scores)
    decision = ExpertChoice(routes)(scores, weights, tokens, 0.4)
    for b in range(4):
        kinds = tokens.kind_BT[b].tolist()
        real = [t for t, kind in enumerate(kinds) if kind]
        pool = [t for t in real if kinds[t] in routes]
        winners = best(
            [scores[b, t, 0].item() for t in pool], [real.index(t) for t in pool], kept_count(len(pool), 0.4)
        )
        keep = [t for t in real if t not in pool or pool.index(t) in winners]
        valid = decision.valid_BK[b]
        assert decision.index_BK[b][valid].tolist() == keep
        assert not valid[len(keep) :].any()
        assert sorted(set(decision.index_BK[b].tolist())) == sorted(decision.index_BK[b].tolist())
        assert [t for t in range(37) if decision.weight_BT[b, t] != 1] == pool
    assert decision.index_BK.shape[1] == ExpertChoice(routes).bound(tokens, 0.4)


def test_threshold_lets_each_candidate_decide_alone():
    tokens = random_tokens(0)
    scores = torch.randn(4, 37, 1, generator=torch.Generator().manual_seed(5))
    decision = Threshold(p=0.6)(scores, Sigmoid()(scores), tokens, 1.0)
    for b in range(4):
        for t in range(37):
            kind = tokens.kind_BT[b, t].item()
            enters = kind != 0 and (kind != 4 or torch.sigmoid(scores[b, t, 0]) > 0.6)
            assert decision.keep_BT()[b, t] == enters
    assert Threshold().bound(tokens, 1.0) is None


def test_a_row_without_candidates_and_an_empty_selection_keep_the_rest():
    tokens = Tokens.of(KINDS)
    scores = torch.zeros(3, 8, 1)
    decision = ExpertChoice()(scores, torch.ones(3, 8, 1), tokens, 0.1)  # 0 of 4 and 0 of 3 vision tokens
    assert decision.keep_BT().tolist() == ((KINDS != 0) & (KINDS != 4)).tolist()
    nothing = ExpertChoice(tuple(TokenKind)[1:])(scores, torch.ones(3, 8, 1), tokens, 0.01)
    assert nothing.index_BK.shape == (3, 1) and not nothing.valid_BK.any()  # one slot, so that parameters are touched


def test_token_choice_takes_the_best_experts_and_views_agree():
    tokens, scores = Tokens.of(KINDS), torch.randn(3, 8, 4, generator=torch.Generator().manual_seed(0))
    decision = TokenChoice(2)(scores, Softmax()(scores), tokens, 1.0)
    routed = decision.routed_BTE(8, 4)
    for b in range(3):
        for t in range(8):
            top = sorted(range(4), key=lambda e: -scores[b, t, e])[:2] if KINDS[b, t] else []
            assert routed[b, t].nonzero().flatten().tolist() == sorted(top)
    with pytest.raises(ValueError, match="only 4 experts"):
        TokenChoice(5)(scores, scores, tokens, 1.0)
    choices = ExpertChoices(
        torch.tensor([[[2, 0], [1, 3]]]), torch.ones(1, 2, 2), torch.tensor([[[True, True], [True, False]]])
    )
    assert choices.routed_BTE(4, 2)[0].tolist() == [[True, False], [False, True], [True, False], [False, False]]


def test_select_by_follows_the_phase():
    tokens = Tokens.of(KINDS)
    rule = SelectBy(train=ExpertChoice(), prefill=Threshold(), decode=Threshold(p=0.9))
    scores = torch.randn(3, 8, 1, generator=torch.Generator().manual_seed(0))
    weights = Sigmoid()(scores)
    for phase, expected in (("train", rule.train), ("prefill", rule.prefill), ("decode", rule.decode)):
        now = tokens.during(phase, 1.0)
        assert torch.equal(rule(scores, weights, now, 0.5).index_BK, expected(scores, weights, now, 0.5).index_BK)
    assert rule.causal and not SelectBy(Threshold(), Threshold(), ExpertChoice()).causal
    # Only a step after a cache meets earlier tokens that it cannot rank among.
    assert SelectBy(ExpertChoice(), ExpertChoice(), Threshold()).causal


@pytest.mark.parametrize("routes", [(), (TokenKind.PAD,)])
def test_padding_is_never_routed(routes):
    with pytest.raises(ValueError, match="padding is never routed"):
        ExpertChoice(routes)


def test_ties_fall_alike_whatever_the_padding():
    short = Tokens.of(torch.tensor([[2] * 9]))
    right, left = Tokens.of(torch.tensor([[2] * 9 + [0] * 4])), Tokens.of(torch.tensor([[0] * 4 + [2] * 9]))
    order = short.tie_order_BT[0].tolist()
    assert right.tie_order_BT[0, :9].tolist() == order
    assert [t - 4 for t in left.tie_order_BT[0, :9].tolist()] == order


@pytest.mark.parametrize("autocast", [False, True])
def test_routers_score_in_float32_whatever_autocast_says(autocast):
    x = torch.randn(3, 8, 16, generator=torch.Generator().manual_seed(0))
    tokens = Tokens.of(KINDS)
    for spec in (LinearRouter(std=1.0), MLPRouter(hidden=8, std=1.0), ModalityRouter()):
        router = spec.build(16, 3)
        want = router(RouterInputs(x, tokens, [], Site(0, 2, "layer", "depth")))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            got = router(RouterInputs(x, tokens, [], Site(0, 2, "layer", "depth")))
        assert got.dtype == torch.float32 and torch.equal(got, want)


def test_separate_routers_each_score_their_own_modality():
    router = ModalityRouter(LinearRouter(std=1.0), LinearRouter(std=1.0)).build(16, 1)
    x, tokens = torch.randn(3, 8, 16), Tokens.of(KINDS)
    inputs = RouterInputs(x, tokens, [], Site(0, 2, "layer", "depth"))
    scores, vision, text = router(inputs), router.vision(inputs), router.text(inputs)
    for b in range(3):
        for t in range(8):
            assert scores[b, t] == (vision if KINDS[b, t] == 4 else text)[b, t]


def record(scores: torch.Tensor, decision) -> RoutingRecord:
    return RoutingRecord(Site(0, 2, "layer", "depth"), scores, decision, 0.5, Tokens.of(KINDS), KINDS != TokenKind.PAD)


def test_losses_equal_loops_over_real_tokens():
    scores = torch.randn(3, 8, 4, generator=torch.Generator().manual_seed(2))
    real = [(b, t) for b in range(3) for t in range(8) if KINDS[b, t]]
    choice = TokenChoice(2)(scores, Softmax()(scores), Tokens.of(KINDS), 1.0)
    z = sum(math.log(sum(math.exp(s) for s in scores[b, t])) ** 2 for b, t in real) / len(real)
    assert ZLoss()(record(scores, choice)).item() == pytest.approx(z, rel=1e-5)
    load = [sum(choice.routed_BTE(8, 4)[b, t, e].item() for b, t in real) / (2 * len(real)) for e in range(4)]
    mean = [sum(scores[b, t].softmax(-1)[e].item() for b, t in real) / len(real) for e in range(4)]
    balance = 4 * sum(f * p for f, p in zip(load, mean, strict=True))
    assert LoadBalance()(record(scores, choice)).item() == pytest.approx(balance, rel=1e-5)
    one = scores[..., :1]
    kept = ExpertChoice()(one, Sigmoid()(one), Tokens.of(KINDS), 0.5)
    assert isinstance(kept, KeptTokens)
    entropy = 0.0
    for b, t in real:
        p = one[b, t, 0].sigmoid().item()
        entropy -= math.log(p if kept.keep_BT()[b, t] else 1 - p) / len(real)
    assert RouterCrossEntropy()(record(one, kept)).item() == pytest.approx(entropy, rel=1e-5)
    with pytest.raises(ValueError, match="LoadBalance balances experts"):
        LoadBalance()(record(one, kept))
    with pytest.raises(ValueError, match="one score per token"):
        RouterCrossEntropy()(record(scores, choice))
