"""A Hugging Face vision-language model seen as a stack of layers: the one file that knows its attribute names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from routing.attended import AttendedLayer, route_attended
from routing.attention import Observer, Queries, observe
from routing.capacity import CapacitySchedule
from routing.gate import FollowingGate, Gate
from routing.layer import RoutedLayer, continues_densely, route_layer
from routing.merge import Merge
from routing.placement import Placement
from routing.router import Router, RouterSpec
from routing.select import Selector
from routing.tape import Part, RoutingTape, Site
from routing.tokens import NOWHERE, Phase, TokenKind, Tokens
from routing.weighting import Weighting

Sharing = Literal["separate", "shared"]
Gives = Literal["nothing", "keys_and_values"]
Wrap = Callable[[nn.Module, Site], nn.Module]

MLP_NAMES = ("mlp", "feed_forward", "block_sparse_moe")
ATTENTION_NAMES = ("self_attn", "attention")
ORDER: tuple[Part, ...] = ("attention", "mlp", "layer")  # inner parts first: a routed layer may hook what they became


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The language model's layers, first layer first.

    Raises:
        ValueError: the model has no such list.
    """
    layers = getattr(model.get_decoder(), "layers", None)  # type: ignore[no-untyped-call]
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(f"{type(model).__name__} has no list of decoder layers at get_decoder().layers to route.")
    return layers


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
        self._built: dict[tuple[str, str], tuple[RouterSpec, int]] = {}
        self._claims: dict[tuple[int, Part], tuple[Site, Wrap]] = {}
        self._observed: dict[int, tuple[Queries, str]] = {}

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

    def route_layer(self, site: Site, gate: Gate, merge: Merge, passed_give: Gives = "nothing") -> None:
        """Claims a whole layer for depth routing: tokens that ``gate`` keeps go through it, the others pass it by.

        What those still give to the layer is nothing, or the keys and values that kept tokens attend to.
        """
        if passed_give == "nothing":
            self.wrap_layer(
                site, lambda layer, _: route_layer(layer, self.mlp(layer), gate, merge, self.attention_in_force)
            )
        else:
            self.wrap_layer(site, lambda layer, _: route_attended(layer, self.mlp(layer), gate, merge))

    def route_layers(
        self,
        placement: Placement,
        router: RouterSpec,
        weighting: Weighting,
        selector: Selector,
        capacity: CapacitySchedule,
        merge: Merge,
        sharing: Sharing = "separate",
    ) -> None:
        """Claims the layers of a placement, each deciding for itself; capacity 1 leaves a layer dense."""
        for site in self.sites(placement):
            if capacity(site.depth) < 1:
                self.route_layer(site, self.gate(site, router, weighting, selector, capacity, sharing), merge)

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
        capacity: CapacitySchedule,
        sharing: Sharing = "separate",
    ) -> Gate:
        """The decision at a site, with a router of its own or one that all sites of this plugin share."""
        built = self.router(router, site, sharing)
        if built.attends:
            self._observe(site, built.attends)
        return Gate(site, built, weighting, selector, capacity, self.tape)

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
        if known[0] != queries:
            raise ValueError(
                f"Plugins {known[1]!r} and {site.by!r} watch the attention of layer {site.layer - 1} for unlike"
                f" queries, {known[0]!r} and {queries!r}: let both watch the same, or remove one with enabled: false."
            )

    def router(self, spec: RouterSpec, site: Site, sharing: Sharing, experts: int = 1) -> Router:
        """A new router for this site, or the one that all sites of this plugin share; on the model's root."""
        if not hasattr(self.model, "routers"):
            self.model.add_module("routers", nn.ModuleDict())
        routers = self.model.routers
        assert isinstance(routers, nn.ModuleDict)
        if site.by not in routers:
            routers[site.by] = nn.ModuleDict()
        own = str(site.layer) if site.part == "layer" else f"{site.layer}_{site.part}"
        mine, key = routers[site.by], sharing if sharing == "shared" else own
        assert isinstance(mine, nn.ModuleDict)
        if key not in mine:
            # Random numbers are drawn on the CPU: a seed gives the same router on every device.
            device = self.model.device
            with torch.device("meta" if device.type == "meta" else "cpu"):
                mine[key] = spec.build(self.dim, experts)
            if device.type not in ("cpu", "meta"):
                mine[key].to(device)
            self._built[site.by, key] = (spec, experts)
        elif self._built[site.by, key] != (spec, experts):
            raise ValueError(
                f"Plugin {site.by!r} asks for one router {key!r} in two forms: {self._built[site.by, key]} and"
                f" {(spec, experts)}. Give the second place a router of its own, or both the same form."
            )
        router = mine[key]
        assert isinstance(router, Router)
        return router

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
        found: nn.Module = getattr(layer, _name(layer, MLP_NAMES))
        return found

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
                    name = _name(layer, MLP_NAMES if part == "mlp" else ATTENTION_NAMES)
                    setattr(layer, name, wrap(getattr(layer, name), site))
        for index, (queries, _) in self._observed.items():
            layer = self.layers[index]
            attention = getattr(layer, _name(layer, ATTENTION_NAMES))
            cut = isinstance(layer, RoutedLayer) and not isinstance(layer, AttendedLayer)
            observe(attention, Observer(self.tape, index, queries, self.attention_in_force, cut))


def _name(layer: nn.Module, names: tuple[str, ...]) -> str:
    for name in names:
        if isinstance(getattr(layer, name, None), nn.Module):
            return name
    raise ValueError(f"{type(layer).__name__} has none of {', '.join(names)}: its parts cannot be routed by name.")


ONE_ANSWER = tuple(int(kind is TokenKind.ANSWER) for kind in TokenKind)


class TokenObserver:
    """Opens the tape before each forward of the model, and closes it after.

    Facts come from ``tape.announced`` where somebody announced them, else from the input ids.
    """

    def __init__(self, tape: RoutingTape, layers: Iterable[nn.Module]) -> None:
        self.tape = tape
        self.routed = [layer for layer in layers if isinstance(layer, RoutedLayer)]

    def before(self, model: PreTrainedModel, args: tuple[Tensor, ...], kwargs: dict[str, object]) -> None:
        ids_BT = kwargs.get("input_ids", args[0] if args else None)
        mask_BT, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
        if not isinstance(ids_BT, Tensor):
            raise ValueError("A routed model finds its vision tokens in input_ids; pass those, not inputs_embeds.")
        filled, dense = isinstance(cache, Cache) and cache.get_seq_length() > 0, False
        if filled and ids_BT.shape[1] == 1:
            tokens = generated(ids_BT)
            assert isinstance(cache, Cache)
            dense = continues_densely(self.routed, tokens, cache)
        elif self.tape.announced is not None and not filled:
            tokens = lengthened(self.tape.announced, ids_BT)
        else:
            two_dimensional = isinstance(mask_BT, Tensor) and mask_BT.ndim == 2
            mask = mask_BT[:, -ids_BT.shape[1] :] if two_dimensional else None  # type: ignore[index]
            tokens = observed(ids_BT, mask, model.config.image_token_id)
        phase: Phase = "train" if model.training else "decode" if filled else "prefill"
        self.tape.begin(tokens.during(phase, self.tape.progress if model.training else 1.0), dense=dense)

    def after(self, model: PreTrainedModel, args: object, output: object) -> None:
        self.tape.end()


def observed(ids_BT: Tensor, mask_BT: Tensor | None, image_token: int) -> Tokens:
    """Facts from the ids alone: image tokens are VISION, other real tokens QUESTION. One host sync."""
    kind_BT = torch.where(ids_BT == image_token, TokenKind.VISION, TokenKind.QUESTION)
    if mask_BT is not None:
        kind_BT = kind_BT.masked_fill(mask_BT == 0, TokenKind.PAD)
    return Tokens.of(kind_BT)


def generated(ids_BT: Tensor) -> Tokens:
    """Facts of single tokens that follow a cache: ANSWER, without looking at them, so without a host sync."""
    kind_BT = torch.full_like(ids_BT, TokenKind.ANSWER, dtype=torch.int8)
    nowhere = torch.full_like(ids_BT, NOWHERE, dtype=torch.int16)
    return Tokens(kind_BT, nowhere, nowhere, nowhere, nowhere, (ONE_ANSWER,) * len(ids_BT), "decode")


def lengthened(tokens: Tokens, ids_BT: Tensor) -> Tokens:
    """Announced facts of a prompt, with the tokens generated since as ANSWER."""
    (rows, length), (announced_rows, announced) = ids_BT.shape, tokens.shape
    if rows % announced_rows == 0 and rows > announced_rows:  # beams, or several answers
        tokens, announced_rows = tokens.repeated(rows // announced_rows), rows
    if rows != announced_rows or length < announced:
        raise ValueError(
            f"The announced tokens have shape {(announced_rows, announced)}, the forward's input_ids {(rows, length)}:"
            f" announce the facts of this very batch, or none."
        )
    return tokens.extended(length - announced)
