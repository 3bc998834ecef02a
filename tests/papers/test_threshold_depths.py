"""Threshold routing in the style of MoDification (arXiv 2410.14268) against a loop over rows, layers and tokens."""

import copy
from dataclasses import replace

import pytest
import torch

from plugins.threshold_depths import ThresholdDepths, ThresholdLoad
from routing import ExpertChoices, LinearRouter, RoutingRecord, Site, Threshold, TokenKind, Tokens
from tests.compare import PHASES, batch_of, check, generated, positions_of, routed, told
from tests.laws.models import gated, gradients, questions
from tests.tiny import IMAGE, PATCHES, padded, row, tiny_llava

TEXT = (TokenKind.SYSTEM, TokenKind.QUESTION, TokenKind.ANSWER, TokenKind.VISION)
WILD = LinearRouter(std=0.5)
ALL = ThresholdDepths(routes=TEXT, router=WILD)
LAYERS = (1, 3, 5, 7)


def threshold_row(model, routers, row, routes_all, p=0.5):
    """Logits of one unpadded row, layer by layer and gate by gate."""
    decoder, x = model.get_decoder(), row.x
    cos, sin = decoder.rotary_emb(x[None], position_ids=torch.arange(len(x))[None])
    for number, layer in enumerate(decoder.layers):
        gate = dict.fromkeys(range(len(x)), torch.ones(()))
        if number % 2:
            router = routers["shared" if "shared" in routers else str(number)]
            for i in row.vision + row.text * routes_all:
                head = (router.vision if i in row.vision else router.text) if hasattr(router, "text") else router
                gate[i] = torch.sigmoid(head.network(x[i]).squeeze())
                if not gate[i] > p:
                    del gate[i]
        keep = sorted(gate)
        if not keep:
            continue
        g = torch.stack([gate[i] for i in keep])[:, None]
        h = layer.input_layernorm(x[keep][None])
        attended = layer.self_attn(h, attention_mask=None, position_embeddings=(cos[:, keep], sin[:, keep]))[0]
        u = x[keep] + g * attended[0]
        y = dict(zip(keep, u + g * layer.mlp(layer.post_attention_layernorm(u)), strict=True))
        x = torch.stack([y.get(i, x[i]) for i in range(len(x))])
    return model.lm_head(decoder.norm(x))


WAYS = {
    "vision": {},
    "shared router": {"sharing": "shared"},
    "all": {"routes": TEXT},
    "two heads": {"routes": TEXT, "modalities": "separate"},
    "high": {"routes": TEXT, "p": 0.8},
}


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("phase", PHASES)
def test_the_plugin_equals_the_loop_oracle_in_values_and_every_gradient(name, phase):
    plugin = ThresholdDepths(router=WILD, **WAYS[name])
    model, dense, tape = routed(plugin)
    own = copy.deepcopy(model.routers)
    routers = {f"routers.{key}": parameter for key, parameter in own.named_parameters()}
    routes_all = len(plugin.routes) > 1
    check(
        (model, dense, tape),
        phase,
        lambda row: threshold_row(dense, own["depth"], row, routes_all, plugin.p),
        routers,
    )


def recorded(model, tape, phase="prefill", tokens=told, **changes):
    """Output and records, in training or of left-padded prompts."""
    batch = {**batch_of(phase), **changes}
    if phase == "prefill":
        batch["position_ids"] = positions_of(batch)
    with tape.about(tokens(batch)), tape.recording() as records:
        output = model.train(phase == "train")(**batch, use_cache=False, output_hidden_states=True)
    return output, records


@pytest.mark.parametrize("phase", PHASES)
def test_every_token_enters_at_p_0_and_at_p_1_a_routed_layer_is_the_identity(phase):
    model, _, tape = routed(replace(ALL, p=0.0))
    _, records = recorded(model, tape, phase)
    assert [record.site.layer for record in records] == [*LAYERS]
    assert all(torch.equal(record.decision.keep_BT(), record.tokens.valid_BT) for record in records)
    model, _, tape = routed(replace(ALL, p=1.0))
    output, records = recorded(model, tape, phase)
    assert not any(record.decision.keep_BT().any() for record in records)
    for layer in LAYERS[:-1]:  # the last state is normed
        assert torch.equal(output.hidden_states[layer + 1], output.hidden_states[layer])
        assert not torch.equal(output.hidden_states[layer], output.hidden_states[layer - 1])
    if phase == "train":
        output.loss.backward()  # DDP waits for every gradient, also of layers that nobody enters
        routed_layers = [p for layer in LAYERS for p in model.get_decoder().layers[layer].parameters()]
        assert all(p.grad is not None and not p.grad.any() for p in [*routed_layers, *model.routers.parameters()])


@torch.no_grad()
@pytest.mark.parametrize("phase", PHASES)
def test_a_later_token_changes_neither_output_nor_routing_of_earlier_ones(phase):
    model, _, tape = routed(ALL)
    ids = batch_of(phase)["input_ids"]
    before, then = recorded(model, tape, phase)
    for b, t in [(1, 34), (1, 36), (2, 35), (0, 36)] if phase == "prefill" else [(0, 18), (1, 1), (2, 33), (3, 23)]:
        assert ids[b, t] not in (0, IMAGE)
        changed = ids.clone()
        changed[b, t] = 6 + (ids[b, t] - 5) % 120
        after, now = recorded(model, tape, phase, input_ids=changed)
        torch.testing.assert_close(after.logits[b, :t], before.logits[b, :t], atol=1e-5, rtol=0)
        assert not torch.allclose(after.logits[b, t], before.logits[b, t], atol=1e-2)
        for old, new in zip(then, now, strict=True):
            assert torch.equal(old.decision.keep_BT()[b, :t], new.decision.keep_BT()[b, :t])


def gathering(plugin):
    """The plugin with the rule of inference in training too."""
    model, _, tape = routed(plugin)
    for layer in gated(model):
        layer.gate = replace(layer.gate, selector=Threshold(plugin.routes, plugin.p))
    return model, tape


def test_training_with_a_mask_equals_training_by_gathering_and_asks_the_device_nothing():
    masked, _, tape = routed(ALL)
    gathered, other = gathering(ALL)
    (one, of_mask), (two, of_gather) = recorded(masked, tape, "train"), recorded(gathered, other, "train")
    real = batch_of("train")["attention_mask"].bool()
    torch.testing.assert_close(one.logits[real], two.logits[real], atol=1e-5, rtol=1e-5)
    for mask, gather in zip(of_mask, of_gather, strict=True):
        assert torch.equal(mask.decision.keep_BT(), gather.decision.keep_BT())
        assert mask.decision.index_BK.shape == real.shape and gather.decision.index_BK.shape[1] < real.shape[1]
    expected = gradients(gathered)
    for name, gradient in gradients(masked).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    batch = batch_of("train")
    asked = []
    for model, about in ((tiny_llava(), tape), (masked, tape), (gathered, other)):
        with about.about(told(batch)):
            asked.append(questions(lambda model=model: model.train()(**batch, use_cache=False)))
    assert asked[1] == asked[0] and asked[2] == asked[0] + len(LAYERS)


@pytest.mark.parametrize("routes", [TEXT, (TokenKind.VISION,)])
def test_cached_decoding_is_one_forward_and_each_layer_holds_the_kept_tokens_alone(routes):
    model, _, tape = routed(ThresholdDepths(routes=routes, router=WILD))
    new = 6
    with tape.recording() as records:
        answers, logits, cache = generated(model, tape, new=new)
    batch = batch_of("prefill")
    ids = torch.cat([batch["input_ids"], answers], dim=1)
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, new), value=1)
    once, whole = None, {**batch, "input_ids": ids, "attention_mask": mask}
    with torch.no_grad(), tape.about(told(batch)), tape.recording() as again:
        once = model(**whole, position_ids=positions_of(whole), use_cache=False).logits[:, -new - 1 : -1]
    torch.testing.assert_close(logits, once, atol=1e-5, rtol=0)
    for layer, record in zip(LAYERS, again, strict=True):
        held = cache.layers[layer]
        kept = record.decision.keep_BT()[:, :-1]  # the last token was never read
        assert torch.equal(held.valid_BS.sum(1), kept.sum(1))
        stepwise = torch.cat([r.decision.keep_BT() for r in records if r.site.layer == layer], dim=1)
        assert torch.equal(stepwise, kept) or routes != TEXT  # a step that asks nobody writes nothing
    assert cache.layers[0].keys.shape[-2] == ids.shape[1] - 1
    alone = {name: value for name, value in padded([row(1, 9)]).items() if name != "labels"}
    with torch.no_grad(), tape.recording() as records:
        cache = model(**alone, use_cache=True).past_key_values
    for layer, record in zip(LAYERS, records, strict=True):
        assert cache.layers[layer].keys.shape[-2] == record.decision.keep_BT().sum() < 1 + PATCHES + 9


def test_each_head_routes_its_own_modality():
    model, _, tape = routed(replace(ALL, modalities="separate"))
    _, (before, *_) = recorded(model, tape)
    head = model.routers["depth"]["1"]
    torch.nn.init.constant_(head.vision.network.bias, 100.0)
    _, (after, *_) = recorded(model, tape)
    vision = before.tokens.mask([TokenKind.VISION])
    old, new = before.decision.keep_BT(), after.decision.keep_BT()
    assert new[vision].all() and not old[vision].all() and torch.equal(old[~vision], new[~vision])
    torch.nn.init.constant_(head.text.network.bias, -100.0)
    _, (last, *_) = recorded(model, tape)
    assert torch.equal(last.decision.keep_BT(), vision)


V, Q, A, PAD = TokenKind.VISION, TokenKind.QUESTION, TokenKind.ANSWER, TokenKind.PAD


def record_of(scores, kinds, p=0.5):
    """A vision token enters where sigmoid(score) > p; all others always do."""
    tokens = Tokens.of(torch.tensor(kinds))
    decision = Threshold(p=p)(scores[..., None], scores[..., None].sigmoid(), tokens, 0.0)
    return RoutingRecord(Site(1, 8, "layer", "depth"), scores[..., None], decision, None, tokens, tokens.mask([V]))


SCORES = torch.tensor([[9.0, 1.0, -2.0, 0.5, -9.0, 9.0], [0.3, -0.1, 7.0, 7.0, 9.0, -9.0]])
KINDS = [[Q, V, V, V, Q, PAD], [V, V, Q, A, PAD, PAD]]
MINE = {(0, 1), (0, 2), (0, 3), (1, 0), (1, 1)}  # three of these five enter


@pytest.mark.parametrize("target", [0.0, 0.4, 0.6, 0.9])
def test_the_load_closes_gates_above_its_target_and_opens_them_below(target):
    scores = SCORES.clone().requires_grad_()
    load = ThresholdLoad(target=target)(record_of(scores, KINDS))
    gates = [1 / (1 + torch.exp(-SCORES[place])) for place in MINE]
    assert load.item() == pytest.approx((3 / 5 - target) * sum(g.item() for g in gates) / 5, abs=1e-6)
    load.backward()
    for b in range(2):
        for t in range(6):
            slope = scores.grad[b, t].item()  # descent moves the score the other way
            assert (slope > 0) == ((b, t) in MINE and target < 0.6 - 1e-6), (b, t)
            assert (slope < -1e-6) == ((b, t) in MINE and target > 0.6 + 1e-6), (b, t)


def test_a_load_of_nobody_is_zero_with_a_graph_and_nonsense_is_refused():
    scores = torch.zeros(1, 3, requires_grad=True)
    load = ThresholdLoad(target=0.5)(record_of(scores, [[Q, A, PAD]]))
    load.backward()
    assert load.item() == 0 and not scores.grad.any()
    whole = torch.zeros(1, 1, 2, dtype=torch.long)
    wide = replace(record_of(scores, [[Q, A, PAD]]), decision=ExpertChoices(whole, whole.float(), whole.bool()))
    with pytest.raises(ValueError, match="routed in width by 'depth'"):
        ThresholdLoad()(wide)
    for wrong in ({"target": 1.0}, {"target": -0.1}, {"weight": -1.0}):
        with pytest.raises(ValueError, match="share in \\[0, 1\\)"):
            ThresholdLoad(**wrong)
    with pytest.raises(ValueError, match="p in \\[0, 1\\]"):
        ThresholdDepths(p=1.5)


@pytest.mark.parametrize(("target", "low", "high"), [(0.0, 0.0, 0.2), (0.5, 0.3, 0.7)])
def test_a_load_that_weighs_enough_does_not_let_routing_collapse_to_dense(target, low, high):
    load = ThresholdLoad(weight=3.0, target=target)
    model, _, tape = routed(ThresholdDepths(losses=(load,)), layers=4)
    batch = padded([row(1, 9), row(2, 4, seed=2)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    shares = []
    for _ in range(24):
        with tape.recording() as records:
            loss = model.train()(**batch, use_cache=False).loss
        assert all(record.capacity is None for record in records)
        kept = sum((r.decision.keep_BT() & r.candidate_BT).sum().item() for r in records)
        shares.append(kept / (len(records) * 3 * PATCHES))
        (loss + load.weight * torch.stack([load(record) for record in records]).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert shares[0] == 1 and low <= sum(shares[-8:]) / 8 <= high, shares
