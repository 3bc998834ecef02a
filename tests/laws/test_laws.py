"""What every plugin block of ``configs/**`` is held to; what a rule breaks by definition, its own properties excuse.

Run with ``-rs`` for the excuses.
"""

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from torch._subclasses.fake_tensor import FakeTensorMode

from routing import Constant, RoutedLayer, RoutingPlugin, Tokens, Weighting, attach, discover
from tests.tiny import IMAGE, PATCHES, facts, padded, row, tiny_llava

CONFIGS = Path(__file__).parent.parent.parent / "configs"
ROWS = [row(1, 9), row(0, 6, seed=1), row(2, 4, seed=2), row(1, 3, seed=3, first_text=5)]


def blocks() -> dict[str, str]:
    """The distinct plugin blocks, as YAML, by the first file that has them."""
    found: dict[str, str] = {}
    for path in sorted(CONFIGS.rglob("*.yaml")):
        plugins = ((yaml.safe_load(path.read_text()).get("model") or {}).get("init_args") or {}).get("plugins")
        if plugins and yaml.safe_dump(plugins) not in found.values():
            found[str(path.relative_to(CONFIGS))] = yaml.safe_dump(plugins)
    return found


BLOCKS = blocks()


@pytest.fixture(params=BLOCKS)
def plugins(request) -> dict[str, RoutingPlugin]:
    discover()
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--plugins", type=dict[str, RoutingPlugin])
    return parser.instantiate_classes(parser.parse_object({"plugins": yaml.safe_load(BLOCKS[request.param])})).plugins


def routed(plugins, attention: str = "sdpa"):
    """A routed model whose routers are past their start: no ties."""
    model = tiny_llava(attention=attention)
    tape = attach(model, plugins)
    torch.manual_seed(1)
    for parameter in model.routers.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model, tape


def gated(model) -> list[RoutedLayer]:
    return [layer for layer in model.get_decoder().layers if isinstance(layer, RoutedLayer)]


def gradients(model) -> dict[str, torch.Tensor]:
    model.train()(**padded(ROWS), use_cache=False).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@dataclasses.dataclass(frozen=True)
class One(Weighting):
    def __call__(self, scores_BTE):
        return torch.ones_like(scores_BTE)


@pytest.mark.parametrize(("rows", "atol"), [(ROWS[:1], 0.0), (ROWS, 1e-6)])
def test_full_capacity_and_weight_one_are_the_dense_model(plugins, rows, atol):
    model, _ = routed(plugins)
    for layer in gated(model):
        gate = layer.gate
        if not hasattr(gate.selector, "most") or gate.selector.most(10, 1.0) != 10:
            pytest.skip(
                f"{type(gate.selector).__name__} does not follow the capacity, so it cannot be told to take all"
            )
        layer.gate = dataclasses.replace(gate, capacity=Constant(1.0), weighting=One())
    batch = padded(rows)
    got, want = (each(**batch, use_cache=False).logits for each in (model, tiny_llava()))
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(got[real], want[real], atol=atol, rtol=0)


def test_no_pretrained_key_is_renamed(plugins):
    model, _ = routed(plugins)
    dense, names = set(tiny_llava().state_dict()), set(model.state_dict())
    assert dense <= names and all(name.startswith("routers.") for name in names - dense)


def test_hidden_states_keep_the_dense_shapes(plugins):
    model, _ = routed(plugins)
    states = model(**padded(ROWS), use_cache=False, output_hidden_states=True).hidden_states
    assert len(states) == 9 and len({state.shape for state in states}) == 1


def test_checkpointing_changes_no_gradient(plugins):
    model, _ = routed(plugins)
    replayed = copy.deepcopy(model)
    enable = getattr(replayed, "activation_checkpointing_enable", None) or replayed.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    plain, again = gradients(model), gradients(replayed)
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        assert torch.equal(gradient, again[name]), name


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_row_depends_neither_on_batch_mates_nor_on_padding(plugins, side, attention):
    model, _ = routed(plugins, attention)
    if not all(layer.gate.selector.batch_independent for layer in gated(model)):
        pytest.skip("the rule declares batch_independent = False")
    model.eval()
    for B in (1, 2, 3, 5, 8):
        rows = [ROWS[b % len(ROWS)] for b in range(B)]
        batch, image = padded(rows, side), 0
        positions = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
        together = model(**batch, position_ids=positions, use_cache=False).logits
        for b, tokens in enumerate(rows):
            alone, images = padded([tokens]), tokens.count(IMAGE) // PATCHES
            if images:
                alone["pixel_values"] = batch["pixel_values"][image : image + images]
                image += images
            want = model(**alone, use_cache=False).logits[0]
            torch.testing.assert_close(together[b][batch["attention_mask"][b].bool()], want, atol=2e-5, rtol=0)


def test_cached_decoding_equals_one_forward(plugins):
    model, _ = routed(plugins)
    batch = padded(ROWS, "left")
    del batch["labels"]
    how = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    model.eval()
    decides = [layer.gate.selector for layer in gated(model) if layer.gate.selector.candidates(_answers())]
    if not all(selector.causal for selector in decides):
        pytest.skip("the rule ranks generated tokens too and declares causal = False")
    assert model.generate(**batch, **how).tolist() == model.generate(**batch, **how, use_cache=False).tolist()


def _answers() -> Tokens:
    return Tokens.of(torch.tensor([[3]]))


def test_every_router_that_can_matter_gets_a_gradient(plugins):
    model, _ = routed(plugins)
    moved = {name for name, gradient in gradients(model).items() if name.startswith("routers") and gradient.any()}
    # The last layer's vision outputs reach no loss: a router of its own has nothing to learn there.
    own = {name for name, _ in model.named_parameters() if name.startswith("routers") and ".7." not in name}
    assert own <= moved


def test_no_layer_asks_the_device(plugins):
    batch = padded(ROWS)
    tokens = facts(batch)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model = tiny_llava()
        tape = attach(model, plugins)
        if any(layer.gate.kept(tokens) is None for layer in gated(model)):
            pytest.skip("how many tokens the rule keeps depends on the data: kept = None")
        tape.begin(Tokens(*(mode.from_tensor(t) for t in tokens._tensors()), tokens.counts_B))
        x = torch.empty(*tokens.shape, 32)
        angles = model.get_decoder().rotary_emb(x, position_ids=torch.arange(tokens.shape[1])[None])
        for layer in model.get_decoder().layers:
            x = layer(x, attention_mask=None, position_embeddings=angles)
        assert x.shape == (*tokens.shape, 32)


def test_two_evaluations_are_bit_identical(plugins):
    model, _ = routed(plugins)
    model.eval()
    first, second = (model(**padded(ROWS), use_cache=False).logits for _ in range(2))
    assert torch.equal(first, second)


def test_two_plugins_on_one_site_are_refused_by_name(plugins):
    (name, plugin), *_ = plugins.items()
    with pytest.raises(ValueError, match=f"'{name}' and 'again' both route"):
        attach(tiny_llava(), {**plugins, "again": plugin})
