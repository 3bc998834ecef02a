"""What a token seen alone knows of the top-k: predictors, calibrated thresholds, and the rule that reads them."""

from __future__ import annotations

import warnings
from math import exp, log

import pytest
import torch

from plugins.mixture_of_depths import MixtureOfDepths
from routing import (
    Constant,
    Every,
    ExpertChoice,
    KeptTokens,
    Layers,
    LinearRouter,
    ModalityRouter,
    RouterInputs,
    RoutingRecord,
    SelectBy,
    Site,
    Threshold,
    TokenKind,
    Tokens,
    attach,
)
from routing.forecast import MOST_LAYERS, Calibrated, Forecast, ForecastCrossEntropy, Predicted
from tests.compare import ROWS, batch_of, generated, told
from tests.tiny import facts, padded, row, tiny_llava

S, Q, A, V, P = (TokenKind[name] for name in ("SYSTEM", "QUESTION", "ANSWER", "VISION", "PAD"))
EVERYTHING = (S, Q, A, V)
WILD = LinearRouter(std=0.5)
TOKENS = Tokens.of(torch.tensor([[S, V, V, V, Q, A], [V, V, Q, A, P, P]]))
BY_FORECAST = SelectBy(ExpertChoice(EVERYTHING), Forecast(EVERYTHING), Forecast(EVERYTHING))


def inputs_at(layer: int = 1, phase: str = "train", dtype: torch.dtype = torch.float32) -> RouterInputs:
    x_BTD = torch.randn(*TOKENS.shape, 8, generator=torch.Generator().manual_seed(layer)).to(dtype)
    return RouterInputs(x_BTD.requires_grad_(), TOKENS.during(phase, 1.0), [], Site(layer, 8, "layer", "depth"))


def routed(router, layers: int = 4, selector=BY_FORECAST, **settings):
    model = tiny_llava(layers)
    torch.manual_seed(1)
    settings["losses"] = (ForecastCrossEntropy(),) if isinstance(router, Predicted) else ()
    return model, attach(model, {"depth": MixtureOfDepths(router=router, selector=selector, **settings)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_prediction_is_the_small_networks_of_each_token_alone_in_float32(dtype):
    torch.manual_seed(0)
    router, inputs = Predicted(WILD, hidden=5).build(8, 1), inputs_at(dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        scores_BT1 = router(inputs)
        forecast_BT1 = router.forecast(inputs, scores_BT1)
    assert scores_BT1.dtype is forecast_BT1.dtype is torch.float32
    first, _, last = router.predictor.network
    for b in range(2):
        for t in range(6):
            x = inputs.x_BTD[b, t].detach().float()
            hidden = [float(w @ x + c) for w, c in zip(first.weight, first.bias, strict=True)]
            hidden = torch.tensor([h * 0.5 * (1 + torch.erf(torch.tensor(h / 2**0.5))) for h in hidden])
            assert float(forecast_BT1[b, t]) == pytest.approx(float(last.weight[0] @ hidden + last.bias), abs=1e-5)
            assert float(scores_BT1[b, t]) == pytest.approx(float(router.scorer.network(x)), abs=1e-5)


def test_forecasting_routers_ask_for_what_their_scorer_asks_for():
    class Attending(LinearRouter):
        def build(self, dim, experts):
            router = super().build(dim, experts)
            router.attends, router.normed = "last", True
            return router

    for spec in (Predicted(Attending()), Calibrated(Attending())):
        router = spec.build(8, 1)
        assert router.forecasts and router.attends == "last" and router.normed
    assert not Predicted().build(8, 1).normed and Calibrated(ModalityRouter()).build(8, 1).attends is None


@pytest.mark.parametrize("p", [0.3, 0.5])
def test_whom_the_forecast_favours_enters_with_the_routers_weight(p):
    rule, g = Forecast((V, A), p), torch.Generator().manual_seed(0)
    forecast_BT1, weights_BT1 = torch.randn(2, 6, 1, generator=g), torch.rand(2, 6, 1, generator=g)
    decision = rule(forecast_BT1, weights_BT1, TOKENS, 0.5)
    for b in range(2):
        for t, kind in enumerate(TOKENS.kind_BT[b].tolist()):
            enters = 1 / (1 + exp(-float(forecast_BT1[b, t]))) > p if kind in (V, A) else kind != P
            assert bool(decision.keep_BT()[b, t]) == enters
            assert decision.weight_BT[b, t] == (weights_BT1[b, t] if kind in (V, A) else 1)
    assert rule.causal and rule.reads == "forecast" and rule.kept(TOKENS, 0.5) is None


@pytest.mark.parametrize("p", [0.0, 1.0, float("nan")])
def test_a_probability_is_needed(p):
    with pytest.raises(ValueError, match=r"Forecast\(p=.*probability in \(0, 1\)"):
        Forecast(p=p)


def test_the_loss_is_the_mean_over_candidates_of_what_a_loop_sums():
    forecast_BT1 = torch.randn(2, 6, 1, generator=torch.Generator().manual_seed(3)).requires_grad_()
    keep_BT, candidate_BT = torch.rand(2, 6) > 0.5, TOKENS.mask((V, A))
    decision = KeptTokens.of(keep_BT & TOKENS.valid_BT, torch.ones(2, 6), 6)
    site = Site(3, 8, "layer", "depth")
    record = RoutingRecord(site, torch.zeros(2, 6, 1), decision, 0.5, TOKENS, candidate_BT, forecast_BTE=forecast_BT1)
    terms = []
    for b, t in candidate_BT.nonzero().tolist():
        probability = 1 / (1 + exp(-float(forecast_BT1[b, t])))
        terms.append(-log(probability if keep_BT[b, t] else 1 - probability))
    assert float(ForecastCrossEntropy()(record)) == pytest.approx(sum(terms) / len(terms), abs=1e-6)
    nobody = RoutingRecord(
        site, torch.zeros(2, 6, 1), decision, 0.5, TOKENS, candidate_BT & False, forecast_BTE=forecast_BT1
    )
    assert float(ForecastCrossEntropy()(nobody)) == 0
    with pytest.raises(ValueError, match=r"router of layer 3 .*'depth'.* makes no forecast"):
        ForecastCrossEntropy()(RoutingRecord(site, torch.zeros(2, 6, 1), decision, 0.5, TOKENS, candidate_BT))


@pytest.mark.parametrize("sharing", ["separate", "shared"])
def test_the_loss_teaches_the_predictor_and_nothing_else_and_the_model_the_rest(sharing):
    model, tape = routed(Predicted(WILD), sharing=sharing)
    with tape.recording() as records:
        loss = model.train()(**padded(ROWS), use_cache=False).loss
    sum(ForecastCrossEntropy()(record) for record in records).backward(retain_graph=True)
    taught = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert taught == {name for name, _ in model.named_parameters() if ".predictor." in name}
    model.zero_grad()
    loss.backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert not moved & taught and {n for n, _ in model.named_parameters() if ".scorer." in n} <= moved


def calibrated(cut: float):
    """Layers 1 and 3, above and below ``cut``."""
    model, tape = routed(Calibrated(WILD))
    for layer, shift in ((1, 0.1), (3, -0.1)):
        model.routers["depth"][str(layer)].calibrate(layer, cut + shift)
    return model, tape


def predicted(_: float):
    model, tape = routed(Predicted(WILD))
    for router in model.routers["depth"].values():
        torch.nn.init.normal_(router.predictor.network[-1].weight, std=2.0)
    return model, tape


@pytest.mark.parametrize("make", [predicted, calibrated])
@torch.no_grad()
def test_decoding_by_forecasts_with_a_cache_is_one_forward(make):
    model, tape = make(0.05)
    with tape.recording() as records:
        answers, logits, _ = generated(model, tape, new=6)
    stepped = torch.cat([r.decision.keep_BT() for r in records if r.tokens.phase == "decode"]).float().mean()
    assert 0.1 < stepped < 0.9  # both ways are taken
    batch = batch_of("prefill")
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, 6), value=1)
    ids, positions = torch.cat([batch["input_ids"], answers], 1), (mask.cumsum(1) - 1).clamp_min(0)
    with tape.about(told(batch)):
        whole = {**batch, "input_ids": ids, "attention_mask": mask}
        once = model(**whole, position_ids=positions, use_cache=False)
    torch.testing.assert_close(logits, once.logits[:, -7:-1], atol=1e-5, rtol=1e-5)


def test_a_trained_predictor_tells_the_top_k_of_rows_it_never_saw():
    model, tape = routed(Predicted(WILD), placement=Layers((1, 3)), capacity=Constant(0.5))
    trained = [p for name, p in model.named_parameters() if ".predictor." in name]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    held_out = padded([row(1, 9, seed=n) for n in range(900, 908)], seed=99)

    def agreement() -> list[float]:
        with tape.recording() as records, torch.no_grad():
            model.train()(**held_out, use_cache=False)
        return [float((r.foreseen_BT == r.decision.keep_BT())[r.candidate_BT].float().mean()) for r in records]

    before = agreement()
    for step in range(40):
        batch = padded([row(1, 9, seed=8 * step + n) for n in range(8)], seed=step)
        with tape.recording() as records:
            model.train()(**batch, use_cache=False)
        sum(ForecastCrossEntropy()(record) for record in records).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert max(before) < 0.7 and min(agreement()) > 0.8  # by chance 0.5


def test_a_calibrated_forecast_is_the_score_beyond_the_cut_of_that_layer():
    router = Calibrated(WILD).build(8, 1)
    router.calibrate(1, 0.25)
    router.calibrate(4, -1.5)
    for layer, cut in ((1, 0.25), (4, -1.5), (2, 0.0)):
        inputs = inputs_at(layer)
        scores_BT1 = router(inputs)
        forecast_BT1 = router.forecast(inputs, scores_BT1)
        torch.testing.assert_close(forecast_BT1, scores_BT1.detach() - cut)
        assert not forecast_BT1.requires_grad and scores_BT1.requires_grad


def said(router, layer: int, phase: str) -> list[str]:
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        router.forecast(inputs_at(layer, phase), router(inputs_at(layer, phase)))
    return [str(one.message) for one in heard]


def test_what_nobody_calibrated_is_said_once_and_only_where_it_matters():
    fresh, router = Calibrated(WILD).build(8, 1), Calibrated(WILD).build(8, 1)
    router.calibrate(1, 0.25)
    assert not said(router, 1, "decode") and not said(router, 2, "train")
    (message,) = said(router, 2, "prefill")
    assert "'depth' decides by thresholds that nobody calibrated" in message and "CalibrateThresholds" in message
    assert not said(router, 2, "decode")
    assert said(fresh, 1, "prefill") == [message]  # one text, which Python shows once
    fresh.load_state_dict(router.state_dict())
    assert torch.equal(fresh.cut_L, router.cut_L)
    assert not said(fresh, 1, "decode") and said(fresh, 2, "decode")


def test_more_layers_than_cuts_are_refused():
    router = Calibrated().build(8, 1)
    with pytest.raises(ValueError, match=f"layer {MOST_LAYERS} is routed.\nAllowed: layers 0 to {MOST_LAYERS - 1}"):
        router.calibrate(MOST_LAYERS, 0.0)


def test_a_rule_that_reads_forecasts_is_refused_where_the_router_makes_none():
    with pytest.raises(ValueError, match="'depth': Forecast reads a forecast, and the router makes none"):
        routed(WILD)
    routed(WILD, selector=SelectBy(ExpertChoice(), ExpertChoice(), Threshold()))
    with pytest.raises(ValueError, match="hidden must be at least 1"):
        Predicted(hidden=0)


def test_a_forecast_leaves_the_top_k_what_it_is():
    batch = padded(ROWS)
    logits = []
    for spec in (WILD, Predicted(WILD), Calibrated(WILD)):
        model, tape = routed(spec, selector=ExpertChoice(EVERYTHING), placement=Every(2, start=1))
        torch.manual_seed(2)
        for name, parameter in model.routers.named_parameters():
            if "predictor" not in name:
                torch.nn.init.normal_(parameter, std=0.5)
        with tape.about(facts(batch)):
            logits.append(model.train()(**batch, use_cache=False).logits)
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])
