"""Gates: what they ask, what they write, and those that repeat another one's decision."""

from dataclasses import dataclass

import pytest
import torch

from routing import (
    All,
    AllOrNothing,
    Between,
    Constant,
    ExpertChoice,
    FeedForwardBranch,
    FollowingGate,
    Gate,
    LinearRouter,
    Nothing,
    Router,
    RoutingPlugin,
    RoutingTape,
    Sigmoid,
    Site,
    Threshold,
    TokenKind,
    Tokens,
    Unscored,
    Unweighted,
    WholeBlock,
    attach,
)
from routing.intervene import Dense
from tests.compare import ROWS, batch_of, check_cached, routed, told
from tests.oracles import tie_rank
from tests.tiny import padded, tiny_llava

V, Q, A, P = TokenKind.VISION, TokenKind.QUESTION, TokenKind.ANSWER, TokenKind.PAD
TOKENS = Tokens.of(torch.tensor([[Q, V, V, V, V, A], [Q, Q, V, V, P, P], [Q, A, A, P, P, P]]))
EVERYTHING = (TokenKind.SYSTEM, Q, A, V)


class Inquisitive(Router):
    """Scores 0, and remembers what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.shown = []

    def forward(self, inputs):
        self.shown.append(inputs)
        return torch.zeros(*inputs.tokens.shape, 1)


def gate_at(layer, selector, capacity, router=None, tape=None):
    tape = tape or RoutingTape()
    tape.begin(TOKENS)
    return Gate(Site(layer, 8, "layer", "depth"), router or Inquisitive(), Unweighted(), selector, capacity, tape)


@pytest.mark.parametrize(("capacity", "there"), [(Constant(1.0), True), (Constant(0.99), False), (Nothing(), False)])
@pytest.mark.parametrize("routes", [(V,), EVERYTHING])
def test_all_or_nothing_takes_all_candidates_at_capacity_one_and_none_below(capacity, there, routes):
    selector = AllOrNothing(routes)
    gate = gate_at(3, selector, capacity)
    decision = gate(torch.zeros(*TOKENS.shape, 8))
    routed_BT = TOKENS.mask(routes)
    assert torch.equal(decision.keep_BT(), TOKENS.valid_BT & (~routed_BT | there))
    assert gate.kept(TOKENS) == tuple(decision.keep_BT().sum(1).tolist())
    assert decision.index_BK.shape[1] == max(1, *gate.kept(TOKENS))
    counts = gate.kept(TOKENS)  # with gradients, a layer of nobody has a slot, and it is empty
    assert selector.causal and gate.ragged(TOKENS) == (len(set(counts)) > 1 or not any(counts))
    assert Nothing()(0.3, 0.5) == 0.0
    with gate.tape.intervening(Dense()):
        assert gate.kept(TOKENS) == (6, 4, 3)
        assert torch.equal(gate(torch.zeros(*TOKENS.shape, 8)).keep_BT(), TOKENS.valid_BT)


def test_tokens_without_a_router_tie_and_are_not_weighted():
    router = Unscored().build(8, 1)
    decision = gate_at(3, ExpertChoice(), Constant(0.5), router)(torch.randn(*TOKENS.shape, 8, dtype=torch.bfloat16))
    assert not list(router.parameters())
    assert decision.weight_BT.dtype is torch.bfloat16 and (decision.weight_BT == 1).all()
    for b, vision in enumerate([[1, 2, 3, 4], [2, 3], []]):
        kept = set(decision.keep_BT()[b].nonzero().flatten().tolist()) & set(vision)
        assert kept == set(sorted(vision, key=tie_rank)[: len(vision) // 2])


def test_a_router_is_shown_its_site_the_earlier_records_and_no_attention_it_did_not_ask_for():
    tape, router = RoutingTape(), Inquisitive()
    first, second = (gate_at(layer, ExpertChoice(), Constant(0.5), router, tape) for layer in (1, 4))
    tape.begin(TOKENS)
    tape.attention[3] = torch.zeros(TOKENS.shape)
    x = torch.zeros(*TOKENS.shape, 8)
    first(x), second(x)
    assert [shown.site for shown in router.shown] == [first.site, second.site]
    assert [record.site for record in router.shown[1].records] == [first.site]  # in a replay too
    assert [record.site for record in tape.earlier] == [first.site, second.site]
    assert all(shown.attention_BT is None for shown in router.shown)
    router.attends = "all"
    assert second(x) and router.shown[-1].attention_BT is tape.attention[3]


def test_a_follower_repeats_its_leader_and_signs_with_its_own_site():
    tape, router = RoutingTape(), Inquisitive()
    leader = gate_at(2, ExpertChoice(), Constant(0.5), router, tape)
    follower = FollowingGate(
        Site(5, 8, "layer", "depth"), router, leader.weighting, leader.selector, leader.capacity, tape, leader.site
    )
    x = torch.zeros(*TOKENS.shape, 8)
    with tape.recording() as records:
        assert follower.kept(TOKENS) == leader.kept(TOKENS)
        decision = leader(x)
        assert follower(x + 1) is decision
    assert len(router.shown) == 1
    assert [record.site for record in records] == [leader.site, follower.site]
    assert records[1].scores_BTE is records[0].scores_BTE and records[1].capacity == records[0].capacity == 0.5
    tape.end()
    with pytest.raises(RuntimeError, match="Layer 5 is routed by 'depth' but knows nothing about its tokens"):
        follower(x)


@dataclass(frozen=True)
class Thinned(RoutingPlugin):
    """One decision at layer 2 for all layers from there on, by a router that learns."""

    selector: ExpertChoice | Threshold = ExpertChoice()

    def apply(self, decoder):
        first, *later = decoder.sites(Between(2, -1))
        gate = decoder.gate(first, LinearRouter(std=0.5), Sigmoid(), self.selector, Constant(0.5))
        decoder.route_layer(first, gate, WholeBlock())
        for site in later:
            decoder.route_layer(site, decoder.follow(site, gate), WholeBlock())


@pytest.mark.parametrize("selector", [ExpertChoice(), Threshold(), Threshold(EVERYTHING)])
def test_a_decision_that_is_followed_is_one_router_and_decodes_with_a_cache(selector):
    model, _, tape = routed(Thinned(selector))
    assert list(model.routers["depth"]) == ["2"]
    batch = batch_of("train")
    with tape.about(told(batch)), tape.recording() as records:
        model.train()(**batch, use_cache=False).loss.backward()
    assert len(records) == 6 and len({id(record.decision) for record in records}) == 1
    assert model.routers["depth"]["2"].network.weight.grad.any()
    check_cached(model, tape)


def test_an_untouched_merge_lets_tokens_enter_as_they_are():
    x = torch.randn(*TOKENS.shape, 8)
    for merge in (WholeBlock(), FeedForwardBranch()):
        assert merge.entering(x, TOKENS) is x and not merge.mixes


@dataclass(frozen=True)
class Emptied(RoutingPlugin):
    """No token enters any layer."""

    def apply(self, decoder):
        for site in decoder.sites(All()):
            gate = decoder.gate(site, Unscored(), Unweighted(), AllOrNothing(EVERYTHING), Nothing())
            decoder.route_layer(site, gate, WholeBlock())


def test_a_decoder_that_nobody_enters_is_its_head_with_and_without_gradients():
    model = tiny_llava()
    attach(model, {"depth": Emptied()})
    batch = padded(ROWS)
    out = model.train()(**batch, use_cache=False, output_hidden_states=True)
    want = model.lm_head(model.get_decoder().norm(out.hidden_states[0]))
    torch.testing.assert_close(out.logits, want)
    out.loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.get_decoder().layers.parameters())
    with torch.no_grad():
        cached = model.eval()(**batch, use_cache=True)
    assert torch.equal(cached.logits, out.logits)
    assert cached.past_key_values.get_seq_length() == batch["input_ids"].shape[1]
    assert all(layer.keys is None for layer in cached.past_key_values.layers)
