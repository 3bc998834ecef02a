"""The routed layer: where it decides, what it may not touch, and what it costs the tools around it."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

from plugins.progressive_depths import ProgressiveDepths
from routing import LinearRouter, RoutedLayer, RoutingTape, Tokens, attach
from tests.tiny import facts, padded, row, tiny_llava

WILD = ProgressiveDepths(router=LinearRouter(std=0.5))
ROWS = [row(1, 9), row(0, 6, seed=1), row(2, 4, seed=2)]


def routed(layers: int = 8, **plugin) -> tuple[torch.nn.Module, RoutingTape]:
    model = tiny_llava(layers)
    torch.manual_seed(1)
    tape = attach(model, {"depth": ProgressiveDepths(router=LinearRouter(std=0.5), **plugin)})
    return model, tape


def checkpointed(model: torch.nn.Module, reentrant: bool) -> None:
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})


def gradients(model: torch.nn.Module, tape: RoutingTape) -> tuple[dict[str, torch.Tensor], int]:
    model.train()
    with tape.recording() as records:
        loss = model(**padded(ROWS), use_cache=False).loss
        loss = loss + sum(record.scores_BTE.square().mean() for record in records)
        loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, len(records)


def test_checkpointing_changes_no_gradient_and_writes_no_record_twice():
    model, tape = routed()
    replayed = copy.deepcopy(model)
    again = next(layer.gate.tape for layer in replayed.get_decoder().layers if isinstance(layer, RoutedLayer))
    checkpointed(replayed, reentrant=False)
    plain, written = gradients(model, tape)
    with_replay, rewritten = gradients(replayed, again)
    assert plain.keys() == with_replay.keys() and written == rewritten == 6
    for name, gradient in plain.items():
        assert torch.equal(gradient, with_replay[name]), name


def test_reentrant_checkpointing_is_refused():
    model, _ = routed()
    checkpointed(model, reentrant=True)
    model.train()
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        model(**padded(ROWS), use_cache=False)


@pytest.mark.parametrize("plugin", [WILD, ProgressiveDepths(rank_on="weight")])
def test_a_layer_asks_the_device_nothing(plugin):
    """FakeTensorMode has no values: whatever would sync a host raises."""
    batch = padded(ROWS)
    tokens = facts(batch)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model = tiny_llava()
        tape = attach(model, {"depth": plugin})
        tape.begin(Tokens(*(mode.from_tensor(t) for t in tokens._tensors()), tokens.counts_B))
        decoder = model.get_decoder()
        x = torch.empty(*tokens.shape, 32)
        angles = decoder.rotary_emb(x, position_ids=torch.arange(tokens.shape[1])[None])
        with tape.recording() as records:
            for layer in decoder.layers:
                x = layer(x, attention_mask=None, position_embeddings=angles)
        assert x.shape == (*tokens.shape, 32)
        assert len({record.decision.index_BK.shape[1] for record in records}) > 3


def test_24_routed_layers_compile_to_at_most_3_graphs():
    torch._dynamo.reset()
    model, _ = routed(32)
    counter = CompileCounter()
    layers = [layer for layer in model.get_decoder().layers if isinstance(layer, RoutedLayer)]
    assert len(layers) == 24
    eager = copy.deepcopy(model)
    for layer in layers:
        layer.compile(backend=counter, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=False, fail_on_recompile_limit_hit=True):
        for rows in (ROWS[:2], [row(2, 4), row(1, 9, seed=4)], ROWS):
            batch = padded(rows)
            torch.testing.assert_close(model(**batch, use_cache=False).logits, eager(**batch, use_cache=False).logits)
    assert 1 <= counter.frame_count <= 3


def test_no_pretrained_key_is_renamed_and_hidden_states_keep_their_shapes():
    model, _ = routed()
    names, dense = set(model.state_dict()), set(tiny_llava().state_dict())
    assert names - dense == {f"routers.depth.{i}.network.{p}" for i in range(2, 8) for p in ("weight", "bias")}
    assert not dense - names
    states = model(**padded(ROWS), use_cache=False, output_hidden_states=True).hidden_states
    assert len({state.shape for state in states}) == 1 and len(states) == 9


def test_a_shared_router_is_one_key_and_gets_the_gradient_of_all_its_layers():
    model, _ = routed(sharing="shared")
    assert [name for name, _ in model.routers.named_parameters()] == [
        "depth.shared.network.weight",
        "depth.shared.network.bias",
    ]
    gates = [layer.gate.router for layer in model.get_decoder().layers if isinstance(layer, RoutedLayer)]
    assert all(router is gates[0] for router in gates)
    model(**padded(ROWS), use_cache=False).loss.backward()
    assert gates[0].network.weight.grad.any()


def test_a_bare_decoder_and_wrong_facts_are_refused():
    model, tape = routed()
    with pytest.raises(RuntimeError, match="whole vision-language model"):
        model.get_decoder()(inputs_embeds=torch.zeros(1, 4, 32), use_cache=False)
    with pytest.raises(ValueError, match="announced tokens have shape"), tape.about(facts(padded([row(1, 40)]))):
        model(**padded([row(1, 5)]), use_cache=False)
    with pytest.raises(ValueError, match="input_ids"):
        model(inputs_embeds=torch.zeros(1, 4, 32), use_cache=False)


def test_announced_facts_are_lengthened_by_answers():
    model, tape = routed()
    batch = padded([row(1, 5)])
    longer = {**batch, "input_ids": torch.cat([batch["input_ids"], torch.tensor([[7, 8]])], 1)}
    longer["attention_mask"] = torch.ones_like(longer["input_ids"])
    del longer["labels"]
    with tape.about(facts(batch)), tape.recording() as told:
        announced = model(**longer, use_cache=False).logits
    with tape.recording() as derived:
        assert torch.equal(model(**longer, use_cache=False).logits, announced)
    assert told[0].tokens.counts_B == ((0, 0, 3, 5, 16),) and derived[0].tokens.counts_B == ((0, 0, 8, 0, 16),)
