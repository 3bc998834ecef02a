"""Claims, discovery, placements and schedules: what a user can get wrong, and what they are told."""

import importlib.metadata
import math
from dataclasses import dataclass

import pytest

from plugins.progressive_depths import ProgressiveDepths
from routing import (
    All,
    Between,
    Constant,
    Decoder,
    Every,
    Layers,
    Linear,
    LinearRouter,
    MLPRouter,
    PerLayer,
    RoutingPlugin,
    RoutingTape,
    ShiftedCosine,
    Site,
    TanhNorm,
    TokenChoice,
    WarmUp,
    attach,
    discover,
    register,
    registered,
)
from routing.plugin import broken
from tests.tiny import tiny_llava


def test_two_plugins_on_one_layer_are_refused_before_anything_is_changed():
    model = tiny_llava()
    plugins = {"a": ProgressiveDepths(), "b": ProgressiveDepths(placement=Layers((7,)))}
    with pytest.raises(ValueError, match=r"'a' and 'b' both route the layer of decoder layer 7"):
        attach(model, plugins)
    assert {type(layer).__mro__[1].__name__ for layer in model.get_decoder().layers} == {"GradientCheckpointingLayer"}
    attach(model, {"a": ProgressiveDepths()})  # nothing was left behind


def test_routers_of_two_parts_of_a_layer_are_two_and_a_shared_one_has_one_form():
    decoder = Decoder(tiny_llava(), RoutingTape())
    attention, mlp = (Site(3, 8, part, "x") for part in ("attention", "mlp"))
    assert decoder.router(LinearRouter(), attention, "separate") is not decoder.router(LinearRouter(), mlp, "separate")
    shared = decoder.router(LinearRouter(), attention, "shared")
    assert decoder.router(LinearRouter(), mlp, "shared") is shared
    with pytest.raises(ValueError, match="one router 'shared' in two forms"):
        decoder.router(LinearRouter(), mlp, "shared", experts=4)


def test_zero_initialised_routers_start_at_zero_after_hugging_faces_own_initialisation():
    model = tiny_llava()
    attach(model, {"depth": ProgressiveDepths()})
    assert not any(parameter.any() for parameter in model.routers.parameters())


def test_disjoint_plugins_compose_and_disabled_ones_are_absent():
    model = tiny_llava()
    attach(
        model,
        {
            "low": ProgressiveDepths(placement=Between(2, 3)),
            "high": ProgressiveDepths(placement=Between(4, -1), capacity=Constant(0.5)),
            "off": ProgressiveDepths(enabled=False),
        },
    )
    assert {name: list(routers) for name, routers in model.routers.items()} == {
        "low": ["2", "3"],
        "high": ["4", "5", "6", "7"],
    }


@pytest.mark.parametrize(
    ("plugins", "said"),
    [
        ({"depth": ProgressiveDepths(placement=Layers((0,)))}, "'depth' routes nothing in this decoder of 8 layers"),
        ({"depth": ProgressiveDepths(placement=Layers((8,)))}, "layer 8 does not exist; this decoder has 8 layers"),
        ({"de.pth": ProgressiveDepths()}, "Plugin name 'de.pth'"),
    ],
)
def test_a_plugin_that_cannot_be_applied_says_why(plugins, said):
    with pytest.raises(ValueError, match=said):
        attach(tiny_llava(), plugins)


def test_a_model_is_routed_once():
    model = tiny_llava()
    attach(model, {"depth": ProgressiveDepths()})
    with pytest.raises(ValueError, match="routed already"):
        attach(model, {"depth": ProgressiveDepths()})


def test_placements():
    assert All()(4) == (0, 1, 2, 3)
    assert Every(2, start=1)(6) == (1, 3, 5)
    assert Between(2, -2)(8) == (2, 3, 4, 5, 6)
    assert Layers((-1, 0))(5) == (0, 4)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Every(0),
        lambda: Between(3, 1)(8),
        lambda: Layers((1, 1))(8),
        lambda: Layers((1, -7))(8),
        lambda: Constant(0),
        lambda: Constant(-1),
        lambda: Constant(1.5),
        lambda: Constant(math.nan),
        lambda: ShiftedCosine(low=0.9, high=0.2),
        lambda: ShiftedCosine(mean=2),
        lambda: PerLayer(()),
        lambda: PerLayer((0.5, 0.0)),
        lambda: WarmUp(Constant(0.5), until=0),
        lambda: TanhNorm(1.0),
        lambda: TokenChoice(0),
        lambda: LinearRouter(std=-1),
        lambda: MLPRouter(hidden=0),
    ],
)
def test_impossible_values_are_refused_where_they_are_given(wrong):
    with pytest.raises(ValueError, match=r"must|is a share|listed twice|no layer|give one|at least"):
        wrong()


def test_schedules():
    assert Linear()(5 / 31) == pytest.approx(1 - 5 / 31)
    assert [Linear()(i / 31) < 1 for i in range(6)] == [False] * 5 + [True]
    assert math.fsum(Linear()(i / 31) for i in range(32)) / 32 == pytest.approx(0.523438, abs=1e-6)
    assert [PerLayer((1.0, 0.5, 0.25))(i / 2) for i in range(3)] == [1.0, 0.5, 0.25]
    warm = WarmUp(Constant(0.2), until=0.5)
    assert [warm(0.5, p) for p in (0, 0.25, 0.5, 1)] == [
        1.0,
        pytest.approx(0.6),
        pytest.approx(0.2),
        pytest.approx(0.2),
    ]


def test_discovery_lists_every_plugin_and_names_what_fails(monkeypatch):
    known = discover()
    assert "ProgressiveDepths" in known
    point = importlib.metadata.EntryPoint("acme", "no_such_module", "lit.plugins")
    monkeypatch.setattr("routing.plugin.entry_points", lambda group: [point])
    monkeypatch.setattr("routing.plugin._BROKEN", {})
    with pytest.warns(UserWarning, match=r"'acme' = 'no_such_module' could not be imported: ModuleNotFoundError"):
        assert discover() == known
    assert list(broken()) == ["acme"]


def test_two_plugins_of_one_name_are_refused_with_both_places():
    @dataclass(frozen=True)
    class ProgressiveDepths(RoutingPlugin):
        def apply(self, decoder): ...

    ProgressiveDepths.__module__ = "acme.other"
    with pytest.raises(ValueError, match=r"plugins.progressive_depths.ProgressiveDepths and acme.other"):
        register(ProgressiveDepths)
    assert registered()["ProgressiveDepths"].__module__ == "plugins.progressive_depths"
