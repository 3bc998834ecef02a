"""Selectors of width against loops over tokens and experts."""

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from routing import ExpertsChoose, TokenChoice, TokenKind, Tokens, count_of, load_E
from routing.decision import MixedChoices
from routing.tape import RoutingRecord, Site
from tests.oracles import tie_rank

P, S, Q, A, V = TokenKind
TEXT = (TokenKind.SYSTEM, TokenKind.QUESTION, TokenKind.ANSWER)
EVERY = (*TEXT, TokenKind.VISION)


def scored(kinds: list[list[int]], E: int = 4, seed: int = 0, phase="train") -> tuple[Tensor, Tensor, Tokens]:
    """Scores and weights, ready for gradients, and the facts."""
    tokens = Tokens.of(torch.tensor(kinds), phase=phase)
    scores_BTE = torch.randn(*tokens.shape, E, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    return scores_BTE, scores_BTE.softmax(-1), tokens


def record(scores_BTE: Tensor, decision, tokens: Tokens) -> RoutingRecord:
    return RoutingRecord(Site(0, 1, "mlp", "moe"), scores_BTE, decision, None, tokens, tokens.valid_BT)


MIXED = [[Q, V, V, V, V, V, Q, A], [V, V, V, Q, A, P, P, P], [Q, Q, A, P, P, P, P, P]]


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_tokens_take_their_best_experts_and_weigh_them_by_probability(k, renormalise):
    if k == 1 and renormalise:
        return
    scores_BTE, weights_BTE, tokens = scored(MIXED)
    decision = TokenChoice(k, renormalise)(scores_BTE, weights_BTE, tokens, 1.0)
    for b, kinds in enumerate(MIXED):
        for t, kind in enumerate(kinds):
            order = sorted(range(4), key=lambda e: (-scores_BTE[b, t, e].item(), e))[:k]
            assert decision.expert_BTK[b, t].tolist() == order
            assert decision.valid_BTK[b, t].tolist() == [kind != P] * k
            weights = [weights_BTE[b, t, e].item() for e in order]
            want = [w / sum(weights) if renormalise else w for w in weights]
            assert decision.weight_BTK[b, t].tolist() == pytest.approx(want if kind != P else [0.0] * k, abs=1e-6)


def test_equal_scores_fall_to_the_lower_expert_and_a_wide_k_takes_all():
    tokens = Tokens.of(torch.tensor([[Q, Q]]))
    scores_BTE = torch.tensor([[[1.0, 2, 2, 1], [0, 0, 0, 0]]])
    assert TokenChoice(2)(scores_BTE, scores_BTE.softmax(-1), tokens, 1.0).expert_BTK.tolist() == [[[1, 2], [0, 1]]]
    assert TokenChoice(4)(scores_BTE, scores_BTE.softmax(-1), tokens, 1.0).weight_BTK.sum(-1).tolist() == [[1, 1]]


def test_what_cannot_be_is_refused_with_what_to_do():
    with pytest.raises(ValueError, match="renormalise: false"):
        TokenChoice(1)
    with pytest.raises(ValueError, match="at least 1 expert"):
        TokenChoice(0)
    with pytest.raises(ValueError, match="only 4 experts"):
        TokenChoice(5)(*scored(MIXED), 1.0)
    for wrong in ({"routes": ()}, {"routes": (P,)}, {"c": 0.0}, {"c": float("nan")}, {"c": float("inf")}):
        with pytest.raises(ValueError, match="Allowed"):
            ExpertsChoose(**wrong)


@pytest.mark.parametrize("rule", [TokenChoice(2), TokenChoice(1, False), ExpertsChoose(), ExpertsChoose(EVERY, 1.0)])
def test_weighing_again_gives_the_same_weights_and_gradients_without_choosing_again(rule):
    scores_BTE, weights_BTE, tokens = scored(MIXED)
    first = rule(scores_BTE, weights_BTE, tokens, 1.0)

    def gradient(decision) -> Tensor:
        own, taken = (decision.tokens, decision.experts) if isinstance(decision, MixedChoices) else (decision, None)
        total = own.weight_BTK.square().sum() + (0 if taken is None else taken.weight_BEC.square().sum())
        return torch.autograd.grad(total, scores_BTE, retain_graph=True)[0]

    again = rule.weighed(first.detached(), weights_BTE)
    assert torch.equal(gradient(first), gradient(again)) and gradient(first).any()
    T, E = scores_BTE.shape[1:]
    assert torch.equal(first.routed_BTE(T, E), again.routed_BTE(T, E))


def taken_by_loops(scores: Tensor, kinds: list[int], routes, c: float) -> tuple[dict[int, list[int]], int]:
    """Which tokens of a row each expert takes, best first, and C."""
    E, weights = scores.shape[1], scores.softmax(-1)
    real = [t for t, kind in enumerate(kinds) if kind != P]
    candidates = [t for t in real if kinds[t] in routes]
    C = min(max(int(len(candidates) * c / E), 1), len(candidates))
    best = {
        e: sorted(candidates, key=lambda t, e=e: (-weights[t, e].item(), tie_rank(real.index(t))))[:C] for e in range(E)
    }
    return best, C


@pytest.mark.parametrize("c", [0.1, 1.0, 2.0, 3.3, 9.0])
@pytest.mark.parametrize("routes", [(V,), (Q, A), EVERY], ids=["vision", "text", "all"])
def test_experts_take_their_best_candidates_of_each_row_and_the_rest_choose(routes, c):
    scores_BTE, weights_BTE, tokens = scored(MIXED)
    decision = ExpertsChoose(routes, c)(scores_BTE, weights_BTE, tokens, 1.0)
    own = TokenChoice()(scores_BTE, weights_BTE, tokens, 1.0)
    for b, kinds in enumerate(MIXED):
        best, C = taken_by_loops(scores_BTE[b].detach(), kinds, routes, c)
        for e in range(4):
            valid = decision.experts.valid_BEC[b, e]
            assert valid.tolist() == [True] * C + [False] * (len(valid) - C)
            assert decision.experts.token_BEC[b, e, :C].tolist() == best[e]
            want = [weights_BTE[b, t, e].item() for t in best[e]]
            assert decision.experts.weight_BEC[b, e].tolist() == pytest.approx(want + [0.0] * (len(valid) - C))
        chooses = torch.tensor([kind != P and kind not in routes for kind in kinds])
        assert torch.equal(decision.tokens.valid_BTK[b], chooses[:, None].expand(-1, 2))
        assert torch.equal(decision.tokens.expert_BTK[b], own.expert_BTK[b])


@pytest.mark.parametrize(("n", "c", "E", "C"), [(8, 2, 4, 4), (576, 2, 4, 288), (576, 1, 8, 72), (7, 2, 4, 3)])
def test_loads_are_equal_and_exactly_n_c_over_e(n, c, E, C):
    scores_BTE, weights_BTE, tokens = scored([[V] * n], E)
    decision = ExpertsChoose(c=c)(scores_BTE, weights_BTE, tokens, 1.0)
    assert load_E(record(scores_BTE, decision, tokens)).tolist() == [C] * E
    assert all(len(set(row.tolist())) == C for row in decision.experts.token_BEC[0])  # no token twice


@pytest.mark.parametrize(("c", "E"), [(0.7, 2), (1.1, 3), (2.0, 6), (3.3, 7), (1.2, 16)])
def test_host_and_device_agree_on_how_many(c, E):
    for n in range(1, 400):
        candidate_BT = torch.ones(1, n, dtype=torch.bool)
        device = torch.minimum(count_of(candidate_BT, c / E).clamp_min(1), candidate_BT.sum(1)).item()
        assert ExpertsChoose(c=c).room(n, E) == device == min(max(math.floor(Fraction(str(c)) * n / E), 1), n)


def test_a_longer_row_gives_no_room_to_a_shorter_one():
    kinds = [[V] * 180 + [P] * 20, [V] * 200]
    for rows in (kinds[:1], kinds):
        scores_BTE, weights_BTE, tokens = scored(rows, E=2)
        decision = ExpertsChoose(c=0.7)(scores_BTE, weights_BTE, tokens, 1.0)
        assert decision.experts.valid_BEC[0].sum(1).tolist() == [63, 63]


def test_equal_scores_are_taken_evenly_over_the_row_whatever_the_padding():
    kinds = [V] * 12
    want, _ = taken_by_loops(torch.zeros(12, 4), kinds, (V,), 2.0)
    for before, after in ((0, 0), (0, 5), (3, 0)):
        tokens = Tokens.of(torch.tensor([[P] * before + kinds + [P] * after]))
        scores_BTE = torch.zeros(1, len(kinds) + before + after, 4)
        decision = ExpertsChoose()(scores_BTE, scores_BTE.softmax(-1), tokens, 1.0)
        assert (decision.experts.token_BEC[0] - before).tolist() == [want[e] for e in range(4)]


def test_a_row_decides_as_it_does_alone():
    scores_BTE, weights_BTE, tokens = scored(MIXED)
    together = ExpertsChoose()(scores_BTE, weights_BTE, tokens, 1.0).routed_BTE(8, 4)
    for b, kinds in enumerate(MIXED):
        real = [kind for kind in kinds if kind != P]
        alone = Tokens.of(torch.tensor([real]))
        x = scores_BTE[b : b + 1, : len(real)]
        got = ExpertsChoose()(x, x.softmax(-1), alone, 1.0).routed_BTE(len(real), 4)
        assert torch.equal(together[b, : len(real)], got[0]) and not together[b, len(real) :].any()


def test_a_batch_without_candidates_leaves_all_to_the_tokens():
    scores_BTE, weights_BTE, tokens = scored([[Q, A, A], [Q, P, P]])
    decision = ExpertsChoose()(scores_BTE, weights_BTE, tokens, 1.0)
    assert decision.experts.token_BEC.shape == (2, 4, 0)
    assert torch.equal(decision.tokens.valid_BTK[..., 0], tokens.valid_BT)
    assert load_E(record(scores_BTE, decision, tokens)).sum() == 2 * 4


def test_loads_count_choices_of_real_tokens_or_their_first_alone():
    scores_BTE, weights_BTE, tokens = scored(MIXED)
    decision = TokenChoice(2)(scores_BTE, weights_BTE, tokens, 1.0)
    for which, k in (("all", 2), ("first", 1)):
        want = [0] * 4
        for b, kinds in enumerate(MIXED):
            for t, kind in enumerate(kinds):
                for e in decision.expert_BTK[b, t, :k].tolist() if kind != P else []:
                    want[e] += 1
        assert load_E(record(scores_BTE, decision, tokens), which).tolist() == want


@pytest.mark.parametrize("rule", [TokenChoice(2), ExpertsChoose(), ExpertsChoose(EVERY)])
def test_at_most_so_many_answers_are_told_beforehand(rule):
    scores_BTE, weights_BTE, tokens = scored(MIXED)
    told = rule.answers(tokens.count(EVERY), tokens, 4)
    routed = rule(scores_BTE, weights_BTE, tokens, 1.0).routed_BTE(8, 4)
    assert all(most >= n for most, n in zip(told, routed.sum((1, 2)).tolist(), strict=True))
    assert told == tuple(routed.sum((1, 2)).tolist())
