"""Steps after a static cache, as `generate` compiles them on a GPU: one graph, replayed as a CUDA graph."""

import pytest
import torch

from plugins.mixture_of_experts import MixtureOfExperts
from plugins.progressive_depths import ProgressiveDepths
from routing import LinearRouter, attach
from tests.tiny import padded, row, tiny_llava

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
ROWS = [row(1, 9), row(0, 6, seed=1), row(2, 4, seed=2)]
PLUGINS = {"depth": ProgressiveDepths(router=LinearRouter(std=0.5)), "width": MixtureOfExperts()}
STEPS = 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("names", [["depth"], ["depth", "width"]])
@torch.no_grad()
def test_compiled_steps_answer_as_eager_ones_do(names, dtype):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = tiny_llava().eval()
    attach(model, {name: PLUGINS[name] for name in names})
    model.to("cuda", dtype)
    batch = {name: value.cuda() for name, value in padded(ROWS, "left").items() if name != "labels"}
    batch["pixel_values"] = batch["pixel_values"].to(dtype)
    how = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    how |= {"return_dict_in_generate": True, "output_logits": True}
    want = model.generate(**batch, **how)
    for _ in range(2):
        got = model.generate(**batch, **how, cache_implementation="static")
        if dtype is torch.float32:
            assert torch.equal(got.sequences, want.sequences)
            torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), atol=1e-3, rtol=1e-3)
        else:
            # Two words may be as good as each other from the second step on.
            torch.testing.assert_close(torch.stack(got.logits[:2]), torch.stack(want.logits[:2]), atol=0.5, rtol=0.1)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["inductor"]["cudagraph_skips"] and not counters["graph_break"]
