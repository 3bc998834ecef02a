"""Steps of decoding that are compiled, after a static cache: one graph, and what the eager ones answer."""

import copy
import gc
import weakref
from collections import Counter
from functools import wraps

import pytest
import torch
from transformers import CompileConfig, DynamicCache, StaticCache

from plugins.expert_choice_experts import ExpertChoiceExperts
from plugins.hash_experts import HashExperts
from plugins.late_withdrawal import LateWithdrawal
from plugins.mixture_of_depths import MixtureOfDepths
from plugins.mixture_of_experts import MixtureOfExperts
from plugins.progressive_depths import ProgressiveDepths
from plugins.short_v import ShortV
from routing import (
    All,
    AllOrNothing,
    ExpertChoice,
    LinearRouter,
    RoutedKV,
    SelectBy,
    Threshold,
    TokenKind,
    Tokens,
    attach,
    stored,
)
from tests.tiny import IMAGE, padded, row, tiny_llava

ROWS = [row(1, 9), row(0, 6, seed=1), row(2, 4, seed=2), row(1, 3, seed=3, first_text=5)]
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "suppress_tokens": [IMAGE]}
P_MOD = ProgressiveDepths(router=LinearRouter(std=0.5))
EXPERTS = MixtureOfExperts()
DECIDING = MixtureOfDepths(
    placement=All(), selector=SelectBy(ExpertChoice(), ExpertChoice(), Threshold((TokenKind.ANSWER,)))
)
PLUGINS = {
    "p_mod": {"depth": P_MOD},
    "late": {"depth": LateWithdrawal()},
    "short_v": {"depth": ShortV()},
    "experts": {"width": EXPERTS},
    "experts_choose": {"width": ExpertChoiceExperts()},
    "hash": {"width": HashExperts()},
    "depth_and_width": {"depth": P_MOD, "width": EXPERTS},
}


class Graphs:
    """A backend that runs graphs as they are, and counts its own and their runs."""

    def __init__(self):
        self.made, self.runs, self.breaks = 0, 0, False

    def __call__(self, graph, inputs):
        self.made += 1

        def run(*args):
            output = graph(*args)
            if self.breaks:
                raise KeyboardInterrupt
            self.runs += 1
            return output

        return run

    def __deepcopy__(self, memo):
        return self


@pytest.fixture
def graphs():
    torch._dynamo.reset()
    yield Graphs()
    torch._dynamo.reset()


def routed(plugins, attention="sdpa"):
    model = tiny_llava(layers=4, attention=attention).eval()
    attach(model, plugins)
    torch.manual_seed(1)
    for parameter in model.routers.parameters() if hasattr(model, "routers") else ():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def prompt(rows):
    batch = padded(ROWS[:rows], "left")
    del batch["labels"]
    return batch


def compiling(graphs):
    config = CompileConfig(backend=graphs, mode=None, fullgraph=True, dynamic=False)
    config._compile_all_devices = True
    return {"compile_config": config}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", PLUGINS)
@torch.no_grad()
def test_all_steps_are_one_graph_and_answer_as_eager_ones_do(name, attention, graphs):
    model, batch = routed(PLUGINS[name], attention), prompt(3)
    how = {**GREEDY, "max_new_tokens": 6, "return_dict_in_generate": True, "output_logits": True}
    want = model.generate(**batch, **how)
    for times in (1, 2):
        got = model.generate(**batch, **how, cache_implementation="static", **compiling(graphs))
        assert torch.equal(got.sequences, want.sequences)
        torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), atol=1e-5, rtol=1e-5)
        assert (graphs.made, graphs.runs) == (1, 5 * times - 1)  # the first of all steps was eager
    for one, other in zip(stored(got.past_key_values), stored(want.past_key_values), strict=True):
        assert one.slots >= other.slots and one.filled == other.filled


@torch.no_grad()
def test_rows_may_be_reordered_between_compiled_steps(graphs):
    model, batch = routed({"depth": P_MOD}), prompt(3)
    length, text = batch["input_ids"].shape[1], model.config.get_text_config()
    order = torch.tensor([2, 0, 0])
    compiled = model.get_compiled_call(compiling(graphs)["compile_config"])
    logits = []
    for cache, step in ((DynamicCache(), model), (StaticCache(config=text, max_cache_len=length + 9), compiled)):
        with model.routing.tape.answering(length):
            model(**batch, past_key_values=cache)
            for at in range(8):
                step_at = {"input_ids": torch.full((3, 1), 9), "position_ids": torch.full((3, 1), length + at)}
                logits.append(step(**step_at, past_key_values=cache).logits)
                if at == 2:
                    cache.reorder_cache(order)
    assert graphs.runs == 7
    for eager, got in zip(logits[:8], logits[8:], strict=True):
        torch.testing.assert_close(got, eager, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_eager_and_compiled_steps_may_follow_each_other(graphs):
    """Turns of a conversation, the second one of several tokens, over one static cache."""
    model, batch = routed({"depth": P_MOD}), prompt(1)
    answers = []
    for how in ({}, compiling(graphs)):
        cache = StaticCache(config=model.config.get_text_config(), max_cache_len=80)
        first = model.generate(**batch, **GREEDY, max_new_tokens=5, past_key_values=cache, **how)
        longer = torch.cat([first, torch.randint(6, 128, (1, 4), generator=torch.Generator().manual_seed(0))], 1)
        more = {"input_ids": longer, "attention_mask": torch.ones_like(longer)}
        answers.append(model.generate(**more, **GREEDY, max_new_tokens=5, past_key_values=cache, **how))
        # One more token, eagerly.
        answers.append(model(input_ids=longer[:, :1], past_key_values=cache).logits)
    assert torch.equal(answers[0], answers[2])
    torch.testing.assert_close(answers[3], answers[1], atol=1e-5, rtol=1e-5)
    assert graphs.runs


@torch.no_grad()
def test_steps_in_which_layers_decide_and_steps_that_are_recorded_run_eagerly(graphs):
    how = {**GREEDY, "max_new_tokens": 4, "cache_implementation": "static"}
    deciding = routed({"depth": DECIDING})
    want = deciding.generate(**prompt(3), **GREEDY, max_new_tokens=4)
    assert torch.equal(deciding.generate(**prompt(3), **how, **compiling(graphs)), want)
    model = routed({"width": EXPERTS})
    model.generate(**prompt(3), **how, **compiling(graphs))
    runs = graphs.runs
    with model.routing.tape.recording() as records:
        model.generate(**prompt(3), **how, **compiling(graphs))
    assert runs == graphs.runs == 2
    assert Counter(record.scores_BTE.shape[1] for record in records)[1] == 3 * len(model.routing.gates)


class Turns:
    """The same tokens to a model with a dynamic cache, and to its compiled steps with a static one."""

    def __init__(self, model, graphs, length):
        self.model, self.step = model, model.get_compiled_call(compiling(graphs)["compile_config"])
        self.static = StaticCache(config=model.config.get_text_config(), max_cache_len=length)
        self.dynamic = DynamicCache()

    def read(self, **inputs):
        for cache in (self.dynamic, self.static):
            self.model(**inputs, past_key_values=cache)

    def agree(self):
        token = {"input_ids": torch.full((1, 1), 9)}
        want = self.model(**token, past_key_values=self.dynamic).logits
        torch.testing.assert_close(self.step(**token, past_key_values=self.static).logits, want, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_chunk_that_nobody_enters_may_come_between_compiled_steps(graphs):
    nobody = SelectBy(ExpertChoice(), *[AllOrNothing()] * 2)
    model = routed({"depth": MixtureOfDepths(placement=All(), selector=nobody)})
    turns, ids = Turns(model, graphs, 60), prompt(2)["input_ids"][1:, -7:]
    first, chunk = ids.shape[1], 4
    with model.routing.tape.answering(first):
        turns.read(input_ids=ids)
        for _ in range(3):
            turns.agree()
    kinds = torch.full((1, first + 3 + chunk), int(TokenKind.QUESTION))
    kinds[:, -chunk:] = int(TokenKind.VISION)
    with model.routing.tape.about(Tokens.of(kinds)), model.routing.tape.answering(kinds.shape[1]):
        turns.read(input_ids=torch.full((1, chunk), 11))
        for _ in range(3):
            turns.agree()
    assert graphs.runs == 5


@torch.no_grad()
def test_a_compiled_step_that_breaks_off_is_taken_anew(graphs):
    model = routed({"depth": P_MOD})
    turns, ids = Turns(model, graphs, 60), prompt(2)["input_ids"][1:, -7:]
    with model.routing.tape.answering(7):
        turns.read(input_ids=ids)
        for _ in range(3):
            turns.agree()
        graphs.breaks = True
        dense = [layer for layer in turns.static.layers if not isinstance(layer, RoutedKV)]
        read = [layer.cumulative_length.clone() for layer in dense]
        with pytest.raises(KeyboardInterrupt):
            turns.step(input_ids=torch.full((1, 1), 9), past_key_values=turns.static)
        for layer, before in zip(dense, read, strict=True):  # transformers' own go on
            layer.cumulative_length.copy_(before)
        graphs.breaks = False
        for _ in range(2):
            turns.agree()


@torch.no_grad()
def test_a_cache_that_was_reset_takes_a_prompt_that_needs_another_room(graphs):
    model = routed({"depth": P_MOD})
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=80)
    for images in (1, 2):
        batch = padded([row(images, 9)])
        del batch["labels"]
        cache.reset()
        how = {**GREEDY, "max_new_tokens": 5}
        got = model.generate(**batch, **how, past_key_values=cache, **compiling(graphs))
        assert torch.equal(got, model.generate(**batch, **how))
    assert graphs.made == 2


@pytest.mark.parametrize("disable", [True, False])
@torch.no_grad()
def test_layers_that_somebody_compiled_answer_after_a_static_cache(disable, graphs):
    model, batch = routed({"depth": P_MOD}), prompt(2)
    how = {**GREEDY, "max_new_tokens": 5}
    want = model.generate(**batch, **how)
    for layer in model.get_decoder().layers:
        layer.compile(backend="eager")
    static = {"cache_implementation": "static", **compiling(graphs), "disable_compile": disable}
    assert torch.equal(model.generate(**batch, **how, **static), want)
    assert bool(graphs.runs) != disable


@torch.no_grad()
def test_a_forward_that_somebody_put_on_the_model_stays_and_is_called(graphs):
    model, batch, calls = routed({"depth": P_MOD}), prompt(2), []
    how = {**GREEDY, "max_new_tokens": 5, "cache_implementation": "static", **compiling(graphs)}
    before, forward = model.generate(**batch, **how), model.forward

    @wraps(forward)
    def counting(*args, **kwargs):
        calls.append(1)
        return forward(*args, **kwargs)

    model.forward = counting
    assert torch.equal(model.generate(**batch, **how), before)
    assert model.forward is counting
    assert len(calls) >= 3  # the prompt, an eager step, and a trace


@torch.no_grad()
def test_a_copy_of_a_model_compiles_its_own_steps(graphs):
    model, batch = routed({"depth": P_MOD}), prompt(2)
    how = {**GREEDY, "max_new_tokens": 4, "cache_implementation": "static", **compiling(graphs)}
    before = model.generate(**batch, **how)
    other = copy.deepcopy(model)
    other.get_output_embeddings().weight.neg_()
    assert not torch.equal(other.generate(**batch, **how), before)
    assert torch.equal(model.generate(**batch, **how), before)
    assert "forward" not in vars(model)
    other, gone = copy.deepcopy(model), weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@torch.no_grad()
def test_a_full_cache_is_told_of_before_a_compiled_step_writes_past_its_end(graphs):
    model, batch = routed({"depth": MixtureOfDepths(placement=All())}), prompt(1)
    length = batch["input_ids"].shape[1]
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=length + 3)
    model(**batch, past_key_values=cache)
    step = model.get_compiled_call(compiling(graphs)["compile_config"])
    for at in range(3):
        step(input_ids=torch.full((1, 1), 9), position_ids=torch.full((1, 1), length + at), past_key_values=cache)
    assert graphs.runs == 2
    with pytest.raises(ValueError, match="has no room for 1 more in a routed layer"):
        step(input_ids=torch.full((1, 1), 9), position_ids=torch.full((1, 1), length + 3), past_key_values=cache)
