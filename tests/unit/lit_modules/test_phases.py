"""What is counted while answers are generated, against loops over every token that was fed."""

import math

import pytest
import torch

from lit_modules.phases import Entered, PhaseCounts, PhaseTally
from plugins.mixture_of_depths import MixtureOfDepths
from plugins.short_v import ShortV
from routing import Between, Constant, ExpertChoice, LinearRouter, SelectBy, Site, Threshold, TokenKind, attach
from tests.laws.models import prompts, told
from tests.tiny import PATCHES, row, tiny_llava

A = TokenKind.ANSWER
ALL = tuple(kind for kind in TokenKind if kind is not TokenKind.PAD)
ROWS = [row(1, 9), row(0, 6, seed=1), row(2, 4, seed=2)]
LAYERS, NEW = 4, 6


def depths(*routes: TokenKind, **rules: object) -> MixtureOfDepths:
    alone = Threshold(routes)
    selector = SelectBy(train=ExpertChoice(routes), prefill=rules.get("prefill", alone), decode=alone)
    return MixtureOfDepths(selector=selector, router=LinearRouter(std=0.5), capacity=Constant(0.5))


def answered(plugins, *ways: str):
    """A tally of one batch that is asked plainly and in other ways, all records, and what was fed in the plain way."""
    model = tiny_llava(layers=LAYERS).eval()
    torch.manual_seed(3)
    tape = attach(model, plugins)
    batch, tally, fed = prompts(ROWS), PhaseTally(), []
    length = batch["input_ids"].shape[1]

    def ask(**changed):
        with tape.about(told(batch)):
            return model.generate(**{**batch, **changed}, max_new_tokens=NEW, do_sample=False, pad_token_id=0, **how)

    how = {"eos_token_id": 127}
    how["eos_token_id"] = [127, int(ask()[0, length + 1])]  # the first row ends at its second token
    with tape.recording() as records, tally.counting(model, tape, how["eos_token_id"]):
        fed.append(ask())
        plain = list(records)
        for way in ways:
            ask(pixel_values=torch.zeros_like(batch["pixel_values"]) if way == "blank" else batch["pixel_values"])
    answers_BT = fed[0][:, length:]
    return model, tally.counts(), plain, answers_BT, how["eos_token_id"]


def oracle(records, answers_BT, ends, phase):
    """Candidates, kept and passed of each layer, token by token."""
    found, step = {}, {}
    for record in (record for record in records if record.tokens.phase == phase):
        number = step[record.site] = step.get(record.site, -1) + 1  # of this site's forwards
        candidates, kept, passed = found.get(record.site, (0, 0, 0))
        enters_BT = record.decision.keep_BT()
        for b, t in record.tokens.valid_BT.nonzero().tolist():
            if phase == "decode" and any(token in ends for token in answers_BT[b, : number + 1].tolist()):
                continue
            candidate, enters = bool(record.candidate_BT[b, t]), bool(enters_BT[b, t])
            candidates, kept, passed = candidates + candidate, kept + (candidate and enters), passed + (not enters)
        found[record.site] = candidates, kept, passed
    return found


@pytest.mark.parametrize("ways", [(), ("blank", "again")], ids=["plainly", "in_three_ways"])
def test_phases_are_counted_token_by_token_and_only_of_plain_answers(ways):
    _, counts, records, answers_BT, ends = answered({"depth": depths(*ALL)}, *ways)
    for phase in ("prefill", "decode"):
        expected = oracle(records, answers_BT, ends, phase)
        assert len(expected) == LAYERS // 2
        for site, (candidates, kept, passed) in expected.items():
            assert counts.entered[phase, site] == Entered(candidates, kept, passed) and 0 < kept < candidates
        share = sum(kept for _, kept, _ in expected.values()) / sum(all for all, _, _ in expected.values())
        assert counts.scalars(each=False)[f"depth/retention/{phase}"] == share
    assert {candidates for candidates, *_ in expected.values()} == {1 + 2 * (NEW - 1)}  # one row ended at once


def test_the_share_of_keys_and_values_is_that_of_the_cache():
    model, counts, *_ = answered({"depth": depths(*ALL)})
    batch = prompts(ROWS)
    tokens = int(batch["attention_mask"].sum())
    assert counts.prompt == tokens
    with torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
    assert len(counts.short) == LAYERS // 2
    dense = [layer for layer in range(LAYERS) if layer not in counts.short]
    stored = {layer: int(torch.as_tensor(cache.layers[layer].filled_B()).sum()) for layer in counts.short}
    values = counts.scalars(each=True)
    for layer, n in stored.items():
        assert values[f"depth/kv_share/layer_{layer:02}"] == pytest.approx(n / tokens) and 0 < n < tokens
    assert values["depth/kv_share"] == pytest.approx((sum(stored.values()) + len(dense) * tokens) / (LAYERS * tokens))


def test_prompts_that_are_read_in_groups_are_one_answering():
    model = tiny_llava(layers=LAYERS).eval()
    tape = attach(model, {"depth": depths(*ALL)})
    batch, tally, whole = prompts(ROWS), PhaseTally(), PhaseTally()
    facts = told(batch)
    with torch.no_grad(), tape.about(facts), whole.counting(model, tape, 127):
        model(**batch, use_cache=False)
    forward = model.forward

    def in_groups(**kwargs):
        model.forward = forward
        for number, tokens in enumerate(facts.counts_B):
            own = {name: kwargs[name][number : number + 1] for name in ("input_ids", "attention_mask")}
            images = [tokens[TokenKind.VISION] // PATCHES for tokens in facts.counts_B]
            first = sum(images[:number])
            own["pixel_values"] = kwargs["pixel_values"][first : first + images[number]] if images[number] else None
            with tape.about(None):
                model(**own, use_cache=False)
        return {}

    with torch.no_grad(), tape.about(facts), tally.counting(model, tape, 127):
        model.forward = in_groups
        model(**batch)
        model(**batch, use_cache=False)  # asked again
    assert tally.counts() == whole.counts() and tally.counts().prompt == int(batch["attention_mask"].sum())


def test_what_no_rule_decides_is_not_told():
    _, counts, records, *_ = answered({"depth": depths(TokenKind.VISION, prefill=ExpertChoice())})
    values = counts.scalars(each=True)
    assert values["depth/retention/prefill"] == 0.5 and math.isnan(values["depth/retention/decode"])
    assert all(math.isnan(value) for tag, value in values.items() if "/decode/" in tag)
    assert all(record.tokens.phase == "prefill" for record in records)  # a dense step records nothing
    nothing = PhaseCounts.sum([PhaseTally().counts()]).scalars(each=True)
    assert len(nothing) == 3 and all(map(math.isnan, nothing.values()))


def test_passed_tokens_that_are_attended_to_stay_in_the_cache():
    _, counts, *_ = answered({"short": ShortV(Between(-2, -1))})
    values = counts.scalars(each=True)
    assert values["depth/retention/prefill"] < 1 and values["depth/kv_share"] == 1 and not counts.short


def test_ranks_that_saw_other_sites_are_added():
    first, second = (Site(layer, 4, "layer", "depth") for layer in (1, 3))
    one = PhaseCounts({("prefill", second): Entered(8, 2, 6)}, 10, frozenset({1, 3}))
    two = PhaseCounts({("prefill", first): Entered(4, 4, 0), ("decode", second): Entered(2, 1, 1)}, 30, frozenset({1}))
    both = PhaseCounts.sum([one, PhaseTally().counts(), two])
    values = both.scalars(each=True)
    assert both.prompt == 40 and both.short == {1, 3}
    assert values["depth/retention/prefill"] == 6 / 12 and values["depth/retention/decode"] == 0.5
    assert values["depth/kv_share"] == 1 - 6 / 160 and values["depth/kv_share/layer_03"] == 1 - 6 / 40
