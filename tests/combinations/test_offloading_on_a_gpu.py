"""A cache that is offloaded to the host answers as one that stays on the accelerator."""

import pytest
import torch

from plugins.gamma_depths import GammaDepths
from plugins.progressive_depths import ProgressiveDepths
from plugins.short_v import ShortV
from routing import LinearRouter, attach
from tests.tiny import IMAGE, padded, row, tiny_llava

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
ROWS = [row(1, 9), row(0, 6, seed=1), row(2, 4, seed=2), row(1, 3, seed=3, first_text=5)]
RULES = {"p_mod": ProgressiveDepths(router=LinearRouter(std=0.5)), "gamma": GammaDepths(), "short_v": ShortV()}
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "suppress_tokens": [IMAGE], "max_new_tokens": 6}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("rows", "beams"), [(1, 1), (3, 1), (4, 3)])
@torch.no_grad()
def test_an_offloaded_cache_answers_as_a_dynamic_one(rule, attention, rows, beams):
    model = tiny_llava(attention=attention).eval()
    torch.manual_seed(1)
    attach(model, {"depth": RULES[rule]})
    batch = {name: value.cuda() for name, value in padded(ROWS[:rows], "left").items() if name != "labels"}
    how = {**GREEDY, "num_beams": beams}
    dynamic = model.cuda().generate(**batch, **how)
    assert torch.equal(dynamic, model.generate(**batch, **how, cache_implementation="offloaded"))
