"""What routers, rules and merges declare that they need, and what is refused where it is missing."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from plugins.gamma_depths import SkipOrKeep
from plugins.mixture_of_depths import MixtureOfDepths
from plugins.progressive_depths import ProgressiveDepths
from routing import (
    All,
    Between,
    BothBranches,
    Calibrated,
    Constant,
    ExpertChoice,
    Forecast,
    ForecastCrossEntropy,
    LinearRouter,
    MaskedThreshold,
    ModalityRouter,
    Predicted,
    ReceivedAttention,
    Router,
    RouterSpec,
    RoutingPlugin,
    SelectBy,
    Sigmoid,
    Threshold,
    TokenKind,
    TwoHeads,
    attach,
)
from routing.intervene import Swapped
from tests.compare import ROWS, batch_of, routed, told
from tests.tiny import tiny_llava

TEXT = (TokenKind.SYSTEM, TokenKind.QUESTION, TokenKind.ANSWER)
ALL = (TokenKind.VISION, *TEXT)
PRODUCTION = LinearRouter(std=0.5)
FORESEEN = SelectBy(ExpertChoice(ALL), Forecast(ALL), Forecast(ALL))


class Reader(Router):
    """Remembers what it read."""

    normed = True

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear, self.read = nn.Linear(dim, 1), []

    def forward(self, inputs):
        self.read.append(inputs.x_BTD)
        return self.linear(inputs.x_BTD)


@dataclass(frozen=True)
class Reading(RouterSpec):
    def build(self, dim, experts):
        return Reader(dim)


def test_a_router_that_asks_for_it_reads_its_layers_own_norm():
    plugin = MixtureOfDepths(router=Reading(), sharing="shared")
    model, dense, tape = routed(plugin)
    batch = batch_of("train")
    with tape.about(told(batch)):
        out = model.train()(**batch, use_cache=False, output_hidden_states=True)
    out.loss.backward()
    (reader,) = model.routers["depth"].values()
    layers = [1, 3, 5, 7]
    for layer, read in zip(layers, reader.read[:4], strict=True):  # what follows are replays
        norm = dense.get_decoder().layers[layer].input_layernorm
        torch.testing.assert_close(read, norm(out.hidden_states[layer]))
        assert model.get_decoder().layers[layer].gate.norm.weight.grad.any()
    assert "norm" not in "".join(model.routers.state_dict())


@dataclass(frozen=True)
class Scaled(RoutingPlugin):
    def apply(self, decoder):
        decoder.route_layers(Between(3, 3), PRODUCTION, Sigmoid(), ExpertChoice(), Constant(0.5), BothBranches())


def test_a_weight_on_both_branches_scales_attention_before_the_feed_forward_network_sees_it():
    model, dense, tape = routed(Scaled())
    batch = batch_of("train", ROWS[:1])
    with tape.about(told(batch)), tape.recording() as records, torch.no_grad():
        states = model.train()(**batch, use_cache=False, output_hidden_states=True).hidden_states
    kept, layer = records[0].decision, dense.get_decoder().layers[3]
    (index,) = kept.index_BK
    x, g = states[3][:, index], kept.weight_BT[:, index, None]
    angles = dense.get_decoder().rotary_emb(x, position_ids=index[None])
    with torch.no_grad():
        u = x + g * layer.self_attn(layer.input_layernorm(x), position_embeddings=angles, attention_mask=None)[0]
        want = u + g * layer.mlp(layer.post_attention_layernorm(u))
    torch.testing.assert_close(states[4][:, index], want, atol=1e-5, rtol=1e-5)
    passed = [t for t in range(len(ROWS[0])) if t not in index.tolist()]
    assert passed and torch.equal(states[4][:, passed], states[3][:, passed])


def test_a_masked_threshold_is_the_threshold_with_a_slot_for_everyone():
    rule, gradients = Threshold(ALL), []
    for train in (rule, MaskedThreshold(ALL)):
        model, _, tape = routed(MixtureOfDepths(router=PRODUCTION, selector=SelectBy(train, rule, rule)))
        batch = batch_of("train")
        with tape.about(told(batch)), tape.recording() as records:
            loss = model.train()(**batch, use_cache=False).loss
        loss.backward()
        gradients.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
        slots = {record.decision.index_BK.shape[1] for record in records}
        assert slots == {batch["input_ids"].shape[1]} or (train == rule and len(slots) > 1)
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-4)


def test_a_record_tells_what_the_rule_of_decoding_would_do():
    top, alone = ExpertChoice(ALL), Threshold(ALL)
    model, _, tape = routed(MixtureOfDepths(router=PRODUCTION, selector=SelectBy(top, alone, alone)))
    batch = batch_of("train")
    with tape.about(told(batch)), tape.recording() as records, torch.no_grad():
        model.train()(**batch, use_cache=False)
        model.eval()(**batch, use_cache=False)
    trained, asked = records[:4], records[4:]
    for record in trained:
        want = (record.scores_BTE[..., 0].sigmoid() > 0.5) & record.candidate_BT
        assert torch.equal(record.foreseen_BT, want)
        assert not torch.equal(want, record.decision.keep_BT())
    assert all(record.foreseen_BT is None for record in asked)  # it is the rule in force


@pytest.mark.parametrize("plugin", [MixtureOfDepths, ProgressiveDepths])
def test_one_word_gives_vision_and_text_a_router_each(plugin):
    selector = {"selector": ExpertChoice(ALL)} if plugin is MixtureOfDepths else {"routes": ALL}
    model, _, tape = routed(plugin(router=PRODUCTION, modalities="separate", **selector))
    heads = next(iter(model.routers["depth"].values()))
    assert isinstance(heads, TwoHeads)
    assert not torch.equal(heads.vision.network.weight, heads.text.network.weight)
    batch = batch_of("train")
    with tape.about(told(batch)):
        model.train()(**batch, use_cache=False).loss.backward()
    assert heads.vision.network.weight.grad.any() and heads.text.network.weight.grad.any()


@pytest.mark.parametrize("plugin", [MixtureOfDepths(modalities="separate"), ProgressiveDepths(modalities="separate")])
def test_a_router_for_text_that_is_never_asked_is_refused(plugin):
    with pytest.raises(ValueError, match=r"in training it routes VISION.\nAllowed: .*\nWiden routes, or give"):
        attach(tiny_llava(), {"depth": plugin})


@dataclass(frozen=True)
class Foreseeing(Threshold):
    reads = "forecast"


def test_a_rule_that_reads_a_forecast_needs_a_router_that_makes_one():
    with pytest.raises(ValueError, match="Foreseeing reads a forecast, and the router makes none"):
        attach(tiny_llava(), {"depth": MixtureOfDepths(selector=SelectBy(ExpertChoice(), Foreseeing(), Foreseeing()))})


class Telling(Reader):
    normed, forecasts = False, True

    def forecast(self, inputs, scores_BTE):
        return -scores_BTE


@dataclass(frozen=True)
class Told(RouterSpec):
    def build(self, dim, experts):
        return Telling(dim)


@dataclass(frozen=True)
class Positive(Threshold):
    """Reads what it is given, not weights."""

    reads = "forecast"

    def chosen_BT(self, scores_BT, weights_BT, candidate_BT, tokens, capacity):
        return (scores_BT > 0) & candidate_BT


def test_such_a_rule_is_given_the_forecast_and_the_weights_of_the_scores():
    selector = SelectBy(ExpertChoice(), Positive(), Positive())
    model, _, tape = routed(MixtureOfDepths(router=Told(), selector=selector))
    batch = batch_of("prefill")
    with tape.about(told(batch)), tape.recording() as records, torch.no_grad():
        model.eval()(**batch, use_cache=False)
    for record in records:
        kept = record.decision.keep_BT() & record.candidate_BT
        assert torch.equal(kept, (record.scores_BTE[..., 0] < 0) & record.candidate_BT) and kept.any()
        weights = record.scores_BTE[..., 0].sigmoid()
        torch.testing.assert_close(record.decision.weight_BT[kept], weights[kept])
        assert torch.equal(record.forecast_BTE, -record.scores_BTE)


def test_a_bias_starts_where_it_is_told():
    router = LinearRouter(std=0.0, start=3.0).build(8, 1)
    assert router.network.bias.tolist() == [3.0]
    with pytest.raises(ValueError, match="start is the bias's, and there is none"):
        LinearRouter(bias=False, start=1.0)


@pytest.mark.parametrize("spec", [Predicted, Calibrated])
def test_a_forecast_for_two_scorers_is_one(spec):
    forecasts = {"losses": (ForecastCrossEntropy(),)} if spec is Predicted else {}
    plugin = MixtureOfDepths(router=spec(), modalities="separate", selector=FORESEEN, **forecasts)
    model, _, tape = routed(plugin)
    router = model.routers["depth"]["1"]
    assert router.forecasts and isinstance(router.scorer, TwoHeads)
    batch = batch_of("prefill")
    with tape.about(told(batch)), tape.recording() as records, torch.no_grad():
        model.eval()(**batch, use_cache=False)
    assert all(record.forecast_BTE is not None for record in records)


@pytest.mark.parametrize(
    ("plugin", "said"),
    [
        (MixtureOfDepths(router=Predicted(), selector=FORESEEN), r"that no loss teaches.\nAllowed: with Forecast"),
        (MixtureOfDepths(router=Predicted(), selector=Forecast(ALL)), r"in training there would be none to learn"),
        (MixtureOfDepths(router=ModalityRouter(), modalities="separate", selector=ExpertChoice(ALL)), "two of each"),
    ],
)
def test_what_would_never_learn_is_refused(plugin, said):
    with pytest.raises(ValueError, match=said):
        attach(tiny_llava(), {"depth": plugin})


def test_a_forecast_that_is_measured_has_no_loss():
    model, _, tape = routed(MixtureOfDepths(router=Calibrated(), selector=FORESEEN))
    with tape.recording() as records:
        model.train()(**batch_of("train"), use_cache=False)
    with pytest.raises(ValueError, match="is measured, not learned"):
        ForecastCrossEntropy()(records[0])


def test_heads_that_read_attention_say_so():
    seen = MixtureOfDepths(router=ReceivedAttention("all"), modalities="separate", selector=ExpertChoice(ALL))
    model, _, tape = routed(seen)
    with tape.recording() as records, torch.no_grad():
        model.train()(**batch_of("train"), use_cache=False)
    assert model.routers["depth"]["1"].attends == "all" and len(records) == 4


def whole_tensors(router):
    """How many tensors as large as the residual stream a forward keeps under activation checkpointing."""
    model, _, tape = routed(MixtureOfDepths(placement=All(), router=router, selector=ExpertChoice()))
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    batch, kept = batch_of("train"), set()
    whole = torch.Size((*batch["input_ids"].shape, 32))

    def keep(tensor):
        if tensor.shape == whole:
            kept.add(tensor.data_ptr())
        return tensor

    with tape.about(told(batch)), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(**batch, use_cache=False)
    return len(kept)


def test_a_normed_router_keeps_no_more_for_the_backward_pass_than_another_under_checkpointing():
    assert whole_tensors(SkipOrKeep()) <= whole_tensors(PRODUCTION) + 1


def test_rules_inside_rules_are_found():
    inner = SelectBy(ExpertChoice(ALL), Forecast(ALL), Forecast(ALL))
    assert SelectBy(ExpertChoice(ALL), inner, inner).rule("decode").reads == "forecast"


def test_nothing_is_swapped_where_anything_is_refused():
    model = tiny_llava()
    model.get_decoder().layers[3].self_attn = None
    with pytest.raises(ValueError, match="has none of self_attn, attention"):
        attach(model, {"depth": Scaled()})
    assert not hasattr(model, "routers")
    attach(model, {"depth": MixtureOfDepths()})  # who scales no attention needs to find none


@torch.no_grad()
def test_a_choice_swapped_for_ones_own_changes_no_rule_that_reads_a_forecast():
    plugin = MixtureOfDepths(router=Predicted(), selector=FORESEEN, losses=(ForecastCrossEntropy(),))
    model, _, tape = routed(plugin)
    batch, answers = batch_of("prefill"), []
    for intervention in (None, Swapped(torch.arange(len(ROWS)))):
        with tape.about(told(batch)), tape.intervening(intervention):
            answers.append(model.eval()(**batch, use_cache=False).logits)
    assert torch.equal(*answers)
