"""p-MoD (arXiv 2412.04449) against the paper's numbers, the released code's golden vectors, and a loop oracle."""

import copy
import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from plugins.progressive_depths import ProgressiveDepths, PublishedTopK
from routing import (
    All,
    Constant,
    ExpertChoice,
    Gate,
    LinearRouter,
    Router,
    RoutingPlugin,
    RoutingTape,
    ScaledPassing,
    ShiftedCosine,
    Site,
    TanhNorm,
    TokenKind,
    Tokens,
    attach,
    route_layer,
)
from routing.capacity import kept_count
from tests.oracles import p_mod_loss, p_mod_share
from tests.tiny import IMAGE, facts, padded, row, tiny_llava

SHARES = {  # layer: (share, kept of 576, kept of 2880), specs of the released 32-layer configuration
    8: (0.844483, 486, 2432), 9: (0.806053, 464, 2321), 10: (0.764482, 440, 2201), 11: (0.720197, 414, 2074),
    12: (0.673653, 388, 1940), 13: (0.625326, 360, 1800), 14: (0.575714, 331, 1658), 15: (0.525325, 302, 1512),
    16: (0.474675, 273, 1367), 17: (0.424286, 244, 1221), 18: (0.374674, 215, 1079), 19: (0.326347, 187, 939),
    20: (0.279803, 161, 805), 21: (0.235518, 135, 678), 22: (0.193947, 111, 558), 23: (0.155517, 89, 447),
    **{layer: (0.15, 86, 432) for layer in range(24, 32)},
}  # fmt: skip
DEFAULT = ShiftedCosine()
WILD = ProgressiveDepths(router=LinearRouter(std=0.5))


def shares(schedule: ShiftedCosine = DEFAULT, layers: int = 32) -> list[float]:
    return [schedule(layer / (layers - 1)) for layer in range(layers)]


def test_p1_the_schedule_routes_layers_8_to_31_and_averages_0_5375():
    got = shares()
    assert {layer for layer, share in enumerate(got) if share < 1} == set(SHARES)
    for layer, (share, _, _) in SHARES.items():
        assert got[layer] == pytest.approx(share, abs=1e-6)
    assert math.fsum(got) / 32 == pytest.approx(0.5375, abs=1e-6)
    assert math.fsum(shares(ShiftedCosine(low=0.25, high=0.75))) / 32 == pytest.approx(0.585938, abs=1e-6)
    assert math.fsum(shares(ShiftedCosine(low=0.1, high=0.9))) / 32 == pytest.approx(0.521875, abs=1e-6)


def test_p2_kept_counts_are_truncated_in_float32():
    for layer, (_, of_576, of_2880) in SHARES.items():
        share = shares()[layer]
        assert (kept_count(576, share), kept_count(2880, share)) == (of_576, of_2880)
    assert sum(kept_count(576, share) for share in shares()) == 9896
    assert sum(kept_count(2928, share) for share in shares()) == 50352
    assert kept_count(2365, shares()[10]) != int(2365 * shares()[10])  # where float64 differs
    for layer in range(8, 32):  # the device computes the same counts as the host
        n, share = torch.arange(5000), shares()[layer]
        device = (n.float() * torch.full((), share)).long()
        assert device.tolist() == [kept_count(i, share) for i in range(5000)]


class StubBlock(nn.Module):
    """r = 2x, m = x + 1."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Identity()

    def forward(self, hidden_states, attention_mask=None, position_embeddings=None):
        self.positions = position_embeddings[0][..., 0]
        return 2 * hidden_states + self.mlp(hidden_states + 1)


class GoldenRouter(Router):
    def forward(self, inputs):
        return (inputs.x_BTD @ torch.tensor([1.0, -0.5]) + 0.1)[..., None]


class GivenScores(Router):
    def __init__(self, scores: list[float]) -> None:
        super().__init__()
        self.scores = torch.tensor(scores)

    def forward(self, inputs):
        return self.scores[None, :, None]


X = torch.tensor(
    [
        [[1, 1], [0, 1], [2, 0], [-1, 1], [0.5, 0.5], [1, 3]],
        [[0.3, 0.1], [0.2, 0.9], [-0.4, 0.2], [0.8, 0.8], [0, 0], [0, 0]],
    ]
)  # fmt: skip
V, Q, P = TokenKind.VISION, TokenKind.QUESTION, TokenKind.PAD
KINDS = torch.tensor([[Q, V, V, V, V, Q], [Q, V, V, Q, P, P]])


def stub(selector, router, x, kinds, share: float):
    layer, tape = StubBlock(), RoutingTape()
    gate = Gate(Site(1, 4, "layer", "depth"), router, TanhNorm(), selector, Constant(share), tape)
    route_layer(layer, layer.mlp, gate, ScaledPassing())
    tape.begin(Tokens.of(kinds))
    with tape.recording() as records:
        places = torch.arange(x.shape[1]).float()[None, :, None].expand(1, -1, 2)
        out = layer(x, position_embeddings=(places, places))
    return out, records[0], layer


@pytest.mark.parametrize("rank_on", ["router", "weight"])
def test_p3_goldens_g1_and_g2_of_the_released_wrapper(rank_on):
    selector = ExpertChoice() if rank_on == "router" else PublishedTopK()
    out, record, layer = stub(selector, GoldenRouter(), X, KINDS, 0.5)
    s = record.decision.weight_BT
    torch.testing.assert_close(s[0, 1:5], torch.tensor([0.924010, 1.194090, 0.822930, 1.067275]), atol=1e-6, rtol=0)
    assert record.decision.keep_BT().tolist() == [[1, 0, 1, 0, 1, 1], [1, 1, 0, 1, 0, 0]]
    assert layer.positions[0].tolist() == [0, 2, 4, 5] and layer.positions[1, :3].tolist() == [0, 1, 3]
    golden = torch.tensor([
        [[4, 4], [0, 0.92401], [7.582271, 1.19409], [-0.82293, 0.82293], [2.600913, 2.600913], [4, 10]],
        [[1.9, 1.3], [1.564268, 3.643424], [-0.369604, 0.184802], [3.4, 3.4], [0, 0], [0, 0]],
    ])  # fmt: skip
    torch.testing.assert_close(out, golden, atol=1e-6, rtol=0)


def test_p3_golden_g3_saturated_bf16_ties_fall_as_published():
    scores = [0.0, 0.0, -3, -4, -5, -3.5, -6, -2.8]
    kinds = torch.tensor([[Q, Q, V, V, V, V, V, V]])
    x = torch.ones(1, 8, 2, dtype=torch.bfloat16)
    _, published, _ = stub(PublishedTopK(), GivenScores(scores), x, kinds, 0.5)
    assert published.decision.keep_BT()[0, 2:].nonzero().flatten().add(2).tolist() == [4, 5, 6]


def test_p11_ranking_on_the_router_keeps_exactly_the_best_k_even_when_weights_saturate():
    kinds = torch.tensor([[Q, Q, V, V, V, V, V, V]])
    x = torch.ones(1, 8, 2, dtype=torch.bfloat16)
    _, ours, _ = stub(ExpertChoice(), GivenScores([0.0, 0.0, -3, -4, -5, -3.5, -6, -2.8]), x, kinds, 0.5)
    assert ours.decision.keep_BT()[0, 2:].nonzero().flatten().add(2).tolist() == [2, 5, 7]
    text_first = torch.tensor([[Q] * 20 + [V] * 40])
    far = GivenScores([0.0] * 20 + [-30.0 - i for i in range(40)])
    _, record, _ = stub(ExpertChoice(), far, torch.ones(1, 60, 2, dtype=torch.bfloat16), text_first, 0.5)
    assert record.decision.keep_BT().sum().item() == 20 + 20


def routed_pair(plugin: ProgressiveDepths = WILD, dtype=torch.float32, attention="sdpa"):
    """A routed model, a dense copy of it, and its routers by layer."""
    model = tiny_llava(attention=attention)
    dense = copy.deepcopy(model).to(dtype)
    torch.manual_seed(1)
    tape = attach(model, {"depth": plugin})
    model.to(dtype)
    model.routers.float()
    return model, dense, tape, {int(layer): router.network for layer, router in model.routers["depth"].items()}


@dataclass(frozen=True)
class Forced(RoutingPlugin):
    """Every layer through gather and merge, whatever its share."""

    share: float = 1.0

    def apply(self, decoder):
        for site in decoder.sites(All()):
            gate = decoder.gate(site, LinearRouter(std=0.0), TanhNorm(), ExpertChoice(), Constant(self.share))
            decoder.route_layer(site, gate, ScaledPassing())


def test_p4_a_zero_router_at_full_capacity_is_the_dense_layer_bit_for_bit():
    batch = padded([row(1, 7), row(1, 7, seed=1)])
    model = tiny_llava()
    attach(model, {"forced": Forced()})
    assert torch.equal(model(**batch, use_cache=False).logits, tiny_llava()(**batch, use_cache=False).logits)


def test_p5_a_text_only_batch_is_dense_and_leaves_the_routers_without_gradient():
    batch = padded([row(0, 12), row(0, 12, seed=3)])
    model, dense, _, _ = routed_pair()
    ours = model(**batch, use_cache=False)
    assert torch.equal(ours.logits, dense(**batch, use_cache=False).logits)
    ours.loss.backward()
    for parameter in model.routers.parameters():  # touched, for DDP, but not moved
        assert parameter.grad is not None and not parameter.grad.any()


MIXED = [row(1, 9), row(0, 6, seed=1), row(2, 4, seed=2), row(1, 3, seed=3, first_text=5)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("told", [True, False])
def test_the_whole_model_equals_the_loop_oracle_in_values_and_every_gradient(dtype, told):
    batch = padded(MIXED)
    batch["pixel_values"] = batch["pixel_values"].to(dtype)
    model, dense, tape, routers = routed_pair(dtype=dtype)
    routers = {layer: copy.deepcopy(router) for layer, router in routers.items()}
    expected, logits = p_mod_loss(dense, routers, batch)
    with tape.about(facts(batch) if told else None):
        out = model(**batch, use_cache=False)
    # Hugging Face's RMSNorm computes in float32 in any case.
    tolerance = {"atol": 2e-5, "rtol": 2e-4} if dtype == torch.float32 else {"atol": 2e-6, "rtol": 1e-5}
    for got, want, mask in zip(out.logits, logits, batch["attention_mask"], strict=True):
        torch.testing.assert_close(got[mask.bool()], want, **tolerance)
    torch.testing.assert_close(out.loss, expected, check_dtype=False, **tolerance)
    out.loss.backward()
    expected.backward()
    reference = dict(dense.named_parameters())
    for layer, router in routers.items():
        reference |= {f"routers.depth.{layer}.network.{name}": p for name, p in router.named_parameters()}
    named = dict(model.named_parameters())
    assert set(named) == set(reference)
    for name, parameter in named.items():
        want = reference[name].grad
        if want is None:
            assert parameter.grad is None or not parameter.grad.any(), name
        else:
            torch.testing.assert_close(parameter.grad, want, msg=lambda m, name=name: f"{name}: {m}", **tolerance)


# Hugging Face's eager softmax computes in float32, where a masked float64 row is nan.
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    ("attention", "dtype", "atol"),
    [("sdpa", torch.float64, 1e-9), ("sdpa", torch.float32, 1e-5), ("eager", torch.float32, 1e-5)],
)
def test_p6_a_row_depends_neither_on_its_batch_mates_nor_on_padding(side, attention, dtype, atol):
    model, _, _, _ = routed_pair(dtype=dtype, attention=attention)
    model.eval()
    batch = padded(MIXED, side)
    batch["pixel_values"] = batch["pixel_values"].to(dtype)
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
    together = model(**batch, position_ids=positions, use_cache=False).logits
    image = 0
    for b, tokens in enumerate(MIXED):
        images = tokens.count(IMAGE) // 16
        alone = padded([tokens])
        if images:
            alone["pixel_values"] = batch["pixel_values"][image : image + images]
            image += images
        want = model(**alone, use_cache=False).logits[0]
        torch.testing.assert_close(together[b][batch["attention_mask"][b].bool()], want, atol=atol, rtol=0)


def test_p7_a_layer_holds_keys_of_all_text_and_of_its_kept_vision_tokens():
    model, _, _, _ = routed_pair()
    model.eval()
    for answers in (0, 1, 4):  # each token more is one key more in every layer
        out = model(**padded([row(1, 7 + answers)]), use_cache=True)
        for number, layer in enumerate(out.past_key_values.layers):
            share = p_mod_share(number, 8)
            vision = 16 if share is None else kept_count(16, share)
            assert layer.keys.shape[2] == 8 + answers + vision


def test_p9_the_vision_selection_ignores_the_text_that_follows():
    model, _, tape, _ = routed_pair()
    model.eval()
    kept = []
    for seed in (1, 2):
        batch = padded([row(1, 0) + row(0, 6, seed=seed)[1:]])
        with tape.recording() as records:
            model(**batch, use_cache=False)
        kept.append([record.decision.keep_BT()[0, :17].tolist() for record in records])
    assert kept[0] == kept[1]


def test_p10_at_zero_init_every_router_but_the_last_layers_gets_a_gradient():
    model, _, _, _ = routed_pair(ProgressiveDepths())
    model(**padded([row(1, 9), row(1, 5, seed=1)]), use_cache=False).loss.backward()
    for layer, router in model.routers["depth"].items():
        moved = any(parameter.grad.any() for parameter in router.parameters())
        assert moved == (layer != "7"), layer
