"""Every combination of rule, cache, padding, attention and batch is equal to its rows alone, or refused."""

from itertools import product
from pathlib import Path

import pytest
import torch
import transformers
from transformers import DynamicCache

from tests.combinations import page
from tests.combinations.cell import ATTENTIONS, CACHES, GREEDY, NEW, SIDES, WITHIN, Cell, alone, outcome, verdict
from tests.combinations.models import PIXELS, ROWS, built, prompt
from tests.laws.blocks import BLOCKS
from tests.tiny import IMAGE, row

pytestmark = pytest.mark.filterwarnings("ignore:.*CalibrateThresholds.*")
PAGE = Path(__file__).parent.parent.parent / "docs/generation.md"
WAYS = list(product(CACHES, ATTENTIONS))
RULES = list(BLOCKS)
# Every way twice, and every rule twice; every way in batches of both sizes.
SOME = [(RULES[n % len(RULES)], *WAYS[n % len(WAYS)], (3, 8)[(n + n // len(WAYS)) % 2]) for n in range(2 * len(WAYS))]
RAGGED = "digits/mod_threshold.yaml"  # its layers hold unlike numbers of tokens of each row


@pytest.mark.parametrize(("rule", "cache", "attention", "rows"), SOME)
def test_some_combinations_are_what_the_page_says(rule, cache, attention, rows):
    said = verdict(Cell(rule, cache, "left", attention), [rows])
    assert said.word != "broken", said.why
    text = PAGE.read_text()
    if f"transformers\n{transformers.__version__}" in text:
        found = page.written(text)[rule][cache]
        assert said.word in found.replace("single", "refused"), f"the page says {found}, for {said.why}"


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("cache", "attention"), WAYS)
@pytest.mark.parametrize("side", SIDES)
def test_a_combination_is_equal_to_its_rows_alone_or_refused(cells, rule, cache, attention, side):
    cell = Cell(rule, cache, side, attention)
    cells[cell] = said = verdict(cell, cell.sizes)
    assert said.word != "broken", said.why


def test_a_prompt_that_is_padded_on_the_right_is_refused_by_name():
    for rule in RULES:
        found = outcome(Cell(rule, "dynamic", "right", "sdpa"), 3)
        assert found.refused and "right" in found.refused
        with pytest.raises(ValueError, match="padding_side"):
            built(rule, "sdpa", False).generate(**prompt(0, 3, "right"), max_new_tokens=1)


@pytest.mark.parametrize("rule", ["digits/p_mod.yaml", RAGGED])
@pytest.mark.parametrize("attention", ATTENTIONS)
@torch.no_grad()
def test_steps_by_hand_may_follow_a_prompt_that_is_padded_on_the_right(rule, attention):
    model, batch = built(rule, attention, False), prompt(0, len(ROWS), "right")
    mask, lengths = batch["attention_mask"], batch["attention_mask"].sum(1)
    out = model(**batch, position_ids=(mask.cumsum(1) - 1).clamp_min(0), use_cache=True)
    steps = [out.logits[range(len(ROWS)), lengths - 1]]
    for step in range(NEW - 1):
        steps[-1][:, IMAGE] = -torch.inf
        new = steps[-1].argmax(1, keepdim=True)
        mask = torch.cat([mask, torch.ones_like(new)], 1)
        places = {"attention_mask": mask, "position_ids": lengths[:, None] + step}
        out = model(input_ids=new, **places, past_key_values=out.past_key_values)
        steps.append(out.logits[:, -1])
    for b, logits in enumerate(torch.stack(steps, 1)):
        _, want = alone(rule, "dynamic", attention, b)
        seen = torch.isfinite(want) & torch.isfinite(logits)
        assert (logits - want)[seen].abs().max() <= WITHIN


@pytest.mark.parametrize("rule", ["digits/p_mod.yaml", RAGGED])
@torch.no_grad()
def test_a_further_turn_may_bring_a_picture_unless_pictures_are_ranked(rule):
    model, turn, how = built(rule, "sdpa", False), prompt(0, 1), {**GREEDY, "max_new_tokens": 3}
    first = model.generate(**turn, **how)
    ids = torch.cat([first.sequences, torch.tensor([row(1, 4, seed=9)])], 1)
    asked = {"attention_mask": torch.ones_like(ids), **how}
    again = {**asked, "past_key_values": first.past_key_values, "pixel_values": PIXELS[3:4]}
    if rule != RAGGED:
        with pytest.raises(ValueError, match="ExpertChoice ranks tokens among those of one forward"):
            model.generate(ids, **again)
        return
    anew = model.generate(ids, pixel_values=torch.cat([turn["pixel_values"], PIXELS[3:4]]), **asked)
    assert torch.equal(model.generate(ids, **again).sequences, anew.sequences)


@pytest.mark.parametrize(("name", "rows"), [("flash_attention_2", 1), ("flash_attention_2", 3), ("flex_attention", 1)])
@torch.no_grad()
def test_other_attentions_do_not_take_several_tokens_behind_a_cache(name, rows, monkeypatch):
    model, more = built(RAGGED, "sdpa", False), torch.full((rows, 2), 9)
    cache = model(**prompt(0, rows), past_key_values=DynamicCache()).past_key_values
    for layer in model.get_decoder().layers:
        monkeypatch.setattr(layer, "attention", lambda: name, raising=False)
    with model.routing.tape.answering(100), pytest.raises(ValueError, match=f"attention '{name}': use 'sdpa' or"):
        model(input_ids=more, past_key_values=cache)


@pytest.mark.slow  # it imports a compiler
@torch.no_grad()
def test_flex_attention_is_refused_because_its_masks_cannot_be_cut():
    with pytest.raises(ValueError, match="BlockMask; load the model with attention 'sdpa'"):
        built("digits/p_mod.yaml", "flex_attention", False)(**prompt(0, 3))
