"""A Hugging Face vision-language model seen as a stack of layers: the one file that knows its attribute names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal

from torch import nn
from transformers import PreTrainedModel

from routing.attended import AttendedLayer, check_attended, route_attended
from routing.attention import Observer, Queries, observe
from routing.capacity import CapacitySchedule
from routing.feed_forward import FeedForward
from routing.gate import FollowingGate, Gate
from routing.inside import deciding_inside
from routing.layer import RoutedLayer, route_layer
from routing.merge import Merge
from routing.names import attention_of, decoder_layers, mlp_of, norm_of
from routing.norm import once
from routing.placement import Placement
from routing.positions import CompactPositions, checked
from routing.routed_mlp import upcycled
from routing.router import Router, RouterSpec
from routing.routers import Routers, Sharing
from routing.select import Selector
from routing.selector_checks import (
    check_attends,
    check_both_routed,
    check_divided,
    check_followed,
    check_forecast,
    check_kind,
)
from routing.tape import Part, RoutingTape, Site
from routing.upcycling import Upcycling
from routing.weighting import Weighting

Modalities = Literal["shared", "separate"]
Positions = Literal["original", "compact"]
Gives = Literal["nothing", "keys_and_values"]
Wrap = Callable[[nn.Module, Site], nn.Module]

ORDER: tuple[Part, ...] = ("attention", "mlp", "layer")  # inner parts first: a routed layer may hook what they became


class Decoder:
    """What a plugin may do to a model: ask for routers, and claim parts of decoder layers.

    Claims are collected first, checked, and only then committed, so that the order of the plugins cannot matter.

    Args:
        model: Any vision-language model whose ``get_decoder()`` has ``layers``, weights loaded.
        tape: Where gates find the facts about tokens and leave their records.
    """

    def __init__(self, model: PreTrainedModel, tape: RoutingTape) -> None:
        self.model, self.tape = model, tape
        self.layers = decoder_layers(model)
        self.dim: int = model.config.get_text_config().hidden_size
        self._by = ""
        self._routers = Routers(model, self.dim)
        self._claims: dict[tuple[int, Part], tuple[Site, Wrap]] = {}
        self.gates: list[Gate] = []
        self._observed: dict[int, tuple[Queries, str]] = {}
        self._compact: CompactPositions | None = None

    def __len__(self) -> int:
        return len(self.layers)

    @contextmanager
    def claiming(self, by: str) -> Iterator[None]:
        """Inside, what is claimed belongs to the plugin named ``by``, which must claim something."""
        self._by = by
        yield
        if not any(site.by == by for site, _ in self._claims.values()):
            raise ValueError(
                f"Plugin {by!r} routes nothing in this decoder of {len(self)} layers: widen its placement or lower its"
                f" capacity, or remove it with enabled: false."
            )

    def sites(self, placement: Placement, part: Part = "layer") -> tuple[Site, ...]:
        """The places that a placement names, first layer first."""
        return tuple(Site(layer, len(self), part, self._by) for layer in placement(len(self)))

    def route_layer(
        self, site: Site, gate: Gate, merge: Merge, passed_give: Gives = "nothing", positions: Positions = "original"
    ) -> None:
        """Claims a whole layer for depth routing: tokens that ``gate`` keeps go through it, the others pass it by.

        What those still give to the layer is nothing, or the keys and values that kept tokens attend to. Kept tokens
        stand where they stand in the sequence, or are numbered anew (``compact``).
        """
        numbering = None if positions == "original" else self._numbering(site)
        if numbering is not None and passed_give == "keys_and_values":
            raise ValueError(
                f"Plugin {site.by!r}: passed tokens that give keys and values keep their positions.\nAllowed with"
                " positions: compact: passed_give 'nothing'.\nGive positions: original."
            )

        self.mlp(self.layers[site.layer])  # what cannot be carried out is refused before anything is
        if merge.scales_attention:
            self.attention(self.layers[site.layer])
        if passed_give == "keys_and_values":
            check_attended(merge)

        def wrap(layer: nn.Module, _: Site) -> nn.Module:
            if passed_give == "keys_and_values":
                return route_attended(layer, self.mlp(layer), gate, merge)
            attending = self.attention(layer) if merge.scales_attention else None
            force = self.attention_in_force
            return route_layer(layer, self.mlp(layer), gate, merge, force, attending=attending, positions=numbering)

        self.wrap_layer(site, wrap)

    def _numbering(self, site: Site) -> CompactPositions:
        """One for all layers, whose angles are the same."""
        if self._compact is None:
            self._compact = CompactPositions(checked(self.model, site.by))
        return self._compact

    def route_layers(
        self,
        placement: Placement,
        router: RouterSpec,
        weighting: Weighting,
        selector: Selector,
        capacity: CapacitySchedule,
        merge: Merge,
        sharing: Sharing = "separate",
        modalities: Modalities = "shared",
        positions: Positions = "original",
    ) -> None:
        """Claims the layers of a placement, each deciding for itself; capacity 1 leaves a layer dense."""
        for site in self.sites(placement):
            if capacity(site.depth) < 1:
                gate = self.gate(site, router, weighting, selector, capacity, sharing, modalities)
                self.route_layer(site, gate, merge, positions=positions)

    def route_mlp(
        self, site: Site, gate: Gate, upcycling: Upcycling, experts: int, nulls: int = 0, residual: Router | None = None
    ) -> None:
        """Claims a layer's feed-forward network for width routing: it becomes ``experts`` networks, and ``nulls`` none.

        ``residual``: a router of two scores, experts and the dense network, which stays as a branch of its own.
        """
        mlp = self.mlp(self.layers[site.layer])
        FeedForward.of(mlp, site).check_like(mlp, site)  # what cannot be carried out is refused before anything is

        def wrap(mlp: nn.Module, _: Site) -> nn.Module:
            running, config = deciding_inside(self.layers[site.layer], self.tape), self.model.config.get_text_config()
            return upcycled(mlp, gate, running, config, upcycling, experts, nulls, residual)

        self.wrap_mlp(site, wrap)

    @property
    def attention_in_force(self) -> Callable[[], str]:
        """Tells the name of the decoder's attention implementation, which may change after routing."""
        # No closure: a deep copy of the model has to ask its own configuration.
        return partial(getattr, self.model.config.get_text_config(), "_attn_implementation")

    def gate(
        self,
        site: Site,
        router: RouterSpec,
        weighting: Weighting,
        selector: Selector,
        capacity: CapacitySchedule | None,
        sharing: Sharing = "separate",
        modalities: Modalities = "shared",
        experts: int = 1,
    ) -> Gate:
        """The decision at a site, with a router of its own or one that all sites of this plugin share.

        ``modalities``: one router for vision and text, or one for each. ``experts``: scores of a token.
        """
        if modalities == "separate":
            check_both_routed(site.by, selector)
            router = router.for_each_modality()
        built = self.router(router, site, sharing, experts)
        check_kind(site, selector, experts)
        check_forecast(site.by, selector, built)
        check_followed(site.by, selector, built)
        check_divided(site.by, selector, weighting)
        if built.attends:
            check_attends(site)
            self._observe(site, built.attends)
        layer = self.layers[site.layer]
        normed = built.normed and site.part == "layer"  # what a part is given is normed already
        norm = norm_of(layer) if normed else None
        self.gates.append(Gate(site, built, weighting, selector, capacity, self.tape, norm=norm))
        return self.gates[-1]

    def follow(self, site: Site, leader: Gate) -> Gate:
        """The decision of an earlier site, repeated at this one: what was dropped stays dropped."""
        return FollowingGate(
            site, leader.router, leader.weighting, leader.selector, leader.capacity, self.tape, leader.site
        )

    def _observe(self, site: Site, queries: Queries) -> None:
        """Has the layer before a site watched for the attention that its tokens receive."""
        if site.layer == 0:
            raise ValueError(
                f"Plugin {site.by!r} routes layer 0 by the attention of the layer before, and there is none: let its"
                " placement start at layer 1 or later."
            )
        known = self._observed.setdefault(site.layer - 1, (queries, site.by))
        self.attention(self.layers[site.layer - 1])
        if known[0] != queries:
            raise ValueError(
                f"Plugins {known[1]!r} and {site.by!r} watch the attention of layer {site.layer - 1} for unlike"
                f" queries, {known[0]!r} and {queries!r}: let both watch the same, or remove one with enabled: false."
            )

    def router(
        self, spec: RouterSpec, site: Site, sharing: Sharing, experts: int = 1, role: str | None = None
    ) -> Router:
        """A new router for this site, or the one that all sites of this plugin share; on the model's root.

        ``role`` tells a second router of the site, or of all, from the one that decides.
        """
        return self._routers(spec, site, sharing, experts, role)

    def wrap_layer(self, site: Site, wrap: Wrap) -> None:
        """Claims a whole layer; ``wrap`` gets it and returns what stands there from then on."""
        self._claim(site, "layer", wrap)

    def wrap_attention(self, site: Site, wrap: Wrap) -> None:
        """Claims a layer's attention."""
        self._claim(site, "attention", wrap)

    def wrap_mlp(self, site: Site, wrap: Wrap) -> None:
        """Claims a layer's feed-forward network."""
        self._claim(site, "mlp", wrap)

    def mlp(self, layer: nn.Module) -> nn.Module:
        """The feed-forward network of a decoder layer."""
        return mlp_of(layer)[1]

    def attention(self, layer: nn.Module) -> nn.Module:
        """The attention of a decoder layer."""
        return attention_of(layer)[1]

    def _claim(self, site: Site, part: Part, wrap: Wrap) -> None:
        other = self._claims.get((site.layer, part))
        if other is not None:
            raise ValueError(
                f"Plugins {other[0].by!r} and {site.by!r} both route the {part} of decoder layer {site.layer}: give"
                f" them disjoint placements, or remove one with enabled: false."
            )
        self._claims[site.layer, part] = (site, wrap)

    def commit(self) -> None:
        """Carries the claims out, inner parts first."""
        for part in ORDER:
            for (index, claimed), (site, wrap) in sorted(self._claims.items(), key=lambda claim: claim[0][0]):
                if claimed != part:
                    continue
                layer = self.layers[index]
                if part == "layer":
                    self.layers[index] = wrap(layer, site)
                else:
                    name, found = mlp_of(layer) if part == "mlp" else attention_of(layer)
                    setattr(layer, name, wrap(found, site))
        for norm in (gate.norm for gate in self.gates if gate.norm is not None):
            once(norm)
        for index, (queries, _) in self._observed.items():
            layer = self.layers[index]
            attention = self.attention(layer)
            cut = isinstance(layer, RoutedLayer) and not isinstance(layer, AttendedLayer)
            observe(attention, Observer(self.tape, index, queries, self.attention_in_force, cut))
