"""MoE-LLaVA (arXiv 2401.15947) against DeepSpeed's golden vectors, a loop oracle, and what upcycling promises."""

import copy
import dataclasses
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from lit_modules.parts import choose, freeze_all_but
from plugins.capped_choice import CappedChoice
from plugins.mixture_of_experts import MixtureOfExperts
from routing import (
    All,
    Copies,
    Every,
    ExpertsChoose,
    Layers,
    LinearRouter,
    LoadBalance,
    RoutedMLP,
    RoutingRecord,
    Site,
    TokenChoice,
    TokenKind,
    Tokens,
    ZLoss,
    attach,
    load_E,
)
from tests.tiny import IMAGE, PATCHES, facts, padded, row, tiny_llava

RECIPE = Path(__file__).parent.parent.parent / "configs/recipes/moe_llava/llava_1_5_7b_stage_3.yaml"
P, S, Q, A, V = TokenKind
ROWS = [row(1, 9), row(0, 6, seed=1), row(2, 4, seed=2), row(1, 3, seed=3, first_text=5)]
PLAIN = MixtureOfExperts(router=LinearRouter(bias=False, std=0.5))
NOISY = dataclasses.replace(PLAIN, upcycling=Copies(noise=0.3))
CAPPED = dataclasses.replace(PLAIN, selector=CappedChoice(capacity_factor=0.5))
RAW = dataclasses.replace(PLAIN, selector=TokenChoice(1, renormalise=False))
ALL_CHOOSE = ExpertsChoose((S, Q, A, V))
LOGITS = torch.tensor(
    [[2, 1, 0, -1], [2, 0, 1, -1], [2, 1.5, 0, -1], [0, 0, 0, 3], [2, -1, 0, 1], [1, 2, 0, -1]]
)  # fmt: skip


def routed(plugin: MixtureOfExperts = PLAIN, layers: int = 4, dtype: torch.dtype = torch.float32, replayed=False):
    """A routed model, a dense copy of it, and the tape."""
    model = tiny_llava(layers=layers)
    dense = copy.deepcopy(model).to(dtype)
    torch.manual_seed(1)
    tape = attach(model, {"moe": plugin})
    model.to(dtype)
    if replayed:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return model, dense, tape


def networks(model) -> list[RoutedMLP]:
    return [module for module in model.modules() if isinstance(module, RoutedMLP)]


def watched(model) -> list[tuple[Tensor, Tensor]]:
    """What routed networks are given and answer, from now on."""
    seen: list[tuple[Tensor, Tensor]] = []
    for network in networks(model):
        network.register_forward_hook(lambda _, given, answer: seen.append((given[0].detach(), answer.detach())))
    return seen


# Upcycling.


@pytest.mark.parametrize(
    "plugin",
    [PLAIN, MixtureOfExperts(placement=All()), dataclasses.replace(PLAIN, experts=(2, 6)), CAPPED],
    ids=["every second", "all", "unlike numbers", "capped"],
)
@torch.no_grad()
def test_freshly_upcycled_the_model_is_the_dense_one(plugin):
    model, dense, _ = routed(plugin)
    model.eval(), dense.eval()  # the capped rule turns nobody away at inference
    batch = padded(ROWS)
    seen = watched(model)
    got, want = (each(**batch, use_cache=False).logits for each in (model, dense))
    real = batch["attention_mask"].bool()
    assert (got - want)[real].abs().max() <= 1e-5 * want.abs().max()
    places = [i for i, layer in enumerate(model.get_decoder().layers) if isinstance(layer.mlp, RoutedMLP)]
    for i, (given, answer) in zip(places, seen, strict=True):
        direct = dense.get_decoder().layers[i].mlp(given)
        assert (answer - direct)[real].abs().max() <= 1e-6 * direct.abs().max()


@torch.no_grad()
def test_in_bf16_it_is_the_dense_one_within_rounding():
    model, dense, _ = routed(dtype=torch.bfloat16)
    batch = padded(ROWS)
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    seen, real = watched(model), batch["attention_mask"].bool()
    model(**batch, use_cache=False)
    for i, (given, answer) in zip((0, 2), seen, strict=True):
        direct = dense.get_decoder().layers[i].mlp(given)
        # Two weights that sum to 1, each rounded; two products, and a sum.
        assert (answer - direct)[real].abs().max() <= 2**-7 * direct.abs().max()


@torch.no_grad()
def test_one_expert_with_its_raw_weight_is_not_exact_but_that_share_of_it():
    model, dense, tape = routed(RAW)
    batch, seen = padded(ROWS), watched(model)
    real = batch["attention_mask"].bool()
    with tape.recording() as records:
        got = model(**batch, use_cache=False).logits
    for record, (given, answer) in zip(records, seen, strict=True):
        direct = dense.get_decoder().layers[record.site.layer].mlp(given)
        share = record.scores_BTE.softmax(-1).amax(-1, keepdim=True)
        torch.testing.assert_close(answer[real], (share * direct)[real], atol=1e-5, rtol=1e-5)
    assert (got - dense(**batch, use_cache=False).logits)[real].abs().max() > 0.1


# The published router.


def published(logits: list[list[Tensor]], k: int, cf: float | None, least: int, noise=None) -> list[dict[int, Tensor]]:
    """DeepSpeed 0.9.5 on the real tokens of a batch, row by row: the weight of each token's experts."""
    N, E = len(logits), len(logits[0])
    share = [torch.stack(z).softmax(0) for z in logits]
    C = N if cf is None else max(int(np.ceil(np.float32(N / E) * np.float32(k * cf))), least)
    first = [max(range(E), key=lambda e, z=z: (z[e].item(), -e)) for z in logits]
    wanted = [first]
    if k == 2:
        noise = noise or [[0.0] * E] * N
        heard = [[z.item() + g for z, g in zip(zs, gs, strict=True)] for zs, gs in zip(logits, noise, strict=True)]
        others = [[e for e in range(E) if e != taken] for taken in first]
        wanted.append([max(es, key=lambda e, h=h: (h[e], -e)) for es, h in zip(others, heard, strict=True)])
    filled, kept = Counter(), [[] for _ in range(N)]
    for choices in wanted:
        for t, e in enumerate(choices):
            if filled[e] < C:
                kept[t].append(e)
            filled[e] += 1  # one who is turned away keeps its number
    weights = []
    for t in range(N):
        total = sum((share[t][e] for e in kept[t]), torch.zeros(())).clamp_min(torch.finfo(torch.float32).eps)
        weights.append({e: share[t][e] / total if k == 2 else share[t][e] for e in kept[t]})
    return weights


def given(decision, valid_BT: Tensor) -> list[dict[int, Tensor]]:
    """The same of a decision, row by row without padding."""
    flat = zip(decision.expert_BTK[valid_BT], decision.weight_BTK[valid_BT], decision.valid_BTK[valid_BT], strict=True)
    return [{e: w for e, w, v in zip(es.tolist(), ws, vs.tolist(), strict=True) if v} for es, ws, vs in flat]


GOLDEN = {
    0.5: [{0: 0.731059, 1: 0.268941}, {0: 0.731059, 2: 0.268941}, {}, {3: 1}, {3: 1}, {1: 1}],
    1.0: [{0: 0.731059, 1: 0.268941}, {0: 0.731059, 2: 0.268941}, {0: 0.622459, 1: 0.377541}, {3: 1}, {3: 1}, {1: 1}],
    1.5: [{0: 0.731059, 1: 0.268941}, {0: 0.731059, 2: 0.268941}, {0: 0.622459, 1: 0.377541},
          {0: 0.047426, 3: 0.952574}, {0: 0.731059, 3: 0.268941}, {1: 1}],
    2.0: [{0: 0.731059, 1: 0.268941}, {0: 0.731059, 2: 0.268941}, {0: 0.622459, 1: 0.377541},
          {0: 0.047426, 3: 0.952574}, {0: 0.731059, 3: 0.268941}, {0: 0.268941, 1: 0.731059}],
}  # fmt: skip


@pytest.mark.parametrize("phase", ["train", "prefill"])
@pytest.mark.parametrize("cf", GOLDEN)
def test_golden_vectors_of_the_top_2_gate(cf, phase):
    tokens = Tokens.of(torch.full((2, 3), Q), phase=phase)  # two rows are one batch
    rule = CappedChoice(capacity_factor=cf, eval_capacity_factor=cf)
    scores_BTE = LOGITS.view(2, 3, 4)
    got = given(rule(scores_BTE, scores_BTE.softmax(-1), tokens, 1.0), tokens.valid_BT)
    assert [{e: w.item() for e, w in each.items()} for each in got] == [pytest.approx(w, abs=1e-6) for w in GOLDEN[cf]]


def test_golden_vectors_of_the_top_1_gate():
    tokens = Tokens.of(torch.full((1, 6), Q))
    got = given(
        CappedChoice(k=1, capacity_factor=1.0)(LOGITS[None], LOGITS[None].softmax(-1), tokens, 1.0), tokens.valid_BT
    )
    assert [list(each) for each in got] == [[0], [0], [], [3], [], [1]]  # C = 2, by position
    assert got[0][0].item() == pytest.approx(0.643914, abs=1e-6)


def test_200_random_batches_are_routed_and_weighed_as_published_in_values_and_gradients(monkeypatch):
    rng = np.random.default_rng(0)
    dropped = 0
    for _ in range(200):
        (B, T, E), k = rng.integers((1, 1, 2), (4, 9, 7)).tolist(), int(rng.integers(1, 3))
        kind_BT = torch.tensor(rng.choice([P, Q, A, V], (B, T)))
        kind_BT[0, 0] = Q
        tokens = Tokens.of(kind_BT)
        cf, least = float(rng.choice([0.3, 0.5, 0.7, 1.0, 1.1, 1.5, 2.0])), int(rng.choice([0, 0, 1, 4]))
        scores_BTE = torch.tensor(rng.normal(size=(B, T, E)), dtype=torch.float32).requires_grad_()
        noise_BTE = torch.tensor(rng.gumbel(size=(B, T, E)), dtype=torch.float32)
        monkeypatch.setattr("plugins.capped_choice._gumbel", lambda like, noise=noise_BTE: noise)
        rule = CappedChoice(k, cf, min_capacity=least, second="sampled" if rng.random() < 0.7 else "best")
        decision = rule(scores_BTE, scores_BTE.softmax(-1), tokens, 1.0)
        got = given(decision, tokens.valid_BT)
        noise = noise_BTE[tokens.valid_BT].tolist() if rule.second == "sampled" else None
        rows = scores_BTE[tokens.valid_BT]
        want = published([list(z) for z in rows], k, cf, least, noise)
        assert [set(each) for each in got] == [set(each) for each in want]
        dropped += sum(k - len(each) for each in want)
        factors = rng.normal(size=(len(want), E)).tolist()
        sums = [
            sum((w * factors[t][e] for t, each in enumerate(ws) for e, w in each.items()), 0 * scores_BTE.sum())
            for ws in (got, want)
        ]
        torch.testing.assert_close(*sums, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            *(torch.autograd.grad(each, scores_BTE, retain_graph=True)[0] for each in sums), atol=1e-6, rtol=1e-5
        )
        for t, each in enumerate(want):
            assert all(abs(got[t][e].item() - w.item()) <= 1e-6 for e, w in each.items())
    assert dropped > 200


def test_capacity_is_rounded_up_in_float32():
    for N, E, k, factor in [(6, 4, 2, 1.5), (7, 4, 2, 1.1), (100, 8, 1, 0.7), (4096, 6, 2, 1.1), (1025, 3, 2, 1.3)]:
        want = int(np.ceil(np.float32(N / E) * np.float32(k * factor)))
        assert CappedChoice(k).room(torch.tensor(N), E, factor).item() == want
    assert CappedChoice(2, min_capacity=9).room(torch.tensor(6), 4, 0.5).item() == 9


def test_first_choices_beat_second_ones_and_earlier_rows_later_ones():
    # Everybody's first choice is 0 but the last row's, whose second it is.
    scores_BTE = torch.tensor([[[3.0, 2, 0, 0], [3, 0, 2, 0]], [[2, 3, 0, 0], [3, 0, 0, 2]]])
    tokens, rule = Tokens.of(torch.full((2, 2), Q)), CappedChoice(capacity_factor=1.0)  # C = 2

    def valid(order: list[int]) -> list[list[bool]]:
        scores = scores_BTE[order]
        return rule(scores, scores.softmax(-1), tokens, 1.0).valid_BTK.flatten(0, 1).tolist()

    assert valid([0, 1]) == [[True, True], [True, True], [True, False], [False, True]]
    assert valid([1, 0]) == [[True, False], [True, True], [True, True], [False, True]]


@torch.no_grad()
def test_who_is_turned_away_twice_keeps_the_residual_path_alone():
    model, _, tape = routed(dataclasses.replace(PLAIN, selector=CappedChoice(capacity_factor=0.25)))
    seen, batch = watched(model.train()), padded(ROWS)
    with tape.recording() as records:
        model(**batch, use_cache=False)
    real, twice = batch["attention_mask"].bool(), 0
    for record, (_, answer) in zip(records, seen, strict=True):
        alone = real & ~record.decision.valid_BTK.any(-1)
        twice += alone.sum().item()
        assert not answer[alone].any() and answer[real & ~alone].any(-1).all()
        assert not answer[~real].any()  # padding is given to nobody
    assert twice > 10


def test_drawn_second_experts_come_as_often_as_their_probabilities_say():
    N = 20000
    random.seed(0)
    scores_BTE = torch.tensor([1.0, 0.0, -1.0, 2.0]).expand(1, N, 4)
    for phase in ("train", "prefill"):
        tokens = Tokens.of(torch.full((1, N), Q), phase=phase)
        rule = CappedChoice(capacity_factor=4.0, second="sampled")
        drawn = rule(scores_BTE, scores_BTE.softmax(-1), tokens, 1.0).expert_BTK[0]
        assert (drawn[:, 0] == 3).all()
        for e, p in enumerate((0.665241, 0.244728, 0.090031)):
            count = (drawn[:, 1] == e).sum().item()
            assert abs(count - N * p) <= 3 * (N * p * (1 - p)) ** 0.5


def test_only_without_a_limit_at_inference_is_the_rule_causal():
    assert CappedChoice().causal and not CappedChoice(eval_capacity_factor=2.0).causal
    for wrong in ({"k": 3}, {"k": 0}, {"capacity_factor": 0.0}, {"eval_capacity_factor": -1.0}, {"min_capacity": -1}):
        with pytest.raises(ValueError, match="Allowed"):
            CappedChoice(**wrong)


# The balance loss.


def record_of(scores_BTE: Tensor, tokens: Tokens | None = None, rule=PLAIN.selector) -> RoutingRecord:
    tokens = Tokens.of(torch.full(scores_BTE.shape[:2], Q)) if tokens is None else tokens
    decision = rule(scores_BTE, scores_BTE.softmax(-1), tokens, 1.0)
    return RoutingRecord(Site(0, 1, "mlp", "moe"), scores_BTE, decision, None, tokens, tokens.valid_BT)


def test_the_balance_loss_of_the_golden_vectors_and_its_range():
    assert LoadBalance(choices="first")(record_of(LOGITS[None])).item() == pytest.approx(1.521455, abs=1e-5)
    capped = record_of(LOGITS[None], rule=CappedChoice(capacity_factor=0.5))
    assert LoadBalance(choices="first")(capped).item() == pytest.approx(1.521455, abs=1e-5)  # before anybody is dropped
    even = 1e-3 * torch.eye(4).repeat(3, 1)[None]
    assert LoadBalance(choices="first")(record_of(even)).item() == pytest.approx(1.0, abs=1e-5)
    collapsed = torch.tensor([40.0, 0, 0, 0]).expand(1, 9, 4)
    assert LoadBalance(choices="first")(record_of(collapsed)).item() == pytest.approx(4.0, abs=1e-5)


def aux(records: list[RoutingRecord], plugin: MixtureOfExperts) -> Tensor:
    (loss,) = plugin.losses
    return loss.weight * torch.stack([loss(record) for record in records]).sum()


@pytest.mark.parametrize("plugin", [PLAIN, CAPPED, dataclasses.replace(PLAIN, sharing="shared")])
def test_the_balance_loss_reaches_the_gates_with_and_without_checkpointing(plugin):
    gradients = []
    for replayed in (False, True):
        model, _, tape = routed(plugin, replayed=replayed)
        with tape.recording() as records:
            model.train()(**padded(ROWS), use_cache=False)
        assert len(records) == 2
        aux(records, plugin).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    gates = [name for name in gradients[0] if name.startswith("routers.")]
    assert len(gates) == (1 if plugin.sharing == "shared" else 2)
    for name, gradient in gradients[0].items():
        assert name not in gates or gradient.any(), name
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "selector", [TokenChoice(2), CappedChoice(capacity_factor=0.5), CappedChoice(second="sampled"), ExpertsChoose()]
)
def test_checkpointing_changes_no_gradient_and_writes_no_second_record(selector):
    plugin, gradients, numbers = dataclasses.replace(PLAIN, selector=selector), [], []
    for replayed in (False, True):
        model, _, tape = routed(plugin, replayed=replayed)
        random.seed(3)
        with tape.recording() as records:
            loss = model.train()(**padded(ROWS), use_cache=False).loss
            (loss + aux(records, plugin)).backward()
        numbers.append(len(records))
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert numbers == [2, 2]
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
    assert all(gradients[0][name].any() for name in gradients[0] if "experts" in name or name.startswith("routers."))


# Padding, batch mates, repetition.


def alone(rows: list[list[int]]) -> list[dict[str, Tensor]]:
    """Each row as a batch of its own, with its picture of the whole batch."""
    pictures, batches, used = padded(rows).get("pixel_values"), [], 0
    for tokens in rows:
        batch, images = padded([tokens]), tokens.count(IMAGE) // PATCHES
        if images:
            batch["pixel_values"] = pictures[used : used + images]
        batches.append(batch)
        used += images
    return batches


@pytest.mark.parametrize("selector", [TokenChoice(2), ExpertsChoose(), ALL_CHOOSE], ids=["tokens", "vision", "all"])
@pytest.mark.parametrize("side", ["right", "left"])
@torch.no_grad()
def test_padding_and_batch_mates_change_neither_answers_nor_loads_nor_losses(selector, side):
    model, _, tape = routed(dataclasses.replace(PLAIN, selector=selector))
    model.eval()
    rows = (ROWS + ROWS)[:8]
    own = [model(**batch, use_cache=False).logits[0] for batch in alone(rows)]
    for B in (1, 2, 3, 5, 8):
        batch = padded(rows[:B], side)
        real = batch["attention_mask"].bool()
        positions = (real.cumsum(1) - 1).clamp_min(0)
        pictures = padded(rows)["pixel_values"][: len(batch.get("pixel_values", []))]
        with tape.recording() as together:
            logits = model(**{**batch, "pixel_values": pictures}, position_ids=positions, use_cache=False).logits
        for b in range(B):
            torch.testing.assert_close(logits[b][real[b]], own[b], atol=2e-5, rtol=0)
    with tape.recording() as apart:
        for batch in alone(rows):
            model(**batch, use_cache=False)
    for layer in (0, 2):
        whole = next(record for record in together if record.site.layer == layer)
        parts = [record for record in apart if record.site.layer == layer]
        assert torch.equal(load_E(whole), sum(load_E(record) for record in parts))
        loss = ZLoss()
        tokens = [record.tokens.valid_BT.sum() for record in parts]
        mean = sum(loss(record) * n for record, n in zip(parts, tokens, strict=True)) / sum(tokens)
        torch.testing.assert_close(loss(whole), mean, atol=1e-4, rtol=1e-4)


def test_padding_does_not_move_the_balance_loss():
    g = torch.Generator().manual_seed(0)
    scores_BTE = torch.randn(2, 7, 4, generator=g)
    tokens = Tokens.of(torch.tensor([[Q] * 7, [Q] * 4 + [P] * 3]))
    flat = torch.cat([scores_BTE[0], scores_BTE[1, :4]])[None]
    for rule in (TokenChoice(2), CappedChoice(capacity_factor=0.5)):
        for loss in (LoadBalance(), LoadBalance(choices="first"), ZLoss()):
            got, want = loss(record_of(scores_BTE, tokens, rule)), loss(record_of(flat, rule=rule))
            torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("selector", [TokenChoice(2), CappedChoice(eval_capacity_factor=0.5), ExpertsChoose()])
@torch.no_grad()
def test_two_evaluations_are_the_same_to_the_last_bit(selector):
    model, _, _ = routed(dataclasses.replace(PLAIN, selector=selector))
    one, two = (model.eval()(**padded(ROWS), use_cache=False).logits for _ in range(2))
    assert torch.equal(one, two)


# Who trains, and experts that choose.


@pytest.mark.parametrize("preset", ["paper", "as shipped"])
def test_the_recipe_trains_exactly_what_it_says(preset):
    text = RECIPE.read_text()
    parts = yaml.safe_load(text)["model"]["init_args"]["parts"]
    if preset == "as shipped":
        parts = yaml.safe_load(next(line for line in text.splitlines() if "#   parts:" in line)[1:])["parts"]
    model, _, _ = routed()
    trained = choose(model, parts)
    freeze_all_but(model, trained)
    model.train()(**padded(ROWS), use_cache=False).loss.backward()
    decoder = "model.language_model.layers"
    want = {f"{decoder}.{layer}.mlp.experts.{name}" for layer in (0, 2) for name in ("gate_up_proj", "down_proj")}
    want |= {f"routers.moe.{layer}_mlp.network.weight" for layer in (0, 2)}
    if preset == "as shipped":
        maps = ("gate_proj", "up_proj", "down_proj")
        want |= {f"{decoder}.{layer}.mlp.{name}.weight" for layer in (1, 3) for name in maps}
        want |= {name for name, _ in model.named_parameters() if "multi_modal_projector" in name}
    assert {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()} == want
    assert set(trained.values()) == {2e-5}


def test_every_expert_that_was_taken_and_every_gate_learns():
    model, _, tape = routed(NOISY)
    with tape.recording() as records:
        model.train()(**padded(ROWS), use_cache=False).loss.backward()
    for network, record in zip(networks(model), records, strict=True):
        for name, parameter in network.experts.named_parameters():
            moved_E = parameter.grad.flatten(1).any(1)
            assert torch.equal(moved_E, load_E(record) > 0), name
    assert all(p.grad.any() for p in model.routers.parameters())


@pytest.mark.parametrize("phase", ["train", "prefill"])
@torch.no_grad()
def test_a_later_word_changes_nothing_before_it_unless_experts_choose_among_words(phase):
    gaps = {}
    for name, selector in (("vision", ExpertsChoose()), ("all", ALL_CHOOSE), ("tokens", TokenChoice(2))):
        model, _, _ = routed(
            dataclasses.replace(PLAIN, placement=All(), upcycling=Copies(noise=0.3), selector=selector)
        )
        model.train(phase == "train")
        heard = []
        for word in range(6, 16):
            batch = padded([row(1, 9)])
            batch["input_ids"][0, -2] = word
            heard.append(model(**batch, use_cache=False).logits[0, :-2])
        gaps[name] = max((each - heard[0]).abs().max().item() for each in heard)
    assert gaps["vision"] == gaps["tokens"] == 0.0 and gaps["all"] > 0.01


@torch.no_grad()
def test_experts_that_choose_answer_as_a_loop_over_experts_and_their_tokens():
    model, _, tape = routed(dataclasses.replace(NOISY, selector=ExpertsChoose()))
    seen, batch = watched(model), padded(ROWS)
    with tape.about(facts(batch)), tape.recording() as records:
        model(**batch, use_cache=False)
    for network, record, (x_BTD, answer_BTD) in zip(networks(model), records, seen, strict=True):
        experts, share_BTE = network.experts, record.scores_BTE.softmax(-1)
        want_BTD = torch.zeros_like(x_BTD)
        for e in range(4):
            gate, up = experts.gate_up_proj[e].chunk(2)
            y_BTD = (torch.nn.functional.silu(x_BTD @ gate.T) * (x_BTD @ up.T)) @ experts.down_proj[e].T
            taken_BT = record.decision.experts.routed_BTE(x_BTD.shape[1], 4)[..., e]
            want_BTD += y_BTD * (share_BTE[..., e] * taken_BT)[..., None]
            own = record.decision.tokens
            chose_BTK = (own.expert_BTK == e) & own.valid_BTK
            want_BTD += y_BTD * (own.weight_BTK * chose_BTK).sum(-1, keepdim=True)
        torch.testing.assert_close(answer_BTD, want_BTD, atol=1e-4, rtol=1e-4)


def test_routed_layers_are_those_published():
    assert Every(2)(24) == tuple(range(0, 24, 2)) and len(Every(2)(32)) == 16
    with pytest.raises(ValueError, match="routes 2 of 4"):
        routed(dataclasses.replace(PLAIN, experts=(2, 3, 4)))
    for wrong in ({"experts": 1}, {"experts": ()}, {"nulls": -1}):
        with pytest.raises(ValueError, match="Allowed"):
            MixtureOfExperts(**wrong)
    assert len(networks(routed(dataclasses.replace(PLAIN, placement=Layers((1,))))[0])) == 1
