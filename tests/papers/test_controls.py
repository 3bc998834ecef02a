"""The controls against loops over rows, layers and tokens: which tokens they keep, and what becomes of all of them."""

import dataclasses
from itertools import pairwise

import pytest
import torch

from plugins.frozen_router_depths import FrozenRouterDepths
from plugins.late_withdrawal import LateWithdrawal
from plugins.oracle_depths import AntiOracleDepths, OracleDepths
from plugins.random_depths import RandomDepths
from plugins.shallow_decoder import ShallowDecoder
from plugins.strided_depths import Stride, StridedDepths
from routing import Constant, LinearRouter, TokenKind, Tokens
from routing.capacity import kept_count
from tests.compare import EVIDENCE, IDS, PHASES, ROWS, batch_of, check, check_cached, generated, routed, told
from tests.oracles import best, drawn, dropped_row, p_mod_count, p_mod_share
from tests.tiny import IMAGE, PATCHES, padded, row, tiny_llava

PROGRESS = 0.37


def ranked(row, scores, counts=p_mod_share):
    """Keeps text, and in each layer the best vision tokens by ``scores(layer, x)``."""

    def kept(number, x, seen):
        share = counts(number, 8)
        if share is None:
            return list(range(len(row.ids)))
        winners = best(scores(number, x), row.vision, p_mod_count(len(row.vision), share))
        return [i for i in range(len(row.ids)) if i not in row.vision or row.vision.index(i) in winners]

    return kept


def random(model, row):
    progress = PROGRESS if model.training else 1.0
    return ranked(row, lambda number, x: [drawn(i, IDS[row.number], number, 5, progress=progress) for i in row.vision])


def strided(model, row):
    def kept(number, x, seen):
        share, keep, passed = p_mod_share(number, 8), list(row.text), 0
        for n, i in enumerate(row.vision, 1):
            whole = n * p_mod_count(len(row.vision), 1.0 if share is None else share) // len(row.vision)
            if whole > passed:
                keep.append(i)
            passed = whole
        return sorted(keep)

    return kept


def frozen(model, row):
    def scores(number, x):
        network = model.routers["depth"][str(number)].network
        return [(network.weight[0] @ x[i] + network.bias[0]).item() for i in row.vision]

    return ranked(row, scores)


def evidence(sign):
    def kept(model, row):
        needed = EVIDENCE[row.number] or set()  # unknown: all tie
        return ranked(row, lambda number, x: [sign * (n in needed) for n in range(len(row.vision))])

    return kept


def late(model, row):
    return lambda number, x, seen: list(range(len(row.ids))) if number < 4 else row.text


def shallow(model, row):
    return lambda number, x, seen: list(range(len(row.ids))) if number % 2 == 0 else []


CONTROLS = {
    "random": (RandomDepths(seed=5), random),
    "strided": (StridedDepths(), strided),
    "frozen": (FrozenRouterDepths(router=LinearRouter(std=0.5)), frozen),
    "oracle": (OracleDepths(), evidence(1)),
    "anti": (AntiOracleDepths(), evidence(-1)),
    "late": (LateWithdrawal(), late),
    "shallow": (ShallowDecoder(), shallow),
}


@pytest.mark.parametrize("name", CONTROLS)
@pytest.mark.parametrize("phase", PHASES)
def test_a_control_equals_the_loop_oracle_in_values_and_every_gradient(name, phase):
    plugin, rule = CONTROLS[name]
    model, dense, tape = routed(plugin)
    tape.progress = PROGRESS
    model.train(phase == "train")
    check((model, dense, tape), phase, lambda row: dropped_row(dense, row.x, rule(model, row)))


@pytest.mark.parametrize(
    ("name", "attention"),
    [("random", "sdpa"), ("frozen", "eager"), ("late", "sdpa"), ("late", "eager"), ("shallow", "eager")],
)
def test_cached_answers_are_the_uncached_ones(name, attention):
    model, _, tape = routed(CONTROLS[name][0], attention=attention)
    check_cached(model, tape)


def kept_by(model, tape, phase="prefill", progress=1.0, tokens=told, rows=ROWS):
    """By layer: True at the kept real tokens of each row, without padding."""
    tape.progress = progress
    batch = batch_of(phase, rows)
    with torch.no_grad(), tape.about(tokens(batch)), tape.recording() as records:
        model.train(phase == "train")(**batch, use_cache=False)
    real = batch["attention_mask"].bool()
    return {r.site.layer: [k[m].tolist() for k, m in zip(r.decision.keep_BT(), real, strict=True)] for r in records}


def test_a_random_draw_ignores_padding_and_batch_mates_but_not_layer_row_seed_or_progress():
    model, _, tape = routed(RandomDepths(capacity=Constant(0.5)), layers=4)
    left = kept_by(model, tape)
    assert kept_by(model, tape, "train") == left  # right-padded, at progress 1
    alone = kept_by(model, tape, rows=ROWS[:1])
    assert all(alone[layer][0] == left[layer][0] for layer in range(4))
    assert len({tuple(rows[0]) for rows in left.values()}) == 4

    def numbered(ids):
        return lambda batch: dataclasses.replace(told(batch), id_B=torch.tensor(ids))

    same, apart = (kept_by(model, tape, tokens=numbered(ids), rows=[ROWS[0]] * 2) for ids in ([9, 9], [9, 10]))
    assert all(first == second for first, second in same.values())
    assert all(first != second for first, second in apart.values())
    other, _, own = routed(RandomDepths(capacity=Constant(0.5), seed=1), layers=4)
    for drew in (kept_by(other, own), kept_by(model, tape, "train", progress=0.5)):
        assert all(drew[layer][0] != left[layer][0] for layer in range(4))
    draws = [kept_by(model, tape, "train", progress=step / 100_000) for step in range(3)]  # steps of a long training
    assert len({str(draw) for draw in draws}) == 3


def test_strides_keep_exactly_k_of_n_at_equal_distances():
    for n in range(1, 70):
        tokens = Tokens.of(torch.tensor([[TokenKind.QUESTION] + [TokenKind.VISION] * n]))
        zero = torch.zeros(1, n + 1, 1)
        for share in (0.0, 0.1, 0.15, 0.25, 1 / 3, 0.5, 0.6, 0.853, 1.0):
            keep = Stride()(zero, zero, tokens, share).keep_BT()[0, 1:].tolist()
            count = kept_count(n, share)
            assert sum(keep) == count
            places = [i for i, k in enumerate(keep) if k]
            gaps = {b - a for a, b in pairwise(places)}
            assert not gaps or (n // count <= min(gaps) and max(gaps) <= -(-n // count))


def test_a_frozen_router_has_no_parameters_is_saved_and_does_not_learn():
    model, _, tape = routed(FrozenRouterDepths())
    names = {f"routers.depth.{layer}.network.{name}" for layer in range(2, 8) for name in ("weight", "bias")}
    assert not list(model.routers.parameters()) and names <= set(model.state_dict())
    before = {name: model.state_dict()[name].clone() for name in names}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    with tape.recording() as records:
        model.train()(**padded(ROWS), use_cache=False).loss.backward()
    assert not any(record.scores_BTE.isnan().any() for record in records) and len(records) == 6
    optimizer.step()
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in names)
    other, _, _ = routed(FrozenRouterDepths())
    torch.nn.init.zeros_(other.routers["depth"]["4"].network.weight)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.routers["depth"]["4"].network.weight, before["routers.depth.4.network.weight"])


@pytest.mark.parametrize(("plugin", "first"), [(OracleDepths, True), (AntiOracleDepths, False)])
def test_evidence_comes_first_or_last(plugin, first):
    model, _, tape = routed(plugin())
    known = kept_by(model, tape)
    for layer, rows in known.items():
        for number in (0, 2):
            vision = [k for k, token in zip(rows[number], ROWS[number], strict=True) if token == IMAGE]
            needed, count = EVIDENCE[number], p_mod_count(len(vision), p_mod_share(layer, 8))
            found = sum(vision[n] for n in needed)
            assert found == (min(count, len(needed)) if first else max(0, count - len(vision) + len(needed)))
    nothing = kept_by(model, tape, tokens=lambda batch: told(batch, evidence=False))
    assert all(nothing[layer][3] == known[layer][3] for layer in known)  # nobody knows: the order of ties
    assert any(nothing[layer][0] != known[layer][0] for layer in known)


def without_layers(dense, gone):
    """The dense model with layers physically removed."""
    decoder = dense.get_decoder()
    decoder.layers = torch.nn.ModuleList(layer for number, layer in enumerate(decoder.layers) if number not in gone)
    for number, layer in enumerate(decoder.layers):
        layer.self_attn.layer_idx = number
    decoder.config.num_hidden_layers = len(decoder.layers)
    return dense


@pytest.mark.parametrize("beams", [1, 3])
def test_a_shallow_decoder_is_the_dense_model_without_those_layers_and_never_calls_them(beams):
    model, _, tape = routed(ShallowDecoder())
    shorter, called = without_layers(tiny_llava(), {1, 3, 5, 7}), []
    for number, layer in enumerate(model.get_decoder().layers):
        for part in (layer.self_attn, layer.mlp, layer.input_layernorm):
            part.register_forward_hook(lambda *_, number=number: called.append(number))
    answers, logits, cache = generated(model, tape, num_beams=beams)
    want, expected, short = generated(shorter, tape, num_beams=beams)
    assert torch.equal(answers, want) and torch.equal(logits, expected)
    assert set(called) == {0, 2, 4, 6}
    assert [layer.keys is None for layer in cache.layers] == [False, True] * 4
    for held, other in zip(cache.layers[::2], short.layers, strict=True):
        assert torch.equal(held.keys, other.keys) and held.get_seq_length() == cache.get_seq_length()
    batch = padded(ROWS)
    got, expected = (each.train()(**batch, use_cache=False) for each in (model, shorter))
    assert torch.equal(got.logits, expected.logits)
    got.loss.backward()
    skipped = [p for layer in list(model.get_decoder().layers)[1::2] for p in layer.parameters()]
    assert all(p.grad is not None and not p.grad.any() for p in skipped)  # touched, for DDP


def test_withdrawn_layers_read_text_alone_and_give_the_vision_tokens_back_as_they_were():
    model, _, _ = routed(LateWithdrawal())
    batch = padded([row(1, 5)])
    states = model.eval()(**batch, use_cache=False, output_hidden_states=True).hidden_states
    vision = slice(1, 1 + PATCHES)
    for number in range(4, 7):  # the last state is normed
        assert torch.equal(states[number + 1][0, vision], states[4][0, vision])
        assert not torch.equal(states[number + 1][0, -1], states[number][0, -1])
