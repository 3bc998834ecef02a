"""Which layers a depth plugin routes: by a rule on their attention rank, or by a score and a budget of FLOPs."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace

from lit_modules.attention_rank import LayerRank
from lit_modules.dense_subject import DenseSubject
from lit_modules.layer_scores import twin
from routing import Layers, Placement, RoutingPlugin, Tokens
from routing.cost import Cost, count

RELATIVE = 0.1  # as 110 of prompts of about 1,100 tokens


@dataclass(frozen=True)
class RankRule:
    """Which layers are routed by their ARank; one of four rules, by default ``relative`` at 0.1.

    Args:
        relative: Layers whose ARank is below this share of S - 1, for rows of S tokens, in (0, 1].
        absolute: Layers whose ARank is below this number (110 in the paper, for prompts of about 1,100 tokens).
        count: So many layers, of the lowest ARank.
        highest: So many layers, of the highest ARank: the control, inverse ARank.
    """

    relative: float | None = None
    absolute: float | None = None
    count: int | None = None
    highest: int | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) > 1 or any(value <= 0 for value in given.values()) or (self.relative or 0) > 1:
            raise ValueError(
                f"The rule is {', '.join(f'--{name} {value}' for name, value in given.items())}.\nAllowed: one of"
                " --relative (in (0, 1]), --absolute (above 0), --count and --highest (at least 1).\nGive one of them,"
                f" or none for --relative {RELATIVE}."
            )

    @property
    def threshold(self) -> float | None:
        """Below which layers are routed, in the rule's own unit; None where so many are asked for."""
        if self.count is not None or self.highest is not None:
            return None
        return self.absolute or self.relative or RELATIVE

    def __str__(self) -> str:
        for name in ("absolute", "count", "highest"):
            if (value := getattr(self, name)) is not None:
                return f"{name} {value:g}"
        return f"relative {self.threshold:g}"

    def check(self, able: int) -> None:
        """Before ranks are known.

        Raises:
            ValueError: more layers are asked for than the ``able`` that can be routed.
        """
        if (self.count or self.highest or 0) > able:
            raise ValueError(
                f"--{self} asks for more layers than can be routed.\nAllowed: 1 to {able}.\nGive one of these."
            )

    def __call__(self, ranks: Sequence[LayerRank], refused: Container[int] = ()) -> tuple[int, ...]:
        """Layers to route, ascending, none of them ``refused``; of equal ranks the earlier layer first.

        Raises:
            ValueError: there is none, or fewer layers than are asked for.
        """
        able = [each for each in ranks if each.layer not in refused]
        means = {each.layer: (each.rank if self.absolute else each.relative).mean for each in able}
        self.check(len(means))
        wanted = self.count or self.highest
        if wanted is None:
            return self._below(means)
        sign = 1 if self.count else -1
        return tuple(sorted(sorted(means, key=lambda layer: sign * means[layer])[:wanted]))

    def _below(self, means: Mapping[int, float]) -> tuple[int, ...]:
        chosen = tuple(layer for layer, mean in means.items() if mean < self.threshold)
        if not chosen:
            lowest = min(means, key=lambda layer: means[layer])
            raise ValueError(
                f"No layer that can be routed has an ARank below --{self}; the lowest is {means[lowest]:.4g}, of layer"
                f" {lowest}.\nAllowed: a threshold above that, or a number of layers.\nGive another --relative or"
                " --absolute, or --count K for the K lowest."
            )
        return chosen


@dataclass(frozen=True)
class Plan:
    """The fewest layers, in the order of their scores, that bring a prefill to a budget.

    Args:
        order: Layers that the plugin can route, the first to be routed first.
        shares: FLOPs of the decoder layers, as a share of the dense count, after each of them up to the last.
        routed: How many of ``order`` are routed.
        refused: Why each other layer cannot be routed.
    """

    order: tuple[int, ...]
    shares: tuple[float, ...]
    routed: int
    refused: Mapping[int, str]

    @property
    def layers(self) -> tuple[int, ...]:
        """Those that are routed, ascending."""
        return tuple(sorted(self.order[: self.routed]))

    @property
    def share(self) -> float:
        """What they reach."""
        return self.shares[self.routed - 1]


def placeable(plugins: Mapping[str, RoutingPlugin], name: str) -> RoutingPlugin:
    """The plugin whose placement is to be chosen.

    Raises:
        ValueError: there is none of that name, or it has no placement.
    """
    can = [other for other, plugin in plugins.items() if isinstance(getattr(plugin, "placement", None), Placement)]
    if name in can:
        return plugins[name]
    given = (
        f"{name!r} ({type(plugins[name]).__name__}) has no placement" if name in plugins else f"there is no {name!r}"
    )
    raise ValueError(
        f"model.init_args.plugins: {given}.\nAllowed: {', '.join(can) or 'a plugin with a placement; there is none'}.\n"
        + (f"Give --plugin {can[0]}." if can else "Add a --config with such a plugin, such as configs/quickstart.yaml.")
    )


def refusals(dense: DenseSubject, name: str) -> dict[int, str]:
    """Why the plugin cannot route a layer alone, beside the config's other plugins, for each that it cannot.

    Raises:
        ValueError: it can route none.
    """
    refused = {}
    for layer in range(dense.depth):
        try:
            twin(dense.model, _placed(dense, name, (layer,)))
        except ValueError as error:
            refused[layer] = str(error)
    if len(refused) == dense.depth:
        raise ValueError(
            f"The plugin {name!r} can route no layer: {refused[0]}\nAllowed: a plugin that can.\nGive it other"
            " arguments, or name another by --plugin."
        )
    return refused


def planner(dense: DenseSubject, name: str, budget: float, tokens: Tokens) -> Callable[[Sequence[int]], Plan]:
    """Turns an order of all layers into a plan; a budget that no order reaches is refused before there is one.

    The plan routes the first layers of the order by the config's own plugin, until a prefill of ``tokens`` is cheap
    enough.

    Raises:
        ValueError: all layers together do not reach the budget, or only the data tell what the plugin costs.
    """
    refused, share = refusals(dense, name), _shares(dense, name, tokens)
    every = tuple(layer for layer in range(dense.depth) if layer not in refused)
    if (reached := share(every)) > budget:
        raise ValueError(
            f"--budget {budget:g} is not reached: with all {len(every)} layers that {name!r} can route, a prefill takes"
            f" {upward(reached)} of the dense FLOPs.\nAllowed: a budget from there up to 1.\nGive one, or let the"
            " plugin keep fewer tokens (its capacity)."
        )

    def planned(order: Sequence[int]) -> Plan:
        able = tuple(layer for layer in order if layer not in refused)
        shares = tuple(share(able[: n + 1]) for n in range(len(able)))
        return Plan(able, shares, next(n + 1 for n, reached in enumerate(shares) if reached <= budget), refused)

    return planned


def upward(share: float) -> str:
    """A share in four digits, rounded so that it is enough as a budget."""
    return f"{math.ceil(share * 1e4) / 1e4:.4f}"


def _placed(dense: DenseSubject, name: str, layers: tuple[int, ...]) -> dict[str, RoutingPlugin]:
    """The config's plugins, one of them at these layers; it is on, even where the config trains a dense parent."""
    return {**dense.plugins, name: replace(dense.plugins[name], placement=Layers(layers), enabled=True)}


def _shares(dense: DenseSubject, name: str, tokens: Tokens) -> Callable[[tuple[int, ...]], float]:
    whole = _flops(count(dense.model, tokens))

    def share(layers: tuple[int, ...]) -> float:
        model, _ = twin(dense.model, _placed(dense, name, layers))
        try:
            return _flops(count(model, tokens)) / whole
        except ValueError as error:
            raise ValueError(
                f"What the plugin {name!r} costs cannot be planned: {error}\nAllowed: a rule that keeps a known number"
                " of tokens in a prefill, such as ExpertChoice.\nChange its selector, or choose layers by `lit arank`."
            ) from error

    return share


def _flops(cost: Cost) -> int:
    return sum(layer.flops for layer in cost.layers)
