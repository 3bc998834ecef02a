"""Layers whose passed tokens are still attended to, under any rule and with weights that learn."""

import copy
from dataclasses import dataclass

import pytest
import torch

from routing import (
    Constant,
    DepthSelector,
    ExpertChoice,
    LinearRouter,
    RoutedLayer,
    RoutingPlugin,
    Sigmoid,
    TanhNorm,
    Threshold,
    TokenKind,
    Weighting,
    WholeBlock,
    attach,
)
from routing.attended import AttendedLayer, route_attended
from routing.merge import FeedForwardBranch, Merge, ScaledPassing
from tests.compare import PHASES, batch_of, check, check_cached, routed, told
from tests.oracles import best, frozen_row
from tests.tiny import padded, row, tiny_llava

TEXT = (TokenKind.SYSTEM, TokenKind.QUESTION, TokenKind.ANSWER, TokenKind.VISION)
LAYERS = (1, 2, 4, 7)


@dataclass(frozen=True)
class Attended(RoutingPlugin):
    """Some layers whose passed tokens give keys and values."""

    selector: DepthSelector = ExpertChoice()
    weighting: Weighting = Sigmoid()
    merge: Merge = WholeBlock()

    def apply(self, decoder):
        for site in decoder.sites(lambda _: LAYERS):
            gate = decoder.gate(site, LinearRouter(std=0.5), self.weighting, self.selector, Constant(0.5))
            decoder.route_layer(site, gate, self.merge, passed_give="keys_and_values")


RULES = {"ranked": ExpertChoice(), "every_kind": ExpertChoice(TEXT), "threshold": Threshold(TEXT, p=0.5)}


def updated(row, rule, networks):
    """What each layer updates, and the weights of that."""

    def by_layer(number, x):
        if number not in networks:
            return None
        pool = row.vision if rule == "ranked" else list(range(len(row.ids)))
        z = {i: networks[number](x[i]).squeeze() for i in pool}
        if rule == "threshold":
            taken = {i for i in pool if torch.sigmoid(z[i]) > 0.5}
        else:
            taken = {pool[n] for n in best([z[i].item() for i in pool], pool, len(pool) // 2)}
        keep = [i for i in range(len(row.ids)) if i not in pool or i in taken]
        return {i: torch.sigmoid(z[i]) if i in z else 1.0 for i in keep}

    return by_layer


@pytest.mark.parametrize(
    ("rule", "phase", "attention"),
    [(rule, "train", "sdpa") for rule in RULES] + [("ranked", "prefill", "eager"), ("threshold", "prefill", "sdpa")],
)
def test_it_equals_the_loop_oracle_in_values_and_every_gradient(rule, phase, attention):
    model, dense, tape = routed(Attended(selector=RULES[rule]), attention=attention)
    networks = {int(layer): copy.deepcopy(router.network) for layer, router in model.routers["depth"].items()}
    names = {
        f"routers.depth.{n}.network.{name}": p for n, net in networks.items() for name, p in net.named_parameters()
    }
    check((model, dense, tape), phase, lambda row: frozen_row(dense, row.x, updated(row, rule, networks)), names)


@pytest.mark.parametrize(("rule", "attention"), [("ranked", "sdpa"), ("threshold", "eager")])
def test_cached_answers_are_the_uncached_ones(rule, attention):
    model, _, tape = routed(Attended(selector=RULES[rule]), attention=attention)
    check_cached(model, tape)


def test_a_rule_that_ranks_answers_is_refused_behind_a_cache():
    model, _, _ = routed(Attended(selector=RULES["every_kind"]))
    out = model.eval()(**batch_of("prefill"), use_cache=True)
    with pytest.raises(ValueError, match="Layer 1: ExpertChoice ranks tokens among those of one forward"):
        model(input_ids=torch.full((4, 1), 9), past_key_values=out.past_key_values, use_cache=True)


def test_full_capacity_and_weight_one_are_the_dense_layer_bit_for_bit():
    model = tiny_llava()
    attach(model, {"depth": Attended(weighting=TanhNorm(scale=0.0), selector=Threshold(TEXT, p=0.5))})
    batch = padded([row(1, 7), row(1, 7, seed=1)])
    assert torch.equal(model(**batch, use_cache=False).logits, tiny_llava()(**batch, use_cache=False).logits)


@pytest.mark.parametrize("phase", PHASES)
def test_a_forward_that_broke_off_leaves_nothing_to_the_next_one(phase):
    model, _, tape = routed(Attended())
    batch, text = batch_of(phase), padded([row(0, 8)])
    want = model(**text, use_cache=False).logits
    mlp = model.get_decoder().layers[1].mlp.down_proj
    hook = mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), tape.about(told(batch)):
        model(**batch, use_cache=False)
    hook.remove()
    assert tape.tokens is None
    assert torch.equal(model(**text, use_cache=False).logits, want)


def test_checkpointing_changes_no_gradient_and_writes_no_record_twice():
    model, _, tape = routed(Attended())
    replayed = copy.deepcopy(model)
    enable = getattr(replayed, "activation_checkpointing_enable", None) or replayed.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    gradients = []
    for each in (model, replayed):
        own = next(layer.gate.tape for layer in each.get_decoder().layers if isinstance(layer, RoutedLayer))
        assert (own is tape) == (each is model)
        with own.recording() as records:
            each.train()(**batch_of("train"), use_cache=False).loss.backward()
        assert len(records) == len(LAYERS)
        gradients.append({name: p.grad for name, p in each.named_parameters() if p.grad is not None})
    plain, again = gradients
    assert plain.keys() == again.keys() and all(torch.equal(plain[name], again[name]) for name in plain)


@pytest.mark.parametrize("merge", [FeedForwardBranch(), ScaledPassing()])
def test_a_merge_that_scales_the_feed_forward_branch_is_refused(merge):
    with pytest.raises(ValueError, match=f"{type(merge).__name__} scales the feed-forward branch"):
        attach(tiny_llava(), {"depth": Attended(merge=merge)})


def test_classes_keep_their_names_and_are_made_once():
    model, _, _ = routed(Attended())
    layers = [model.get_decoder().layers[number] for number in LAYERS]
    assert len({type(layer) for layer in layers}) == len({type(layer.mlp) for layer in layers}) == 1
    assert all(isinstance(layer, AttendedLayer) for layer in layers)
    assert [type(layers[0]).__name__, type(layers[0].mlp).__name__] == ["LlamaDecoderLayer", "LlamaMLP"]
    plain = tiny_llava().get_decoder().layers[0]
    assert route_attended(plain, plain.mlp, layers[0].gate, WholeBlock()) is plain
