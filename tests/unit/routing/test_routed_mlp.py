"""A feed-forward network that became experts: in a layer of its own, under depth routing, behind a cache."""

import copy
import dataclasses
import random

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, PhiConfig
from transformers.models.phi.modeling_phi import PhiMLP

from plugins.capped_choice import CappedChoice
from plugins.mixture_of_experts import MixtureOfExperts
from plugins.progressive_depths import ProgressiveDepths
from plugins.threshold_depths import ThresholdDepths
from routing import (
    All,
    Copies,
    ExpertsChoose,
    Gate,
    Layers,
    LinearRouter,
    RoutedLayer,
    RoutedMLP,
    Router,
    RoutingTape,
    SelectBy,
    Site,
    Softmax,
    Split,
    TokenChoice,
    TokenKind,
    Tokens,
    Upcycling,
    Weighting,
    attach,
)
from routing.inside import Inside, Running
from routing.routed_mlp import upcycled
from tests.tiny import IMAGE, PATCHES, facts, padded, row, tiny_llava

P, S, Q, A, V = TokenKind
ROWS = [row(1, 9), row(0, 6, seed=1), row(2, 4, seed=2), row(1, 3, seed=3, first_text=5)]
WILD = LinearRouter(bias=False, std=0.5)
EXACT = MixtureOfExperts(placement=All(), router=WILD)
NOISY = dataclasses.replace(EXACT, upcycling=Copies(noise=0.5))
DEPTH = ProgressiveDepths(router=LinearRouter(std=0.5))
EVERY = ExpertsChoose((S, Q, A, V))
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
PHI = PhiConfig(
    vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, pad_token_id=0
)  # fmt: skip


class Given(Router):
    """Scores that were written down."""

    def __init__(self, scores_BTE: Tensor) -> None:
        super().__init__()
        self.scores_BTE = nn.Parameter(scores_BTE)

    def forward(self, inputs) -> Tensor:
        return self.scores_BTE


def network() -> PhiMLP:
    torch.manual_seed(0)
    made = PhiMLP(PHI)
    nn.init.normal_(made.fc1.bias), nn.init.normal_(made.fc2.bias)
    return made


def alone(scores_BTE: Tensor, tokens: Tokens, upcycling: Upcycling = Copies(), nulls=0, residual=None, rule=None):  # noqa: B008
    """A routed network of its own, and what it makes of random hidden states."""
    torch.manual_seed(2)
    tape, running, rule = RoutingTape(), Running(), rule or TokenChoice(2)
    gate = Gate(Site(0, 1, "mlp", "moe"), Given(scores_BTE), Softmax(), rule, None, tape)
    experts = scores_BTE.shape[-1] - nulls
    mlp = upcycled(network(), gate, running, copy.deepcopy(PHI), upcycling, experts, nulls, residual)
    x_BTD = torch.randn(*tokens.shape, 32, generator=torch.Generator().manual_seed(3))
    tape.begin(tokens)
    running.inside = Inside(tokens)
    return mlp, x_BTD, mlp(x_BTD)


def scores(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(4))


def expert(mlp: RoutedMLP, e: int, x_D: Tensor) -> Tensor:
    """One expert of a network like Phi's on one token."""
    each = dict(mlp.experts.named_parameters())
    hidden_F = mlp.experts.act_fn(each["up_proj"][e] @ x_D + each["up_proj_bias"][e])
    return each["down_proj"][e] @ hidden_F + each["down_proj_bias"][e]


TOKENS = Tokens.of(torch.tensor([[Q, V, V, A, Q], [V, Q, A, P, P]]))


@pytest.mark.parametrize("nulls", [0, 1, 3])
def test_a_token_gets_its_experts_answers_weighed_and_nothing_of_null_ones_nor_of_padding(nulls):
    scores_BTE = scores(2, 5, 4 + nulls)
    mlp, x_BTD, answer_BTD = alone(scores_BTE, TOKENS, Copies(0.5), nulls)
    assert mlp.experts.num_experts == 4 and mlp.nulls == nulls
    met = 0
    for b, t in torch.cartesian_prod(torch.arange(2), torch.arange(5)).tolist():
        want_D = torch.zeros(32)
        if TOKENS.kind_BT[b, t] != P:
            weights = scores_BTE[b, t].softmax(-1)
            best = sorted(range(4 + nulls), key=lambda e, b=b, t=t: -scores_BTE[b, t, e].item())[:2]
            for e in best:
                met += e >= 4
                if e < 4:
                    want_D = want_D + weights[e] / weights[best].sum() * expert(mlp, e, x_BTD[b, t])
        torch.testing.assert_close(answer_BTD[b, t], want_D, atol=1e-5, rtol=1e-5)
    assert bool(met) == bool(nulls)


def test_experts_that_choose_take_null_ones_for_nothing():
    scores_BTE = scores(2, 5, 5)
    mlp, x_BTD, answer_BTD = alone(scores_BTE, TOKENS, Copies(0.5), 1, rule=EVERY)
    decision = mlp.gate.tape.earlier[0].decision
    routed_BTE, share_BTE = decision.routed_BTE(5, 5), scores_BTE.softmax(-1)
    assert routed_BTE[..., 4].any() and not routed_BTE[1, 3:].any()
    for b, t in torch.cartesian_prod(torch.arange(2), torch.arange(5)).tolist():
        terms = [share_BTE[b, t, e] * expert(mlp, e, x_BTD[b, t]) for e in range(4) if routed_BTE[b, t, e]]
        torch.testing.assert_close(answer_BTD[b, t], sum(terms, torch.zeros(32)), atol=1e-5, rtol=1e-5)


def test_copies_of_a_network_with_biases_answer_as_it_does():
    _, x_BTD, answer_BTD = alone(scores(2, 5, 4), TOKENS)
    real = TOKENS.valid_BT
    torch.testing.assert_close(answer_BTD[real], network()(x_BTD)[real], atol=1e-5, rtol=1e-5)


def test_slices_of_equal_weight_beside_one_that_is_always_on_are_the_network():
    mlp, x_BTD, answer_BTD = alone(torch.zeros(2, 5, 3), TOKENS, Split(4, 1), rule=TokenChoice(3))
    assert mlp.scale == 3 and mlp.always is not None
    real = TOKENS.valid_BT
    torch.testing.assert_close(answer_BTD[real], network()(x_BTD)[real], atol=1e-5, rtol=1e-5)


def test_a_residual_branch_is_exact_at_first_and_weighs_the_two_afterwards():
    branches = Given(scores(2, 5, 2))
    mlp, x_BTD, answer_BTD = alone(scores(2, 5, 4), TOKENS, residual=branches)
    real, dense = TOKENS.valid_BT, network()(x_BTD)
    torch.testing.assert_close(answer_BTD[real], dense[real], atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        mlp.experts.down_proj.zero_(), mlp.experts.down_proj_bias.zero_()
    mlp.running.inside = Inside(TOKENS)
    share_BT2 = branches.scores_BTE.softmax(-1)
    torch.testing.assert_close(mlp(x_BTD)[real], (share_BT2[..., 1:] * dense)[real], atol=1e-5, rtol=1e-5)


def test_called_outside_its_layer_it_says_so():
    mlp, x_BTD, _ = alone(scores(2, 5, 4), TOKENS)
    mlp.running.inside = None
    with pytest.raises(RuntimeError, match="another layer's tokens"):
        mlp(x_BTD)
    mlp.gate.tape.end()
    with pytest.raises(RuntimeError, match="knows nothing about its tokens"):
        mlp(x_BTD)


@pytest.mark.parametrize(
    ("rule", "nulls"), [(TokenChoice(2), 0), (TokenChoice(2), 1), (CappedChoice(capacity_factor=0.5), 0)]
)
def test_experts_compute_rows_that_were_asked_for_and_no_others(rule, nulls, monkeypatch):
    rows: list[int] = []

    def product(x_SD, weight_EDF, ends_E):
        rows.append(ends_E[-1].item())
        return torch.nn.functional.grouped_mm(x_SD, weight_EDF, offs=ends_E)

    monkeypatch.setattr("routing.experts._product", product)
    mlp, _, _ = alone(scores(2, 5, 4 + nulls), TOKENS, nulls=nulls, rule=rule)
    decision = mlp.gate.tape.earlier[0].decision
    asked = (decision.valid_BTK & (decision.expert_BTK < 4)).sum().item()
    assert rows == [asked] * 2 and (asked < 2 * 8 or (rule, nulls) == (TokenChoice(2), 0))


# Whole models.


def routed(*plugins, build=tiny_llava, replayed=False):
    """A routed model, a dense copy, and the tape; plugins of width and depth."""
    model = build()
    dense = copy.deepcopy(model)
    torch.manual_seed(1)
    tape = attach(model, {f"plugin_{number}": plugin for number, plugin in enumerate(plugins)})
    if replayed:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return model, dense, tape


def small() -> LlavaForConditionalGeneration:
    return tiny_llava(layers=4)


def phi() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=7
    )
    text = {"vision_config": vision, "text_config": copy.deepcopy(PHI), "image_token_id": IMAGE}
    made = LlavaForConditionalGeneration(LlavaConfig(**text, vision_feature_layer=-2, image_seq_length=PATCHES))
    for name, parameter in made.named_parameters():
        if "language_model" in name:
            nn.init.normal_(parameter, std=0.2)
    return made


CHANGES = [{}, {"experts": (2, 3, 4, 6)}, {"residual": True}, {"sharing": "shared"}, {"modalities": "separate"}]


@pytest.mark.parametrize("build", [small, phi])
@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_the_first_step_answers_as_the_dense_model(build, change):
    model, dense, _ = routed(dataclasses.replace(EXACT, **change), build=build)
    batch = padded(ROWS)
    real = batch["attention_mask"].bool()
    got, want = (each(**batch, use_cache=False).logits[real] for each in (model, dense))
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    numbers = [module.experts.num_experts for module in model.modules() if isinstance(module, RoutedMLP)]
    assert numbers == list(change.get("experts", (4,) * 4))


@dataclasses.dataclass(frozen=True)
class One(Weighting):
    def __call__(self, scores_BTE):
        return torch.ones_like(scores_BTE)


def test_layers_routed_in_depth_and_width_at_full_capacity_are_the_dense_model():
    model, dense, _ = routed(DEPTH, EXACT)
    for layer in model.get_decoder().layers:
        if isinstance(layer, RoutedLayer):
            layer.gate = dataclasses.replace(layer.gate, capacity=None, weighting=One())
    batch = padded(ROWS)
    real = batch["attention_mask"].bool()
    got, want = (each(**batch, use_cache=False).logits[real] for each in (model, dense))
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("phase", ["train", "prefill"])
@pytest.mark.parametrize("selector", [TokenChoice(2), CappedChoice(capacity_factor=0.5), ExpertsChoose()])
@torch.no_grad()
def test_gates_inside_a_layer_see_and_count_the_tokens_that_entered_alone(selector, phase):
    model, _, tape = routed(DEPTH, dataclasses.replace(EXACT, selector=selector))
    batch = padded(ROWS)
    with tape.about(facts(batch)), tape.recording() as records:
        model.train(phase == "train")(**batch, use_cache=False)
    outer = {record.site.layer: record for record in records if record.site.part == "layer"}
    inner = {record.site.layer: record for record in records if record.site.part == "mlp"}
    assert len(inner) == 8 and 0 < len(outer) < 8
    for layer, record in inner.items():
        kinds = facts(batch).kind_BT
        if layer in outer:
            keep_BT = outer[layer].decision.keep_BT()
            kinds = [row_T[keep_T].tolist() for row_T, keep_T in zip(kinds, keep_BT, strict=True)]
        else:
            kinds = [row_T[row_T != P].tolist() for row_T in kinds]
        seen = [row_T[row_T != P].tolist() for row_T in record.tokens.kind_BT]
        assert seen == kinds and record.tokens.phase == phase
        routed_BTE = record.decision.routed_BTE(record.tokens.shape[1], 4)
        assert not routed_BTE[~record.tokens.valid_BT].any()
        for b, counts in enumerate(record.tokens.counts_B):  # bounds, of which the device is not asked
            assert all(kinds[b].count(kind) <= counts[kind] for kind in (S, Q, A, V))
        if isinstance(selector, ExpertsChoose):
            taken = routed_BTE & (record.tokens.kind_BT == V)[..., None]
            for b, row_TE in enumerate(taken):
                n = kinds[b].count(V)
                assert row_TE.sum(0).tolist() == [min(max(n // 2, 1), n)] * 4
        if isinstance(selector, CappedChoice) and phase == "train":
            N = record.tokens.valid_BT.sum().item()
            assert routed_BTE.sum((0, 1)).max() <= -(-N // 4) and routed_BTE.sum() < 2 * N


@pytest.mark.parametrize("rows", [ROWS, [row(0, 6), row(0, 9)]], ids=["pictures", "text"])
@pytest.mark.parametrize(
    "selector", [TokenChoice(2), CappedChoice(capacity_factor=0.5, second="sampled"), ExpertsChoose()]
)
def test_checkpointing_layers_routed_both_ways_changes_no_gradient(selector, rows):
    gradients, numbers = [], []
    for replayed in (False, True):
        model, _, tape = routed(DEPTH, dataclasses.replace(NOISY, selector=selector), replayed=replayed)
        random.seed(5)
        with tape.recording() as records:
            model.train()(**padded(rows), use_cache=False).loss.backward()
        numbers.append(len(records))
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert numbers[0] == numbers[1] and gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
    trained = [n for n in gradients[0] if "experts" in n and gradients[0][n].any()]
    assert len(trained) == 16


def test_a_replay_draws_the_same_dropout_behind_a_drawn_expert():
    gradients = []
    for replayed in (False, True):
        drawn = dataclasses.replace(NOISY, selector=CappedChoice(second="sampled"))
        model, _, _ = routed(drawn, build=phi, replayed=replayed)
        for layer in model.get_decoder().layers:
            layer.resid_dropout.p = 0.3
        random.seed(5), torch.manual_seed(5)
        model.train()(**padded(ROWS), use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


@torch.no_grad()
def test_every_way_of_running_the_experts_of_a_model_gives_the_same_answers():
    model, _, _ = routed(dataclasses.replace(NOISY, nulls=1), build=small)
    batch, answers = padded(ROWS), []
    for way in ("grouped_mm", "batched_mm", "eager"):
        model.config.get_text_config()._experts_implementation = way
        answers.append(model.eval()(**batch, use_cache=False).logits[batch["attention_mask"].bool()])
    assert (answers[1] - answers[0]).abs().max() <= 1e-4 and (answers[2] - answers[0]).abs().max() <= 1e-4
    assert not torch.equal(answers[1], answers[0])  # another way it was


# Generation.

TEXT_FREE = ThresholdDepths(placement=Layers((0, 2)), routes=(V,), router=LinearRouter(std=3.0))
CACHED = {
    "width": (NOISY,),
    "capped": (dataclasses.replace(NOISY, selector=CappedChoice(capacity_factor=0.5)),),
    "experts choose": (dataclasses.replace(NOISY, selector=ExpertsChoose()),),
    "residual": (dataclasses.replace(NOISY, residual=True, nulls=1),),
    "split": (dataclasses.replace(NOISY, experts=3, upcycling=Split(4, 1)),),
    "depth and width": (DEPTH, NOISY),
    "thresholds and width": (TEXT_FREE, dataclasses.replace(NOISY, selector=ExpertsChoose())),
}


def prompts(rows: list[list[int]]) -> dict[str, Tensor]:
    batch = padded(rows, "left")
    del batch["labels"]
    return batch


@pytest.mark.parametrize("name", CACHED)
@torch.no_grad()
def test_cached_steps_equal_one_forward(name):
    model, _, tape = routed(*CACHED[name], build=tiny_llava if "depth" in name else small)
    model.eval()
    batch, more = prompts(ROWS), torch.randint(6, 128, (len(ROWS), 3), generator=torch.Generator().manual_seed(7))
    mask = torch.cat([batch["attention_mask"], torch.ones_like(more)], 1)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    whole = {**batch, "input_ids": torch.cat([batch["input_ids"], more], 1), "attention_mask": mask}
    full = model(**whole, position_ids=positions, use_cache=False).logits
    T = batch["input_ids"].shape[1]
    out = model(**batch, position_ids=positions[:, :T], use_cache=True)
    torch.testing.assert_close(out.logits[:, -1], full[:, T - 1], atol=1e-4, rtol=1e-4)
    for t in range(3):
        with tape.recording() as records:
            out = model(
                input_ids=more[:, t : t + 1],
                attention_mask=mask[:, : T + t + 1],
                position_ids=positions[:, T + t : T + t + 1],
                past_key_values=out.past_key_values,
                use_cache=True,
            )
        torch.testing.assert_close(out.logits[:, 0], full[:, T + t], atol=1e-4, rtol=1e-4)
        assert all(record.tokens.phase == "decode" for record in records)


@pytest.mark.parametrize("name", ["width", "experts choose", "depth and width"])
@pytest.mark.parametrize("beams", [1, 3])
def test_a_left_padded_batch_answers_as_its_rows_do_alone(name, beams):
    model, _, _ = routed(*CACHED[name], build=tiny_llava if "depth" in name else small)
    model.eval()
    batch, image = prompts(ROWS), 0
    together = model.generate(**batch, **GREEDY, num_beams=beams)[:, batch["input_ids"].shape[1] :]
    for b, tokens in enumerate(ROWS):
        ids, images = torch.tensor([tokens]), tokens.count(IMAGE) // PATCHES
        own = {"pixel_values": batch["pixel_values"][image : image + images]} if images else {}
        answer = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **own, **GREEDY, num_beams=beams)
        assert together[b].tolist() == answer[0, len(tokens) :].tolist(), b
        image += images


@pytest.mark.parametrize(
    ("selector", "named"), [(EVERY, "ExpertsChoose"), (CappedChoice(eval_capacity_factor=2.0), "CappedChoice")]
)
def test_a_prompt_in_chunks_and_answers_behind_it_are_refused_by_name_where_tokens_compete(selector, named):
    model, _, _ = routed(dataclasses.replace(EXACT, selector=selector), build=small)
    ids = torch.tensor([row(0, 12)])
    with pytest.raises(ValueError, match=rf"(?s)under {named}.*Allowed.*Pass use_cache=False"):
        model.eval().generate(ids, **GREEDY, prefill_chunk_size=5)
    with pytest.raises(ValueError, match=named):
        model.generate(ids, **GREEDY)
    mixed = SelectBy(train=selector, prefill=selector, decode=TokenChoice(2))
    model, _, _ = routed(dataclasses.replace(EXACT, selector=mixed), build=small)
    assert model.eval().generate(ids, **GREEDY).shape == (1, 13 + 6)
    with pytest.raises(ValueError, match=named):  # the prompt's second chunk meets the rule of prefill
        model.generate(ids, **GREEDY, prefill_chunk_size=5)


def test_a_prompt_in_chunks_is_answered_as_one_that_was_read_at_once_where_tokens_choose():
    for selector in (TokenChoice(2), ExpertsChoose()):  # no vision in it
        model, _, _ = routed(dataclasses.replace(NOISY, selector=selector), build=small)
        ids = torch.tensor([row(0, 12)])
        whole, chunks = (model.eval().generate(ids, **GREEDY, **how) for how in ({}, {"prefill_chunk_size": 5}))
        assert torch.equal(whole, chunks)


def test_reentrant_checkpointing_is_refused_because_records_would_lack_their_graph():
    model = tiny_llava(layers=4)
    tape = attach(model, {"moe": MixtureOfExperts()})
    model.train().gradient_checkpointing_enable({"use_reentrant": True})
    batch = padded([row(1, 6)])
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        model(**batch, use_cache=False)
    assert tape.tokens is None
    model.routers.requires_grad_(False)
    assert model(**batch, use_cache=False).loss.isfinite()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_model_that_is_cast_keeps_its_routers_and_trains(dtype):
    model = tiny_llava(layers=4)
    attach(model, {"depth": ProgressiveDepths(), "moe": MixtureOfExperts(residual=True)})
    batch = padded([row(1, 6)])
    batch["pixel_values"] = batch["pixel_values"].to(dtype)
    model.to(dtype).train()(**batch, use_cache=False).loss.backward()
    assert {parameter.dtype for parameter in model.routers.parameters()} == {torch.float32}
    assert all(p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_tokens_behind_a_cache_that_nobody_spoke_of_are_refused_where_experts_choose_otherwise_in_steps():
    model = tiny_llava(layers=4).eval()
    first, then = TokenChoice(2), TokenChoice(1, renormalise=False)
    tape = attach(model, {"moe": MixtureOfExperts(selector=SelectBy(train=first, prefill=first, decode=then))})
    words = torch.tensor([row(0, 9)])
    with torch.no_grad():
        cache = model(input_ids=words[:, :6], use_cache=True).past_key_values
        with pytest.raises(ValueError, match=r"3 tokens follow a cache: layer 0 .* TokenChoice"):
            model(input_ids=words[:, 6:9], past_key_values=cache)
        told = Tokens.of(torch.full_like(words, TokenKind.QUESTION))
        with tape.about(told), tape.recording() as records:
            model(input_ids=words[:, 6:9], past_key_values=cache)
    assert [record.decision.expert_BTK.shape[2] for record in records] == [2, 2]


def test_an_assistant_is_refused_where_prompts_and_answers_choose_by_unlike_rules():
    model, text = tiny_llava(layers=4).eval(), {"input_ids": torch.tensor([[9, 8, 9, 8, 9]])}
    apart = SelectBy(TokenChoice(2), TokenChoice(2), TokenChoice(1, renormalise=False))
    attach(model, {"moe": dataclasses.replace(EXACT, selector=apart)})
    model.generate(**text, **GREEDY)
    with pytest.raises(ValueError, match="layer 0 decides by TokenChoice there and by TokenChoice in answers"):
        model.generate(**text, **GREEDY, prompt_lookup_num_tokens=2)
