"""Received attention against loops and against what Hugging Face returns, and what watching it may not touch."""

import copy
import dataclasses

import pytest
import torch

import routing.attention
from plugins.attention_depths import AttentionDepths
from plugins.fast_v import FastV
from plugins.pyramid_drop import PyramidDrop
from plugins.short_v import ShortV
from routing import Layers, ReceivedAttention, RoutedLayer, RouterInputs, Site, TokenKind, Tokens
from routing.attention import CHUNK, prompt, received
from tests.compare import ROWS, batch_of, generated, positions_of, routed, told
from tests.tiny import padded, row, tiny_llava
from tests.unit.routing.test_families import build

WATCHING = {"fast_v": FastV(), "pyramid": PyramidDrop(), "a_mod": AttentionDepths()}
LONG = CHUNK + 21


def loop(query, key, scale, asking, allowed):
    """(K) of one row: mean over heads and asking queries; ``allowed(i, j)`` lets query i see key j."""
    heads, K, _ = query.shape
    total = [0.0] * K
    for i in (i for i in range(K) if asking[i]):
        for head in range(heads):
            seen = [j for j in range(K) if allowed(i, j)]
            logits = torch.stack([query[head, i] @ key[head // (heads // len(key)), j] for j in seen]) * scale
            for j, weight in zip(seen, logits.softmax(0).tolist(), strict=True):
                total[j] += weight / heads / int(asking.sum())
    return torch.tensor(total)


@pytest.mark.parametrize("most", ["one", "all"])
@pytest.mark.parametrize(
    ("K", "form", "scaling"),
    [
        *((7, form, scaling) for form in ("none", "boolean", "additive", "flash") for scaling in (None, 0.2)),
        (LONG, "none", None),
        (LONG, "additive", None),
    ],
)
def test_received_is_the_mean_over_heads_and_asking_queries(K, most, form, scaling):
    g = torch.Generator().manual_seed(K)
    query, key = torch.randn(3, 4, K, 8, generator=g), torch.randn(3, 2, K, 8, generator=g)
    valid = torch.ones(3, K, dtype=torch.bool)
    valid[1, :2] = valid[2, -3:] = False
    asking = valid & (torch.rand(3, K, generator=g) < (0.1 if K == LONG else 0.5))
    asking[2] = False  # nobody asks
    if most == "one":
        asking = asking & (asking.cumsum(1) == 1)
    boolean = valid[:, None, None, :] & torch.ones(K, K, dtype=torch.bool).tril() | torch.eye(K, dtype=torch.bool)
    additive = torch.zeros(3, 1, K, K).masked_fill(~boolean, torch.finfo(torch.float32).min)
    mask = {"none": None, "boolean": boolean, "additive": additive, "flash": valid.long()}[form]
    got = received(query, key, mask, scaling, asking, valid, 1 if most == "one" else K)
    scale = 8**-0.5 if scaling is None else scaling
    for b in range(3):
        want = loop(query[b], key[b], scale, asking[b], lambda i, j, b=b: j <= i and bool(valid[b, j]))
        torch.testing.assert_close(got[b], want, atol=1e-6, rtol=1e-5)
    assert got.dtype is torch.float32 and not got[2].any()


@pytest.mark.parametrize("name", ["fast_v", "a_mod"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_scores_are_what_hugging_face_says_was_attended_to(name, attention):
    (model, _, tape), dense = routed(WATCHING[name], attention=attention), tiny_llava(attention="eager")
    batch = batch_of("prefill")
    positions = positions_of(batch)
    with tape.about(told(batch)), tape.recording() as records:
        model.eval()(**batch, position_ids=positions, use_cache=False)
    weights = dense.eval()(**batch, position_ids=positions, use_cache=False, output_attentions=True).attentions
    first = records[0]
    paid = weights[first.site.layer - 1].mean(1)
    for b, mask in enumerate(batch["attention_mask"].bool()):
        asking = mask.nonzero().flatten().tolist()
        asking = asking[-1:] if name == "fast_v" else asking
        torch.testing.assert_close(first.scores_BTE[b, :, 0], paid[b, asking].mean(0), atol=1e-6, rtol=1e-4)
    assert not first.scores_BTE.requires_grad


@pytest.mark.parametrize("family", ["LlavaNext", "Qwen2VL", "Gemma3"])
@torch.no_grad()
def test_another_family_is_watched_without_a_line_of_its_own(family):
    ids = torch.tensor([[1] + [5] * 16 + [9, 10, 11, 12], [1] + [9] * 20])
    dense, model = build(family), build(family)
    dense.set_attn_implementation("eager")
    tape = routing.attach(model, {"depth": FastV()})
    with tape.recording() as records:
        model(input_ids=ids, use_cache=False)
    weights = dense(input_ids=ids, use_cache=False, output_attentions=True).attentions[1]
    torch.testing.assert_close(records[0].scores_BTE[..., 0], weights.mean(1)[:, -1], atol=1e-6, rtol=1e-4)


def test_a_later_question_of_a_conversation_does_not_ask():
    kinds = [0, 1, 4, 4, 2, 3, 3, 2, 3]
    assert prompt(Tokens.of(torch.tensor([kinds, [1, 2, 4, 0, 0, 0, 0, 0, 0]]))).tolist() == [
        [False, True, True, True, True, False, False, False, False],
        [True, True, True] + [False] * 6,
    ]


def test_tokens_that_did_not_enter_score_below_all_others():
    model, _, tape = routed(WATCHING["pyramid"])
    batch = batch_of("train")
    with tape.about(told(batch)), tape.recording() as records:
        model(**batch, use_cache=False)
    before = {record.site.layer: record.decision.keep_BT() for record in records}
    for record in records:
        if record.site.layer in (4, 6):
            scores, there = record.scores_BTE[..., 0], before[record.site.layer - 1]
            assert (scores[~there] < 0).all() and (scores[there] >= 0).all()


def test_in_a_layer_of_frozen_tokens_all_of_them_are_seen():
    alone, _, tape = routed(FastV())
    frozen = tiny_llava()
    both = routing.attach(frozen, {"frozen": ShortV(placement=Layers((1,))), "depth": FastV()})
    batch, scores = batch_of("prefill"), []
    for model, own in ((alone, tape), (frozen, both)):
        with torch.no_grad(), own.about(told(batch)), own.recording() as records:
            model.eval()(**batch, position_ids=positions_of(batch), use_cache=False)
        scores.append(next(record.scores_BTE for record in records if record.site.layer == 2))
    torch.testing.assert_close(*scores)


@pytest.mark.parametrize("name", WATCHING)
def test_checkpointing_changes_no_gradient(name):
    model, _, _ = routed(WATCHING[name])
    replayed = copy.deepcopy(model)
    enable = getattr(replayed, "activation_checkpointing_enable", None) or replayed.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    gradients = []
    for each in (model, replayed):
        each.train()(**batch_of("train"), use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in each.named_parameters() if p.grad is not None})
    plain, again = gradients
    assert plain.keys() == again.keys() and all(torch.equal(plain[name], again[name]) for name in plain)


def tapes(model):
    return {
        id(layer.gate.tape): layer.gate.tape for layer in model.get_decoder().layers if isinstance(layer, RoutedLayer)
    }


@torch.no_grad()
def test_a_deep_copy_writes_to_a_tape_and_asks_a_configuration_of_its_own():
    model, _, tape = routed(FastV())
    copied = copy.deepcopy(model)
    (own,) = tapes(copied).values()
    assert own is not tape and list(tapes(model)) == [id(tape)]
    assert copied.get_decoder().layers[1].self_attn.observer.tape is own
    batch = padded([row(1, 9)])
    want = model.eval()(**batch, use_cache=False).logits
    with tape.recording() as records, own.recording() as others:
        assert torch.equal(copied.eval()(**batch, use_cache=False).logits, want)
    assert not records and len(others) == 6
    model.set_attn_implementation("eager")  # the copy's own stays sdpa, whose causal masks are none
    assert torch.equal(copied(**batch, use_cache=False).logits, want)
    copied.set_attn_implementation("eager")
    torch.testing.assert_close(copied(**batch, use_cache=False).logits, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", WATCHING)
@torch.no_grad()
def test_the_attention_implementation_may_change_after_routing(name):
    model, _, tape = routed(WATCHING[name])
    batch = batch_of("prefill")
    how = {"position_ids": positions_of(batch), "use_cache": False}
    real = batch["attention_mask"].bool()
    with tape.about(told(batch)):
        want = model.eval()(**batch, **how).logits[real]
        model.set_attn_implementation("eager")
        out = model(**batch, **how, output_attentions=True)
        torch.testing.assert_close(out.logits[real], want, atol=1e-5, rtol=1e-5)
        assert len(out.attentions) == 8  # the eager function, which alone returns weights, ran in all layers
        answers, logits, _ = generated(model, tape)
        model.set_attn_implementation("sdpa")
        torch.testing.assert_close(model(**batch, **how).logits[real], want, atol=0, rtol=0)
    again, others, _ = generated(model, tape)
    assert torch.equal(answers, again)
    torch.testing.assert_close(logits, others, atol=1e-5, rtol=1e-5)


def test_decoding_computes_no_attention_a_second_time(monkeypatch):
    model, _, tape = routed(WATCHING["a_mod"])
    calls = []
    monkeypatch.setattr(routing.attention, "received", lambda *args: calls.append(args[0].shape) or received(*args))
    generated(model, tape, new=6)
    assert len(calls) == 4  # of layers 0, 2, 4 and 6, once each
    assert not tape.attention and tape.tokens is None


def test_a_router_that_saw_nothing_says_so():
    router = ReceivedAttention("last").build(8, 1)
    assert not list(router.parameters()) and router.attends == "last"
    tokens = Tokens.of(torch.tensor([[TokenKind.VISION] * 3]))
    inputs = RouterInputs(torch.zeros(1, 3, 8), tokens, [], Site(2, 8, "layer", "depth"))
    with pytest.raises(ValueError, match="No attention of the layer before was seen"):
        router(inputs)
    seen = torch.rand(1, 3)
    assert torch.equal(router(dataclasses.replace(inputs, attention_BT=seen))[..., 0], seen)


def test_a_batch_without_images_passes_as_the_dense_model_does():
    batch = padded([ROWS[1], row(0, 6, seed=4)])
    for plugin in WATCHING.values():
        model, dense, _ = routed(plugin)
        assert torch.equal(model(**batch, use_cache=False).logits, dense(**batch, use_cache=False).logits)
