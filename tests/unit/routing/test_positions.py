"""Kept tokens that are numbered anew in their layer, cached or in one forward, whatever the padding."""

from dataclasses import dataclass

import pytest
import torch

from routing import (
    Constant,
    DepthSelector,
    Every,
    ExpertChoice,
    FeedForwardBranch,
    LinearRouter,
    RoutingPlugin,
    Sigmoid,
    Threshold,
    TokenKind,
    attach,
)
from tests.compare import ROWS, batch_of, positions_of, reference, told
from tests.tiny import IMAGE, padded, tiny_llava
from tests.unit.routing.test_families import build

EVERYTHING = tuple(kind for kind in TokenKind if kind is not TokenKind.PAD)
ALONE = Threshold(EVERYTHING)


@dataclass(frozen=True)
class Renumbered(RoutingPlugin):
    selector: DepthSelector = Threshold(EVERYTHING)
    passed_give: str = "nothing"

    def apply(self, decoder):
        for site in decoder.sites(Every(2)):
            gate = decoder.gate(site, LinearRouter(std=0.5), Sigmoid(), self.selector, Constant(0.5))
            decoder.route_layer(site, gate, FeedForwardBranch(), self.passed_give, positions="compact")


def routed(selector=ALONE, attention="sdpa"):
    model = tiny_llava(attention=attention)
    torch.manual_seed(1)
    return model, attach(model, {"depth": Renumbered(selector)})


def angles_at(dense, places):
    return dense.get_decoder().rotary_emb(torch.zeros(1, len(places), 32), position_ids=torch.tensor([places]))


@pytest.mark.parametrize("phase", ["train", "prefill"])
@torch.no_grad()
def test_kept_tokens_stand_at_0_1_2_in_their_layer(phase):
    (model, tape), dense = routed(), reference(8)
    batch, layer = batch_of(phase), 2
    batch.pop("labels", None)
    seen = {}
    attention = model.get_decoder().layers[layer].self_attn
    attention.register_forward_pre_hook(lambda _, args, kw: seen.update(kw), with_kwargs=True)
    with tape.about(told(batch)), tape.recording() as records:
        model.train(phase == "train")(**batch, position_ids=positions_of(batch), use_cache=False)
    kept = records[layer // 2].decision
    for b in range(len(ROWS)):
        n = int(kept.valid_BK[b].sum())
        for got, want in zip(seen["position_embeddings"], angles_at(dense, list(range(n))), strict=True):
            assert torch.equal(got[b, :n], want[0])


@torch.no_grad()
def test_where_nobody_is_passed_by_nothing_is_renumbered():
    (model, tape), dense = routed(Threshold(EVERYTHING, p=0.0)), reference(8)
    whole = attach(plain := tiny_llava(), {"depth": Same()})
    for phase in ("train", "prefill"):
        batch = batch_of(phase)
        batch.pop("labels", None)
        with tape.about(told(batch)), whole.about(told(batch)):
            answers = [m.eval()(**batch, position_ids=positions_of(batch), use_cache=False) for m in (model, plain)]
        real = batch["attention_mask"].bool()
        torch.testing.assert_close(answers[0].logits[real], answers[1].logits[real], atol=1e-5, rtol=1e-5)
    assert dense is not model


@dataclass(frozen=True)
class Same(RoutingPlugin):
    """The same layers and weights at original positions, all tokens in."""

    def apply(self, decoder):
        torch.manual_seed(1)
        for site in decoder.sites(Every(2)):
            rule = Threshold(EVERYTHING, p=0.0)
            gate = decoder.gate(site, LinearRouter(std=0.5), Sigmoid(), rule, Constant(0.5))
            decoder.route_layer(site, gate, FeedForwardBranch())


@pytest.mark.parametrize("selector", [Threshold(EVERYTHING), ExpertChoice()], ids=["all", "vision"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_cached_answers_continue_each_layers_own_numbers(selector, attention):
    model, tape = routed(selector, attention)
    batch, steps = batch_of("prefill"), 6
    how = {"max_new_tokens": steps, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    how |= {"suppress_tokens": [IMAGE]}
    with tape.about(told(batch)), tape.recording() as records:
        cached = model.eval().generate(**batch, **how, return_dict_in_generate=True, output_logits=True)
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, steps), value=1)
    whole = {**batch, "input_ids": cached.sequences, "attention_mask": mask}
    with tape.about(told(batch)):
        once = model(**whole, position_ids=(mask.cumsum(1) - 1).clamp_min(0), use_cache=False).logits
    torch.testing.assert_close(torch.stack(cached.logits, 1), once[:, -steps - 1 : -1], atol=1e-5, rtol=1e-5)
    decided = [record for record in records if record.tokens.phase == "decode"]
    if selector == Threshold(EVERYTHING):
        entered = torch.cat([record.decision.keep_BT() for record in decided]).float().mean()
        assert 0.1 < entered < 0.9  # holes are made, and fewer tokens stored than read


def test_three_positions_a_token_are_refused():
    with pytest.raises(ValueError, match=r"M-RoPE counts three.*\n.*\nGive positions: original"):
        attach(build("Qwen2VL"), {"depth": Renumbered()})


def test_tokens_that_are_still_attended_to_keep_their_positions():
    with pytest.raises(ValueError, match="give keys and values keep their positions"):
        attach(tiny_llava(), {"depth": Renumbered(passed_give="keys_and_values")})


def test_replays_number_alike():
    model, _ = routed()
    batch = padded(ROWS)
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    model(**batch, use_cache=False).loss.backward()
    plain, _ = routed()
    plain.train()(**batch, use_cache=False).loss.backward()
    for got, want in zip(model.parameters(), plain.parameters(), strict=True):
        assert got.grad is want.grad is None or torch.equal(got.grad, want.grad)
