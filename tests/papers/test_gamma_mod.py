"""gamma-MoD (arXiv 2410.13859) against a loop over rows, layers and tokens, and against its published numbers."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from plugins.gamma_depths import (
    EVERY_KIND,
    AtLeast,
    GammaDepths,
    MaskedTopK,
    PaddedCrossEntropy,
    PrefixTopK,
    SkipOrKeep,
)
from routing import (
    Between,
    Constant,
    RouterCrossEntropy,
    RouterInputs,
    SelectBy,
    Site,
    Threshold,
    TokenKind,
    Tokens,
    attach,
)
from routing.cost import GAMMA_MOD, count
from tests.compare import ROWS, batch_of, generated, positions_of, routed
from tests.oracles import best, rows_of
from tests.tiny import IMAGE, PATCHES, facts, padded, row, tiny_llava

TOLERANCE = {"atol": 2e-5, "rtol": 2e-4}
ROUTER = "routers.depth.shared.network.weight"
SYSTEM, QUESTION, ANSWER, VISION = EVERY_KIND
ALONE = AtLeast(EVERY_KIND, 0.5)
CAUSAL = GammaDepths(selector=SelectBy(MaskedTopK(), prefill=ALONE, decode=ALONE))
RELEASED = GammaDepths(
    placement=Between(1, 2),
    capacity=Constant(0.5),
    selector=SelectBy(PrefixTopK(), Threshold(EVERY_KIND, 0.005), ALONE),
    losses=(PaddedCrossEntropy(),),
)


@dataclass
class Oracle:
    """One row at a time: ``choose`` gets the layer's keep probabilities and returns the places that enter."""

    model: nn.Module
    router_2D: Tensor
    layers: range
    compact: bool = True
    entropies: dict[int, list[Tensor]] = field(default_factory=dict)  # of each token, over all rows so far

    def logits(self, x: Tensor, real: list[bool], choose: Callable[[list[float]], list[int]]) -> Tensor:
        decoder, everyone = self.model.get_decoder(), list(range(len(x)))
        for number, layer in enumerate(decoder.layers):
            if number not in self.layers:
                attended, fed = self._enter(layer, x, everyone, real)
                x = attended + fed
                continue
            logits_T2 = layer.input_layernorm(x) @ self.router_2D.T
            p = logits_T2.softmax(-1)[:, 1]
            keep = choose(p.tolist())
            assert keep == sorted(set(keep))
            rows = list(x)
            if keep:
                attended, fed = self._enter(layer, x, keep, real)
                for j, i in enumerate(keep):
                    rows[i] = attended[j] + p[i] * fed[j]
            x, kept = torch.stack(rows), set(keep)
            paid = [-logits_T2[i].log_softmax(-1)[1 if i in kept else 0] for i in everyone]
            self.entropies.setdefault(number, []).extend(paid)
        return self.model.lm_head(decoder.norm(x))

    def _enter(self, layer: nn.Module, x: Tensor, keep: list[int], real: list[bool]) -> tuple[Tensor, Tensor]:
        """The residual stream after attention, and the feed-forward branch, of the kept places only."""
        places = torch.arange(len(keep)) if self.compact else torch.tensor(keep)
        angles = self.model.get_decoder().rotary_emb(x[None], position_ids=places[None])
        readable = torch.tensor([real[i] for i in keep])
        mask = torch.ones(len(keep), len(keep), dtype=torch.bool).tril() & readable
        normed = layer.input_layernorm(x[keep])[None]
        out = layer.self_attn(hidden_states=normed, attention_mask=mask[None, None], position_embeddings=angles)[0][0]
        attended = x[keep] + out
        return attended, layer.mlp(layer.post_attention_layernorm(attended))

    def auxiliary(self) -> Tensor:
        return 0.01 * sum(torch.stack(each).mean() for each in self.entropies.values())


def spoken(batch: dict[str, Tensor]) -> Tokens:
    """What a collator would say; the first token of each row is the system's."""
    kind_BT = facts({"labels": torch.full_like(batch["input_ids"], -100), **batch}).kind_BT.clone()
    for kinds, mask in zip(kind_BT, batch["attention_mask"], strict=True):
        kinds[mask.nonzero()[0]] = SYSTEM
    return Tokens.of(kind_BT)


def chosen(kinds: list[int], protect: tuple[TokenKind, ...], p: list[float]) -> list[int]:
    """Two thirds of a row's tokens, the protected ones before all others."""
    always = [i for i, kind in enumerate(kinds) if kind in protect]
    others = [i for i, kind in enumerate(kinds) if kind not in protect]
    places = max(int(0.66 * len(kinds)) - len(always), 0)
    return sorted([*always, *(others[j] for j in best([p[i] for i in others], others, places))])


def same_gradients(model: nn.Module, dense: nn.Module, router_2D: Tensor) -> None:
    got, want = dict(model.named_parameters()), {**dict(dense.named_parameters()), ROUTER: router_2D}
    assert set(got) == set(want)  # one router for all layers and both modalities
    assert got[ROUTER].grad.any() and got["model.language_model.layers.3.input_layernorm.weight"].grad.any()
    for name, parameter in got.items():
        if want[name].grad is None:
            assert parameter.grad is None or not parameter.grad.any(), name
        else:
            torch.testing.assert_close(
                parameter.grad, want[name].grad, msg=lambda m, name=name: f"{name}: {m}", **TOLERANCE
            )


def wild(model: nn.Module) -> Tensor:
    """Probabilities of every size, also below 0.005; returns a copy of the router."""
    with torch.no_grad():
        router_2D = model.routers["depth"]["shared"].network.weight.normal_()
    return router_2D.detach().clone().requires_grad_()


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("protect", [(), (QUESTION,), (QUESTION, ANSWER)])
def test_training_equals_the_oracle_in_values_and_every_gradient(protect, positions):
    selector = SelectBy(MaskedTopK(protect=protect), ALONE, ALONE)
    plugin = GammaDepths(selector=selector, positions=positions)
    model, dense, tape = routed(plugin)
    oracle = Oracle(dense, wild(model), range(3, 7), positions == "compact")
    batch = batch_of("train")
    kinds = [
        row[mask.bool()].tolist() for row, mask in zip(spoken(batch).kind_BT, batch["attention_mask"], strict=True)
    ]
    losses, wanted = [], []
    for one in rows_of(dense, batch):
        of_row = lambda p, one=one: chosen(kinds[one.number], protect, p)  # noqa: E731
        wanted.append(oracle.logits(one.x, [True] * len(one.ids), of_row))
        losses += [-wanted[-1][i].log_softmax(-1)[t] for i, t in enumerate(one.labels[1:]) if t != -100]
    expected = torch.stack(losses).mean() + oracle.auxiliary()
    with tape.about(spoken(batch)), tape.recording() as records:
        out = model.train()(**batch, use_cache=False)
    (loss,) = plugin.losses
    assert loss == RouterCrossEntropy(weight=0.01, layers="sum")
    total = out.loss + loss.weight * sum(loss(record) for record in records)
    torch.testing.assert_close(total, expected, **TOLERANCE)
    for got, mask, want in zip(out.logits, batch["attention_mask"], wanted, strict=True):
        torch.testing.assert_close(got[mask.bool()], want, **TOLERANCE)
    for record in records:  # what the host knows is what the device did
        assert record.decision.keep_BT().sum(1).tolist() == list(plugin.selector.kept(record.tokens, 0.66))
    total.backward()
    expected.backward()
    same_gradients(model, dense, oracle.router_2D)


@pytest.mark.parametrize("positions", ["compact", "original"])
@torch.no_grad()
def test_left_padded_prompts_equal_the_oracle(positions):
    model, dense, tape = routed(GammaDepths(positions=positions))
    oracle = Oracle(dense, wild(model), range(3, 7), positions == "compact")
    batch = batch_of("prefill")
    with tape.recording() as records:
        out = model.eval()(**batch, position_ids=positions_of(batch), use_cache=True)
    for one, got, mask in zip(rows_of(dense, batch), out.logits, batch["attention_mask"], strict=True):
        above = lambda p: [i for i, each in enumerate(p) if each > 0.005]  # noqa: E731
        want = oracle.logits(one.x, [True] * len(one.ids), above)
        torch.testing.assert_close(got[mask.bool()], want, **TOLERANCE)
    for record, layer in zip(records, out.past_key_values.layers[3:7], strict=True):
        kept_B = record.decision.keep_BT().sum(1)
        assert (kept_B < batch["attention_mask"].sum(1)).any()
        assert torch.equal(layer.filled_B() * torch.ones_like(kept_B), kept_B)


@pytest.mark.parametrize(("phase", "side"), [("train", "right"), ("prefill", "left")])
@torch.no_grad()
def test_a_row_depends_neither_on_its_batch_mates_nor_on_padding(phase, side):
    model, _, tape = routed(GammaDepths())
    wild(model)
    model.train(phase == "train")
    rows = [*ROWS, row(1, 12, seed=5, first_text=3), row(0, 20, seed=6), row(1, 4, seed=7), row(2, 9, seed=8)]
    images, alone = padded(rows)["pixel_values"], []
    for B in range(1, 9):
        batch, before = padded(rows[:B], side), sum(ids.count(IMAGE) for ids in rows[: B - 1]) // PATCHES
        mask, batch["pixel_values"] = batch["attention_mask"].bool(), images[: len(batch["pixel_values"])]
        with tape.about(spoken(batch)):
            together = model(**batch, position_ids=positions_of(batch), use_cache=False).logits
        single = padded([rows[B - 1]])
        if "pixel_values" in single:
            single["pixel_values"] = images[before : before + len(single["pixel_values"])]
        with tape.about(spoken(single)):
            alone.append(model(**single, use_cache=False).logits[0])
        for got, real, want in zip(together, mask, alone, strict=True):
            torch.testing.assert_close(got[real], want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("rows", [ROWS, ROWS[2:3]])
def test_cached_decoding_by_one_causal_rule_equals_one_forward(rows):
    model, _, tape = routed(CAUSAL)
    wild(model)
    answers, logits, _ = generated(model, tape, spoken, rows, new=6)
    again, whole, _ = generated(model, tape, spoken, rows, new=6, use_cache=False)
    assert torch.equal(answers, again)
    torch.testing.assert_close(logits, whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("B", [2, 3, 8])
def test_left_padded_rows_are_answered_as_if_alone(B):
    model, _, tape = routed(GammaDepths())
    wild(model)
    rows = [row(2, 5), *(row(0, 4 + (7 * b) % 30, seed=b) for b in range(1, B))]
    answers, logits, _ = generated(model, tape, spoken, rows)
    for one, got, scored in zip(rows, answers, logits, strict=True):
        want, alone, _ = generated(model, tape, spoken, [one])
        assert torch.equal(got, want[0])
        torch.testing.assert_close(scored, alone[0], **TOLERANCE)


@torch.no_grad()
def test_a_generated_token_below_one_half_changes_neither_its_state_nor_the_layers_cache():
    model = routed(GammaDepths())[0]
    router_2D = wild(model)
    cache = model.eval()(**batch_of("prefill", ROWS[:1]), use_cache=True).past_key_values
    entered = []
    for token in range(9, 19):
        before = [layer.filled_B() + torch.zeros(1) for layer in cache.layers[3:7]]
        states = model(torch.tensor([[token]]), past_key_values=cache, output_hidden_states=True).hidden_states
        for number, held in zip(range(3, 7), before, strict=True):
            x = states[number][0, 0]
            p = (model.get_decoder().layers[number].input_layernorm(x) @ router_2D.T).softmax(-1)[1]
            entered.append(p.item() >= 0.5)
            assert torch.equal(states[number + 1][0, 0], x) == (not entered[-1])
            assert cache.layers[number].filled_B() - held == int(entered[-1])
    assert {True, False} == set(entered)


def test_a_token_at_exactly_one_half_enters_in_decoding():
    tokens = Tokens.of(torch.tensor([[ANSWER]]), phase="decode")
    rule, zero = GammaDepths().selector.rule("decode"), torch.zeros(1, 1, 1)
    assert rule(zero, zero.sigmoid(), tokens, 1.0).keep_BT().all()
    assert not rule(zero, torch.nextafter(zero.sigmoid(), zero), tokens, 1.0).keep_BT().any()


def test_a_row_with_more_protected_tokens_than_places_takes_just_these():
    tokens = Tokens.of(torch.tensor([[SYSTEM, VISION, QUESTION, QUESTION, QUESTION, ANSWER, 0]]))
    scores = torch.arange(7.0)[None, :, None]
    decision = MaskedTopK()(scores, scores.sigmoid(), tokens, 0.5)
    assert decision.keep_BT().tolist() == [[0, 0, 1, 1, 1, 0, 0]]
    assert torch.equal(decision.weight_BT[0, :6], scores[0, :6, 0].sigmoid())  # protected, and weighted
    assert MaskedTopK().kept(tokens, 0.5) == (3,) and MaskedTopK().kept(tokens, 0.7) == (4,)


def test_g1_the_released_rule_keeps_all_but_529_positions_behind_a_prefix_of_1059():
    kept = {length: PrefixTopK().count(length, 0.5) for length in (500, 1059, 1060, 1100, 1400, 2496)}
    assert kept == {500: 500, 1059: 1059, 1060: 531, 1100: 571, 1400: 871, 2496: 1967}
    mgm = [PrefixTopK(2880).count(length, 0.5) - length for length in range(2881, 5001)]
    assert set(mgm) == {-1440, -1439} and mgm.count(-1439) == 321  # float noise, as published
    assert PrefixTopK(2880).count(2883, 0.5) == 1444 and PrefixTopK().count(1400, 1.0) == 1400


@pytest.mark.parametrize("length", [500, 1059, 1060, 1100, 1400])
def test_the_released_rule_equals_its_oracle_in_values_and_every_gradient(length):
    model, dense, tape = routed(RELEASED, layers=4)
    router_2D = model.routers["depth"]["shared"].network.weight.detach().clone().requires_grad_()
    batch = padded([row(0, length - 1), row(2, length // 2, seed=1)])
    decoder, places = dense.get_decoder(), batch["attention_mask"].sum(1).tolist()
    oracle = Oracle(dense, router_2D, range(1, 3))

    def choose(p: list[float]) -> list[int]:
        ranked = [each + (1 if length > 1059 and t >= 1059 else 0) for t, each in enumerate(p)]
        count = length - 529 if length > 1059 else length
        return sorted(sorted(range(length), key=lambda t: -ranked[t])[:count])

    losses, wanted = [], []
    for one, real in zip(rows_of(dense, batch), places, strict=True):
        x = torch.cat([one.x, decoder.embed_tokens.weight[0].detach().expand(length - real, -1)])
        wanted.append(oracle.logits(x, [t < real for t in range(length)], choose))
        losses += [-wanted[-1][i].log_softmax(-1)[t] for i, t in enumerate(one.labels[1:]) if t != -100]
    expected = torch.stack(losses).mean() + oracle.auxiliary()
    with tape.about(spoken(batch)), tape.recording() as records:
        out = model.train()(**batch, use_cache=False, output_hidden_states=True)
    (loss,) = RELEASED.losses
    assert loss.layers == "sum"
    total = out.loss + loss.weight * sum(loss(record) for record in records)
    torch.testing.assert_close(total, expected, **TOLERANCE)
    for got, want, real in zip(out.logits, wanted, places, strict=True):
        torch.testing.assert_close(got[:real], want[:real], **TOLERANCE)
    for record in records:
        keep_BT, layer = record.decision.keep_BT(), record.site.layer
        assert keep_BT[:, 1059:].all() and record.decision.valid_BK.all()
        before, after = out.hidden_states[layer : layer + 2]
        assert torch.equal(before[~keep_BT], after[~keep_BT])
    total.backward()
    expected.backward()
    same_gradients(model, dense, router_2D)


def decoder_of(width: int, feed_forward: int, layers: int) -> LlamaConfig:
    heads = width // 128
    return LlamaConfig(
        hidden_size=width, intermediate_size=feed_forward, num_hidden_layers=layers, num_attention_heads=heads
    )


SMALL, LARGE = (4096, 11008, 32), (5120, 13824, 40)
TABLE = [  # tokens, share skipped at inference, TFLOPs of the language model
    (SMALL, 1400, 0, 19.16), (SMALL, 1400, 0.379, 12.59), (SMALL, 1400, 0.577, 9.27), (SMALL, 1400, 0.743, 6.52),
    (SMALL, 800, 0, 10.70), (SMALL, 800, 0.310, 7.73), (SMALL, 800, 0.564, 5.34),
    (SMALL, 4000, 0, 60.20), (SMALL, 4000, 0.362, 39.43), (SMALL, 4000, 0.581, 27.81),
    (LARGE, 1400, 0, 37.13), (LARGE, 1400, 0.349, 25.13), (LARGE, 1400, 0.551, 18.35),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "tokens", "skipped", "printed"), TABLE)
def test_g8_the_counter_reproduces_the_published_flops(shape, tokens, skipped, printed):
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(LlavaConfig(text_config=decoder_of(*shape)))
    if skipped:
        attach(model, {"depth": GammaDepths(capacity=Constant(1 - skipped))})
    prompt = Tokens.of(torch.full((1, tokens), int(VISION)))
    assert count(model, prompt, GAMMA_MOD).flops / 1e12 == pytest.approx(printed, abs=0.05)


def test_g5_routers_are_shared_by_default_and_parted_by_one_word():
    def keys(**how: str) -> list[str]:
        model = tiny_llava()
        attach(model, {"depth": GammaDepths(**how)})
        assert {tuple(p.shape) for p in model.routers.parameters()} == {(2, 32)}
        return [name for name, _ in model.named_parameters() if name.startswith("routers")]

    assert keys() == [ROUTER]
    assert keys(sharing="separate") == [f"routers.depth.{layer}.network.weight" for layer in range(3, 7)]
    assert keys(modalities="separate") == [f"routers.depth.shared.{head}.network.weight" for head in ("vision", "text")]


def test_the_router_scores_in_float32_and_starts_uniform():
    torch.manual_seed(0)
    router, x = SkipOrKeep().build(4096, 1), torch.randn(1, 3, 4096)
    weight = router.network.weight.detach()
    assert weight.abs().max() <= 1 / 64 and weight.std().item() == pytest.approx(3**-0.5 / 64, rel=0.05)
    tokens = Tokens.of(torch.full((1, 3), int(VISION)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = router(RouterInputs(x.bfloat16(), tokens, (), Site(3, 32, "layer", "depth")))
    logits = x.bfloat16().float() @ weight.T
    torch.testing.assert_close(scores.sigmoid()[..., 0], logits.softmax(-1)[..., 1])
    assert scores.dtype == torch.float32


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: MaskedTopK((VISION,)), r"MaskedTopK\(protect=\['QUESTION'\]\)"),
        (lambda: PrefixTopK(0), r"PrefixTopK\(prefix=0\)"),
        (lambda: SkipOrKeep().build(8, 4), "4 scores a token"),
    ],
)
def test_mistakes_are_named(make, said):
    with pytest.raises(ValueError, match=said):
        make()
