"""Who went to which expert, again by loops over tokens; and the picture of it."""

from __future__ import annotations

from dataclasses import fields
from math import isnan, log2

import numpy as np
import pytest
import torch
from sklearn.metrics import mutual_info_score

from lit_modules.expert_map import CELL, ROW, TOP, ExpertMap, aligned, colours, expert_map
from lit_modules.expert_tally import TEXT, ExpertCounts, ExpertTally, expert_count, expert_loads, width_scalars
from lit_modules.retention_map import UNKNOWN
from lit_modules.tally import KINDS, bits
from plugins.capped_choice import CappedChoice
from routing import Decision, ExpertsChoose, RoutingRecord, Site, TokenChoice, TokenKind, Tokens

V, Q, A, PAD = TokenKind.VISION, TokenKind.QUESTION, TokenKind.ANSWER, TokenKind.PAD
SITE = Site(1, 4, "mlp", "moe")
NAN = float("nan")


def batch(cut: bool = False) -> Tokens:
    """A whole row and a padded one; ``cut``: as seen inside a layer that not all tokens entered."""
    tokens = Tokens.of(torch.tensor([[Q, V, V, V, V, Q, Q, A], [V, V, V, V, Q, A, PAD, PAD]]))
    index, valid = torch.tensor([[0, 1, 3, 5, 6], [0, 2, 4, 5, 1]]), torch.tensor([[True] * 5, [True] * 4 + [False]])
    return tokens.at(index, valid) if cut else tokens


def record(rule, experts: int, seed: int, tokens: Tokens | None = None, site: Site = SITE) -> RoutingRecord:
    tokens = tokens or batch()
    scores = torch.randn(*tokens.shape, experts, generator=torch.Generator().manual_seed(seed))
    scores[..., 0] += 1.5  # one is liked
    scores.requires_grad_()
    weights = scores.softmax(-1)
    decision, candidate = rule(scores, weights, tokens, 1.0), rule.candidate_BT(tokens)
    return RoutingRecord(site, scores, decision, None, tokens, candidate, weights, None, rule)


def by_loops(records: list[RoutingRecord]) -> dict[str, object]:
    """Every number of one site, choice by choice."""
    tokens, pairs, refused, untaken, entropy = dict.fromkeys(KINDS, 0), [], 0, 0, 0.0
    for each in records:
        B, T, E = each.scores_BTE.shape
        got_BTE = each.decision.routed_BTE(T, E)
        for b, t in [(b, t) for b in range(B) for t in range(T) if each.tokens.kind_BT[b, t] != PAD]:
            kind = TokenKind(int(each.tokens.kind_BT[b, t]))
            rule = each.selector
            if isinstance(rule, ExpertsChoose) and kind is V:
                chosen = [e for e in range(E) if got_BTE[b, t, e]]
            else:
                k = rule.others.k if isinstance(rule, ExpertsChoose) else rule.k
                chosen = sorted(range(E), key=lambda e: -each.scores_BTE[b, t, e].item())[:k]
            tokens[kind] += 1
            pairs += [(kind, e) for e in chosen]
            refused += sum(not got_BTE[b, t, e] for e in chosen)
            untaken += not got_BTE[b, t].any()
            entropy -= sum(p * log2(p) for p in each.scores_BTE[b, t].detach().softmax(-1).tolist())
    return {"tokens": tokens, "pairs": pairs, "refused": refused, "untaken": untaken, "entropy": entropy}


RULES = {
    "token_choice": (TokenChoice(2), False, False),
    "experts_choose": (ExpertsChoose(c=1.0), False, True),
    "capped": (CappedChoice(k=1, capacity_factor=0.7), True, True),
}


@pytest.mark.parametrize(("rule", "refuses", "drops"), RULES.values(), ids=RULES)
@pytest.mark.parametrize("cut", [False, True], ids=["all_tokens", "in_a_cut_layer"])
def test_experts_are_counted_choice_by_choice_and_never_padding(rule, refuses, drops, cut):
    records, tally = [record(rule, 4, seed, batch(cut)) for seed in range(8)], ExpertTally()
    for each in records:
        tally.add([each])
    expected = by_loops(records)
    counts = tally.counts(lambda values, _: 2 * values, {"moe": 1})[SITE]  # as if a second rank had seen the same
    assert counts.tokens == {kind: 2 * n for kind, n in expected["tokens"].items()}
    for kind, expert in [(kind, expert) for kind in KINDS for expert in range(4)]:
        assert counts.chosen_KE[KINDS.index(kind), expert] == 2 * expected["pairs"].count((kind, expert))
    assert (counts.refused == 2 * expected["refused"] > 0) if refuses else isnan(counts.refused)
    assert counts.untaken == 2 * expected["untaken"] if drops else isnan(counts.untaken)
    assert expected["untaken"] > 0 or not drops or cut  # of so few tokens each may find an expert
    assert bits([counts]) == pytest.approx(expected["entropy"] / sum(expected["tokens"].values()), rel=1e-5)
    kinds, chosen = zip(*expected["pairs"], strict=True)
    assert counts.information == pytest.approx(mutual_info_score(kinds, chosen) / np.log(2))
    loads, values = [chosen.count(e) for e in range(3)], width_scalars("", [counts])
    assert values["width/load_max"] == pytest.approx(max(loads) / np.mean(loads))
    assert values["width/null"] == pytest.approx(chosen.count(3) / len(chosen))
    assert expert_loads("layer_01_mlp", counts)["width/load/layer_01_mlp/expert_2"] == loads[2] / len(chosen)
    if refuses:
        assert values["width/dropped"] == pytest.approx(expected["refused"] / len(chosen))
    text = [e for kind, e in expected["pairs"] if kind in TEXT]
    assert counts.share_E(TEXT).tolist() == pytest.approx([text.count(e) / len(text) for e in range(4)])


def nowhere(fact):
    """The same on a device that knows shapes alone, so that nothing can be asked of it."""
    if isinstance(fact, torch.Tensor | Tokens):
        return fact.to("meta")
    if isinstance(fact, Decision):
        return type(fact)(*(nowhere(getattr(fact, field.name)) for field in fields(fact)))
    return fact


@pytest.mark.parametrize(("rule", "refuses", "drops"), RULES.values(), ids=RULES)
def test_a_forward_is_counted_without_waiting_and_without_its_graph(rule, refuses, drops):
    one = record(rule, 4, seed=0)
    count = expert_count(RoutingRecord(*(nowhere(getattr(one, field.name)) for field in fields(one))))
    assert count.shape == (len(KINDS) + 3 + len(KINDS) * 4,) and not expert_count(one).requires_grad


def test_sites_with_unlike_numbers_of_experts_are_told_apart():
    other, tally = Site(3, 4, "mlp", "moe"), ExpertTally()
    tally.add([record(TokenChoice(2), 4, 0), record(TokenChoice(2), 6, 1, site=other)])
    counts = tally.counts(lambda values, _: values, {})
    assert [each.experts for each in counts.values()] == [4, 6] and list(counts) == [SITE, other]
    assert [each.choices for each in counts.values()] == [28, 28]
    values = width_scalars("", counts.values())
    assert values["width/load_max"] == pytest.approx(np.mean([each.load_max for each in counts.values()]))
    assert isnan(values["width/null"]) and isnan(values["width/dropped"]) and isnan(values["width/untaken"])
    assert ExpertTally().counts(lambda values, _: values, {}) == {}


def counted(*chosen: tuple[int, ...], nulls: int = 0) -> ExpertCounts:
    """Choices of the experts by system, question, answer and vision tokens."""
    return ExpertCounts(dict.fromkeys(KINDS, 8), np.array(chosen), NAN, NAN, 0.0, nulls)


def test_the_map_has_a_cell_for_each_expert_in_three_panels():
    first, second = (
        counted((0, 0), (3, 1), (0, 0), (1, 3)),
        counted((0, 0, 0), (0, 0, 0), (0, 0, 0), (2, 2, 4), nulls=1),
    )
    assert [kind.name for kind in KINDS] == ["SYSTEM", "QUESTION", "ANSWER", "VISION"]
    drawn = ExpertMap()
    drawn.show(9, {SITE: first, Site(3, 4, "mlp", "moe"): second})
    assert drawn.new
    pixels = drawn.drawn()
    assert not drawn.new and pixels.dtype == np.uint8
    expected = {  # relative to an equal share, by panel, layer and column
        "all": [[1.0, 1.0, NAN], [0.75, 0.75, 1.5]],
        "vision": [[0.5, 1.5, NAN], [0.75, 0.75, 1.5]],
        "text": [[1.5, 0.5, NAN], [NAN, NAN, NAN]],
    }
    corner = next(x for x in range(pixels.shape[1]) if (pixels[TOP + 1, x] == UNKNOWN).all()) + 1
    stride = 3 * CELL + 22
    for number, panel in enumerate(expected.values()):
        for (layer, column), relative in np.ndenumerate(np.array(panel)):
            x, y = corner + number * stride + column * CELL + 2, TOP + layer * ROW + 2
            assert (pixels[y, x] == colours(np.array(relative))).all(), (number, layer, column)


def test_many_experts_have_no_numbers_and_null_ones_stand_last():
    line = aligned(np.array([0.5, 0.3, 0.2]), 1, experts=4, columns=5)
    assert np.array_equal(line, [0.5, 0.3, NAN, NAN, 0.2], equal_nan=True)
    many = ExpertCounts(dict.fromkeys(KINDS, 8), np.ones((4, 64), dtype=int), NAN, NAN, 0.0)
    assert expert_map(["layer_00_mlp"] * 32, [many] * 32, 0).shape[1] < 1100
    nobody = counted(*[(0, 0)] * 4)
    assert isnan(nobody.load_max) and isnan(nobody.information) and expert_map(["layer_00_mlp"], [nobody], 0).size
